"""How long does each call take at most while a server is away, stands still, is full, restarts, or was cut off?

Each call of the client is made on a bridge of its own that has just worked, and on one that has not connected yet,
while a fault lasts. Beside the time stands the bound that the documentation promises, with short settings::

    python -m bench.bounds --csv bench/results/bounds-0.1.0.csv
    python -m bench.bounds --place redis --fault frozen
"""

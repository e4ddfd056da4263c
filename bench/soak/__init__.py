"""Does anything grow while 200,000 tasks run, fail, are tried again and timed out, and the broker restarts each minute?

Two workers, one of threads and one of processes, run what this process sends and asks for. Memory, connections,
descriptors, threads and waiting messages are looked at every two seconds, and end where they began::

    python -m bench.soak --broker redis --csv bench/results/soak-redis-0.1.0.csv --plot soak-redis.svg
"""

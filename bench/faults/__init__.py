"""What does a broker, a worker or a network that fails do to tasks? Measured, on qbridge and beside it on plain Celery.

One *cell* is one system (qbridge, Celery, Celery with ``acks_late``) on one broker and pool. Three workers run numbered
tasks that one process sends; meanwhile the *story* happens: workers are killed, the broker is killed, frozen, cut off.
Every task writes down when it began and ended, and afterwards the *judge* compares what was sent with what ran and with
what is left in the broker::

    python -m bench.faults --cells redis:thread --system qbridge --tasks 2000
    nox -s faults
"""

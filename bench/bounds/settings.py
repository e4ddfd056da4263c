"""How short are the bounds set here? Each is another number, so that a call shows which one it kept."""

from __future__ import annotations

__all__ = ["ANSWER", "LOOK", "PUBLISH", "WAIT"]

PUBLISH = 3.0
"""``broker.publish_timeout``; 10 by default."""
WAIT = 1.5
"""The ``timeout`` of ``get``."""
LOOK = 1.0
"""``results.look_timeout``; 5 by default."""
ANSWER = 2.0
"""``socket_timeout`` of Redis results, 5 by default; ``statement_timeout`` of a database, 10 by default."""

"""How does kombu learn the scheme ``embedded``? Importing this module adds one entry to its table of transports.

The entry is additive and names the class by string, so nothing is imported before the first connection. It has to be
an entry: kombu refuses URL schemes with a dot or a colon, so the class cannot be named in the URL itself, and
Celery's ``broker_transport`` setting is overruled by the scheme of the URL.
"""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES

__all__ = ["SCHEME"]

SCHEME = "embedded"

TRANSPORT_ALIASES.setdefault(SCHEME, "qbridge.backends.embedded.transport:Transport")

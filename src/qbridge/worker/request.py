"""One message of a typed task on its way through a worker: decoded once."""

from __future__ import annotations

from typing import Any

from celery.worker.request import Request

__all__ = ["TypedRequest"]


class TypedRequest(Request):
    """Celery's request, which hands the pool the body that the strategy has read instead of bytes to read again.

    Without a content type the tracer takes the body as ``(args, kwargs, embed)``.
    """

    @property
    def body(self) -> Any:
        """The decoded body; of protocol 1 what Celery has made of it."""
        return self._body if self._decoded else self._message.payload

    @property
    def content_type(self) -> None:
        """None: nothing is left to decode."""
        return

    @property
    def content_encoding(self) -> None:
        """None: nothing is left to decode."""
        return

"""What crosses the wire: a function's signature as validators, arguments and results as JSON."""

from __future__ import annotations

from qbridge.serialization.signature import Signature, result_decoder

__all__ = ["Signature", "result_decoder"]

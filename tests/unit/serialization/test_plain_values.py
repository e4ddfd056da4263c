"""The quick way of plain values and plain calls: it takes nothing that the thorough one would not."""

from __future__ import annotations

import pytest

from qbridge.exceptions import ArgumentsError, PayloadError
from qbridge.serialization.signature import Signature


class Number(int):
    """An int that is not one."""


def test_what_is_not_exactly_of_the_declared_type_is_still_looked_at() -> None:
    """Plain values pass without pydantic; all that look like them do not."""

    def task(number: int, text: str, share: float = 0.5, flag: bool = False) -> str | None:
        return None

    signature = Signature(task, "t", strict=True)
    assert signature.encode_call((1, "a"), {}) == ([1, "a"], {})
    assert signature.encode_call((1,), {"text": "ä", "share": 2}) == ([1], {"text": "ä", "share": 2.0})
    args, _ = signature.encode_call((Number(7), "a"), {})
    assert args == [7, "a"]
    assert type(args[0]) is int
    for call, at in [
        (((True, "a"), {}), "number"),
        (((1, 2), {}), "text"),
        (((1, "\ud800"), {}), "text"),
        (((1, "a"), {"flag": 1}), "flag"),
    ]:
        with pytest.raises((ArgumentsError, PayloadError)) as caught:
            signature.encode_call(*call)
        assert isinstance(caught.value, PayloadError) or caught.value.errors[0]["loc"][0] == at
    for call, message in [
        (((1,), {}), "missing a required argument: 'text'"),
        (((1, "a"), {"text": "b"}), "multiple values for argument 'text'"),
        (((1, "a", 0.5, True, 5), {}), "too many positional arguments"),
        (((1, "a"), {"nobody": 1}), "unexpected keyword argument 'nobody'"),
    ]:
        with pytest.raises(ArgumentsError, match=message):
            signature.encode_call(*call)
        with pytest.raises(ArgumentsError, match=message):
            signature.decode_call(*call)


def test_parameters_that_have_one_way_to_be_given() -> None:
    """By position alone, by name alone: the quick way of binding keeps to it."""

    def task(first: int, /, second: int, *, third: int = 3) -> None:
        """None."""

    signature = Signature(task, "t", strict=True)
    assert signature.encode_call((1,), {"second": 2, "third": 4}) == ([1], {"second": 2, "third": 4})
    for call in [((1, 2, 3), {}), ((), {"first": 1, "second": 2}), ((1,), {"third": 3})]:
        with pytest.raises(ArgumentsError):
            signature.encode_call(*call)

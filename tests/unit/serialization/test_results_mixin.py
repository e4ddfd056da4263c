"""Reading of stored results: raw JSON beside what plain Celery gives, and errors that keep their text."""

from __future__ import annotations

import bz2
import json
import lzma
import pickle
import tracemalloc
import zlib
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import celery
import pytest
from celery.backends.base import KeyValueStoreBackend
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.utils.json import dumps

from qbridge.serialization.results import ERROR_TEXT_LIMIT, TypedResultMixin, error_text, revive


class Dictionary(KeyValueStoreBackend):
    """A key/value backend in a dict, as plain Celery has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        return self.data.get(key)

    def set(self, key: Any, value: Any) -> None:
        self.data[key] = value

    def delete(self, key: Any) -> None:
        self.data.pop(key, None)


class Typed(TypedResultMixin, Dictionary):
    """The same with the mixin."""


class KeywordOnly(Exception):
    """An exception that cannot be rebuilt from its arguments."""

    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Unprintable(Exception):
    """An exception whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def backends(**conf: Any) -> tuple[Typed, Dictionary]:
    """A backend with the mixin and a plain one over the same data."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(conf)
    ours, plain = Typed(app), Dictionary(app)
    plain.data = ours.data
    return ours, plain


@pytest.mark.parametrize(
    "value",
    [
        1,
        None,
        "text",
        [1, {"a": [2]}],
        datetime(2026, 1, 2, 3, tzinfo=UTC),
        {"when": [datetime(2026, 1, 2, tzinfo=UTC), Decimal("1.50")], "id": UUID(int=5), "raw": b"\xff\x00"},
    ],
)
def test_async_result_sees_what_plain_celery_gives(value: Any) -> None:
    """Values of plain tasks, kombu's typed values included, are the same as with plain Celery."""
    ours, plain = backends()
    plain.store_result("1", value, "SUCCESS")
    expected = plain.get_task_meta("1", cache=False)["result"]
    meta = ours.get_task_meta("1", cache=False)
    assert expected == meta["result"]
    assert json.loads(dumps(value)) == meta["result_json"]


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "Circle", "__value__": 3},
        {"__type__": "datetime", "__value__": "not a date"},
        {"__type__": [], "__value__": {}},
        {"shape": [{"__type__": None, "__value__": {"__type__": "uuid", "__value__": 1}}]},
    ],
)
def test_a_users_dict_with_kombus_keys_is_just_a_dict(value: Any) -> None:
    """A dict that only looks like a typed value never fails to decode."""
    ours, _ = backends()
    ours.store_result("1", value, "SUCCESS")
    meta = ours.get_task_meta("1", cache=False)
    assert value == meta["result_json"]
    assert value == meta["result"]


def test_a_dict_that_kombu_would_rewrite_is_kept_raw() -> None:
    """A user's dict that is also a valid typed value is raw in ``result_json``."""
    ours, _ = backends()
    value = {"__type__": "decimal", "__value__": "1.5"}
    ours.store_result("1", value, "SUCCESS")
    meta = ours.get_task_meta("1", cache=False)
    assert value == meta["result_json"]
    assert Decimal("1.5") == meta["result"]


def test_keyword_only_exception_keeps_its_message() -> None:
    """The text of an exception survives even if its class cannot be rebuilt; a plain reader does not mind."""
    ours, plain = backends()
    ours.store_result("1", KeywordOnly(code=7), "FAILURE")
    meta = ours.get_task_meta("1", cache=False)
    assert "code 7" == meta["error_json"]["exc_text"]
    assert "KeywordOnly" == meta["error_json"]["exc_type"]
    assert Exception is type(meta["result"])
    assert Exception is type(plain.get_task_meta("1", cache=False)["result"])


def test_rebuildable_exception_is_rebuilt_as_in_plain_celery() -> None:
    """An ordinary exception comes back as itself on both sides."""
    ours, plain = backends()
    ours.store_result("1", LookupError("a", 2), "FAILURE")
    for backend in (ours, plain):
        result = backend.get_task_meta("1", cache=False)["result"]
        assert (LookupError, ("a", 2)) == (type(result), result.args)


def test_error_text_is_bounded_and_survives_a_broken_str() -> None:
    """The stored text has a limit, and an exception that cannot print itself is still stored."""
    assert ERROR_TEXT_LIMIT == len(error_text(ValueError("x" * 100_000)))
    assert "Unprintable" in error_text(Unprintable())
    assert "\\ud800" == error_text(ValueError("\ud800"))
    ours, _ = backends()
    ours.store_result("1", Unprintable(), "FAILURE")
    assert "RuntimeError" in ours.get_task_meta("1", cache=False)["error_json"]["exc_text"]


@pytest.mark.parametrize(
    "stored",
    [
        {"exc_type": "system", "exc_module": "os", "exc_message": ["echo"]},
        {"exc_message": "no type"},
        "not a mapping",
    ],
)
def test_a_poisoned_failure_fails_its_reader_only(stored: Any) -> None:
    """An error that names no exception class is reported as a failure and runs nothing."""
    ours, _ = backends()
    ours.set(
        ours.get_key_for_task("1"), json.dumps({"task_id": "1", "status": "FAILURE", "result": stored, "children": []})
    )
    meta = ours.get_task_meta("1", cache=False)
    assert "FAILURE" == meta["status"]
    assert isinstance(meta["result"], Exception)
    assert stored == meta["result_json"]


def test_a_meta_can_be_opened_twice() -> None:
    """Celery calls ``meta_from_decoded`` again on metas that it has; nothing changes."""
    ours, _ = backends()
    ours.store_result("1", ValueError("a"), "FAILURE")
    meta = ours.get_task_meta("1", cache=False)
    again = ours.meta_from_decoded(dict(meta))
    assert meta == again


def test_other_serializers_go_celerys_way() -> None:
    """A serializer chosen at run time is honoured."""
    ours, _ = backends(result_serializer="msgpack", accept_content=["json", "msgpack"])
    ours.store_result("1", {"a": [1, None]}, "SUCCESS")
    meta = ours.get_task_meta("1", cache=False)
    assert {"a": [1, None]} == meta["result"] == meta["result_json"]


def test_pickles_are_never_loaded() -> None:
    """Neither a pickle in a JSON backend nor a backend set to pickle loads one."""
    ours, _ = backends()
    with pytest.raises(DecodeError):
        ours.decode(pickle.dumps({"a": 1}))
    ours, _ = backends(result_serializer="pickle", accept_content=["pickle", "json"])
    with pytest.raises(ContentDisallowed):
        ours.decode(pickle.dumps({"a": 1}))


def test_unaccepted_json_is_refused_as_in_plain_celery() -> None:
    """``result_accept_content`` keeps its meaning."""
    ours, _ = backends(result_accept_content=["msgpack"])
    with pytest.raises(ContentDisallowed):
        ours.decode(b"{}")


def test_compressed_results_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that says it is compressed is read, with typed values in it."""
    monkeypatch.setattr(Dictionary, "supports_result_compression", True)
    ours, _ = backends(result_compression="zlib")
    ours.store_result("1", [Decimal("2.5")] * 3, "SUCCESS")
    assert [Decimal("2.5")] * 3 == ours.get_task_meta("1", cache=False)["result"]


@pytest.mark.parametrize("method", ["application/x-gzip", "application/x-bz2", "application/x-lzma"])
def test_a_small_result_that_claims_to_be_hundreds_of_megabytes_is_refused(method: str) -> None:
    """It took gigabytes from whoever read it: the worker too, which looks at what is there before it stores."""
    ours, _ = backends()
    ours.app.max_payload_bytes = 1_000_000
    kind: Any = {"application/x-gzip": zlib, "application/x-bz2": bz2, "application/x-lzma": lzma}[method]
    bomb = b"\0celery-compressed\0" + method.encode() + b"\0" + kind.compress(b"0" * 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match=r"more than 17,777,216 bytes \(serialization\.max_payload_bytes\)"):
            ours.decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_refused_not_fatal() -> None:
    """A payload nested beyond the interpreter's depth is a decode error; a deep value is left as it is."""
    ours, _ = backends()
    with pytest.raises(DecodeError):
        ours.decode(b"[" * 200_000)
    deep: Any = []
    for _ in range(5_000):
        deep = [deep]
    assert deep is revive(deep)


def test_values_without_types_are_not_copied() -> None:
    """Walking a value that holds no typed values returns the value itself."""
    value = {"a": [1, {"b": 2}]}
    assert value is revive(value)

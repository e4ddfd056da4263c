"""What of a result is bound by its signature: the value, the task, the state; in whatever place it is kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbridge.serialization.keys import new_key, read_key
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_results import lock_result, unlock_result
from qbridge.serialization.refused import MessageRefused

SIGNING, CIPHER = read_key(new_key("sign")), read_key(new_key("hide"))
SIGNED, HIDDEN = Lock([SIGNING]), Lock([SIGNING], [CIPHER])
RESULT = {"result": {"total": "7.20", "__type__": "x"}, "traceback": "Traceback …", "children": None}


def stored(lock: Lock) -> Any:
    """As it comes back from a result backend."""
    return json.loads(json.dumps(lock_result(lock, "1", "SUCCESS", RESULT, json.dumps)))


@pytest.mark.parametrize("lock", [SIGNED, HIDDEN])
def test_what_was_locked_is_read_as_it_was(lock: Lock) -> None:
    """Value, traceback and children."""
    assert unlock_result(lock, "1", "SUCCESS", stored(lock)) == RESULT
    assert ("7.20" in json.dumps(stored(lock))) is (lock is SIGNED)


@pytest.mark.parametrize("lock", [SIGNED, HIDDEN])
@given(data=st.data())
def test_nothing_of_it_can_be_changed(lock: Lock, data: st.DataObject) -> None:
    """Nor given out as another task's, or as another state of the same."""
    value = stored(lock)
    field = data.draw(st.sampled_from(["task", "state", *value]))
    text = data.draw(st.text(max_size=30))
    task, state = (text if field == "task" else "1"), (text if field == "state" else "SUCCESS")
    if field in value:
        if text == value[field]:
            return
        value[field] = text
    elif text in ("1", "SUCCESS"):
        return
    with pytest.raises(MessageRefused) as caught:
        unlock_result(lock, task, state, value)
    assert caught.value.reason in ("bad_signature", "unsigned")


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, {"body": "{}"}, {"qbridge_signature": "x", "body": 5}])
def test_what_is_not_signed_is_refused(value: Any) -> None:
    """Unless keys are being rolled out."""
    with pytest.raises(MessageRefused):
        unlock_result(SIGNED, "1", "SUCCESS", value)
    if not isinstance(value, dict) or "qbridge_signature" not in value:
        assert unlock_result(Lock([SIGNING], required=False), "1", "SUCCESS", value) is None
        assert unlock_result(None, "1", "SUCCESS", value) is None


def test_who_has_no_keys_yet_reads_what_is_signed_and_not_what_is_encrypted() -> None:
    """So that keys can be rolled out to workers and callers in any order."""
    assert unlock_result(None, "1", "SUCCESS", stored(SIGNED)) == RESULT
    with pytest.raises(MessageRefused, match="no key"):
        unlock_result(None, "1", "SUCCESS", stored(HIDDEN))

"""Which JSON does a set of annotations take: the same words in every process, and nothing for people in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from qbridge.serialization.schema import Fields
from qbridge.serialization.wire_schema import KEYS, MARKS, canonical_text, plain

PROGRAM = """
import json
from qbridge import Bridge, BridgeConfig
from qbridge.testing.contract_app.tasks import declare
bridge = Bridge(BridgeConfig(broker="embedded:///nowhere/b.db", results="rpc://"))
declare(bridge)
print(json.dumps({name: task.fingerprint for name, task in bridge.tasks.items()}))
"""


class Leaf(BaseModel):
    """Said to people."""

    title: str = Field("a", description="Said to people.", examples=["b"])
    kind: Literal["b", "a"] = "a"


def schema_of(annotation: Any) -> Any:
    made = Fields("task one", {"value": annotation}).wire_schema()
    return {**made["properties"]["value"], **({"$defs": made["$defs"]} if "$defs" in made else {})}


def test_every_process_finds_the_same_fingerprints() -> None:
    """Whatever the order of its sets: those of the tasks with which contracts are tested, of all kinds of values."""
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0] == found[1]
    fingerprints = json.loads(found[0])
    assert len(fingerprints) > 20
    assert all(len(one) == 12 for one in fingerprints.values())


def test_what_is_for_people_is_left_out_and_fields_of_such_names_stay() -> None:
    """``title`` may be a field; the title of a field is nothing."""
    schema = schema_of(Leaf)
    assert schema["$defs"]["Leaf"]["properties"] == {
        "title": {"type": "string"},
        "kind": {"enum": ["b", "a"], "type": "string"},
    }
    assert "people" not in json.dumps(schema)
    assert plain({"const": {"title": "a"}, "title": "b"}) == {"const": {"title": "a"}}


def test_names_of_classes_and_orders_are_left_out_of_the_canonical_text() -> None:
    """Definitions are numbered as they are met."""
    schema = schema_of(list[Leaf])
    renamed = json.loads(json.dumps(schema).replace("Leaf", "Sheet").replace('"b", "a"', '"a", "b"'))
    assert canonical_text(schema) == canonical_text(renamed)
    assert "Leaf" not in canonical_text(schema)


def test_what_json_schema_has_no_word_for_is_a_mark() -> None:
    """Or a keyword of ours: the keys of a mapping."""
    assert schema_of(dict[int, str])[KEYS] == {"type": "integer"}
    assert KEYS not in schema_of(dict[str, str])
    assert schema_of(Annotated[float, Field(allow_inf_nan=False)]) == {"type": "number", MARKS: ["finite"]}
    assert schema_of(float) == {"type": "number"}

"""Which JSON does a set of annotations take? A JSON Schema that keeps quiet about nothing that decides.

pydantic's own is made for people and other tools. It leaves out what JSON Schema has no word for: functions that
validate, the types of a mapping's keys, whether infinities pass, limits of dates. Two schemas may be equal, and a value
fit only one of them. Here such things are marks, compared by name. Left out is what decides nothing: titles,
descriptions, defaults, examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

__all__ = ["FINITE", "KEYS", "MARKS", "WireSchema", "canonical_text", "plain"]

MARKS = "x-qbridge-marks"
"""Keyword: names of what JSON Schema cannot say about a value."""

KEYS = "x-qbridge-keys"
"""Keyword: the schema of a mapping's keys, where they are not any text."""

FINITE = "finite"
"""Mark: no infinities, no NaN."""

_HIDDEN = (
    "strict", "max_digits", "decimal_places", "tz_constraint", "now_op", "strip_whitespace",
    "to_lower", "to_upper", "coerce_numbers_to_str", "version", "allowed_schemes", "host_required", "regex_engine",
)  # fmt: skip
_LIMITS = ("ge", "gt", "le", "lt")
_TIMES = frozenset({"date", "datetime", "time", "timedelta"})
_CONFIG = (
    "strict", "extra_fields_behavior", "allow_inf_nan", "str_max_length", "str_min_length", "str_strip_whitespace",
    "str_to_lower", "str_to_upper", "coerce_numbers_to_str", "regex_engine", "from_attributes",
)  # fmt: skip
_FOR_PEOPLE = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
})  # fmt: skip
_NAMED = frozenset({"properties", "$defs", "patternProperties", "dependentSchemas"})


class WireSchema(GenerateJsonSchema):
    """pydantic's generator, which also says what else decides."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default", "skipped-discriminator"}  # noqa: RUF012

    def generate_inner(self, schema: Any) -> dict[str, Any]:
        """Return the schema of one node, with its marks."""
        return _marked(super().generate_inner(schema), _hidden(schema))

    def _common_dict_schema(self, schema: Any) -> dict[str, Any]:
        shown = super()._common_dict_schema(schema)
        keys = plain(self.generate_inner(schema["keys_schema"])) if "keys_schema" in schema else {}
        return shown if keys in ({}, {"type": "string"}) else {**shown, KEYS: keys}

    def model_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a model, with what its configuration decides."""
        return _marked(super().model_schema(schema), _configured(schema))

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a dataclass, likewise."""
        return _marked(super().dataclass_schema(schema), _configured(schema))

    def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a ``TypedDict``, likewise."""
        return _marked(super().typed_dict_schema(schema), _configured(schema))


def _marked(shown: dict[str, Any], marks: list[str]) -> dict[str, Any]:
    return {**shown, MARKS: sorted({*shown.get(MARKS, ()), *marks})} if marks else shown


def _hidden(schema: Mapping[str, Any]) -> list[str]:
    kind = str(schema.get("type"))
    marks = [f"{name}={schema[name]!r}" for name in _HIDDEN if schema.get(name) not in (None, False)]
    if kind in _TIMES:
        marks += [f"{name}={schema[name]}" for name in _LIMITS if schema.get(name) is not None]
    if (kind == "float" and schema.get("allow_inf_nan") is False) or (
        kind in ("decimal", "fraction", "complex") and not schema.get("allow_inf_nan")
    ):
        marks.append(FINITE)
    if kind.startswith("function-"):
        marks.append(_named(schema["function"]))
    if kind == "enum" and schema.get("missing") is not None:
        marks.append(_named({"function": schema["missing"]}))
    return marks


def _configured(schema: Mapping[str, Any]) -> list[str]:
    config = schema.get("config") or {}
    marks = [f"{name}={config[name]!r}" for name in _CONFIG if config.get(name) is not None]
    if schema.get("post_init") or schema.get("custom_init"):
        marks.append(f"made by {schema['cls'].__qualname__}")
    return marks


def _named(function: Any) -> str:
    target: Callable[..., Any] = function["function"] if isinstance(function, Mapping) else function
    # without the module, which is another one where a program runs as a script
    return str(getattr(target, "__qualname__", None) or type(target).__qualname__)


def plain(schema: Any) -> Any:
    """Return a schema without what is for people."""
    if isinstance(schema, list):
        return [plain(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("const", "enum"):
            kept[name] = value
        elif name in _NAMED and isinstance(value, dict):
            kept[name] = {key: plain(part) for key, part in value.items()}
        elif name not in _FOR_PEOPLE:
            kept[name] = plain(value)
    if isinstance(kept.get("required"), list):
        kept["required"] = sorted(kept["required"])
    return kept


def canonical_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as one text that does not depend on the names of classes, nor on any order.

    Args:
        schema: a plain one; its definitions are numbered as they are met.
    """
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    numbers: dict[str, str] = {}
    waiting: list[str] = []

    def renamed(part: Any) -> Any:
        if isinstance(part, list):
            return [renamed(one) for one in part]
        if not isinstance(part, dict):
            return part
        found: dict[str, Any] = {}
        for name in sorted(part):
            value = part[name]
            if name == "$ref" and isinstance(value, str):
                if value not in numbers:
                    numbers[value] = f"#{len(numbers)}"
                    waiting.append(value)
                found[name] = numbers[value]
            elif name == "discriminator":
                found[name] = value.get("propertyName") if isinstance(value, dict) else value
            elif name == "enum":
                found[name] = sorted(value, key=json.dumps)
            elif name == "const":
                found[name] = value
            elif name in _NAMED and isinstance(value, dict):
                found[name] = {key: renamed(one) for key, one in value.items()}
            else:
                found[name] = renamed(value)
        return found

    answer: list[Any] = [renamed({name: part for name, part in schema.items() if name != "$defs"})]
    while waiting:
        reference = waiting.pop(0)
        answer.append([numbers[reference], renamed(definitions.get(reference.removeprefix("#/$defs/"), {}))])
    return json.dumps(answer, sort_keys=True, separators=(",", ":"))

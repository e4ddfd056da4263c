"""How one set of annotations becomes a validator and a serializer, and which annotations cannot cross the wire.

One pydantic model per set (all parameters of a task, or its return value) is compiled once, at definition.
Its core schema is adjusted before it is compiled: ``bytes`` travel as base64 in nested models too, unless a model
says otherwise, because pydantic's default (UTF-8) fails on any other bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import CoreConfig, SchemaSerializer, SchemaValidator, to_json

from qbridge.exceptions import ConfigurationError
from qbridge.serialization.typed_dicts import readable
from qbridge.serialization.wire_schema import MARKS, WireSchema, plain

__all__ = ["Fields", "wire_json"]

_CONFIG = ConfigDict(
    ser_json_bytes="base64",
    val_json_bytes="base64",
    ser_json_timedelta="iso8601",
    ser_json_inf_nan="constants",
    hide_input_in_errors=True,
    arbitrary_types_allowed=False,
    # the names are ours (f0, f1 …); a parameter called "model" or "schema" must not clash with pydantic's own
    protected_namespaces=(),
)

# JSON objects have text keys only; these types have one text form that pydantic reads back as the same value.
_KEY_TYPES = frozenset(
    {"any", "bool", "bytes", "date", "datetime", "decimal", "float", "int", "str", "time", "timedelta", "uuid", "url"}
)
# What is known to cross is not compiled to find out: that would be most of the time that declaring a task takes.
_CROSS = (str, int, float, bool, bytes, None, type(None), Any)
# Values of exactly these types are what they are declared as, and their own JSON form.
_PLAIN: Mapping[Any, type] = {str: str, int: int, float: float, bool: bool, None: type(None), type(None): type(None)}
_OPAQUE_KEYS = frozenset({"default", "expected", "metadata", "cls", "members"})


def wire_json(value: Any) -> bytes:
    """Return ``value``, made of JSON types, as JSON bytes; infinities and NaN stay what they are."""
    return to_json(value, inf_nan_mode="constants")


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield each schema node of a pydantic core schema; values that belong to the user are not entered."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for key, value in schema.items():
            if key not in _OPAQUE_KEYS:
                yield from _walk(value)
    elif isinstance(schema, list | tuple):
        for item in schema:
            yield from _walk(item)


def _with_base64(schema: Any) -> Any:
    """Return a copy of a core schema in which nested models read and write ``bytes`` as base64."""
    if isinstance(schema, dict):
        copy = {key: value if key in _OPAQUE_KEYS else _with_base64(value) for key, value in schema.items()}
        if schema.get("type") == "model":
            config = dict(schema.get("config") or {})
            config.setdefault("ser_json_bytes", "base64")
            config.setdefault("val_json_bytes", "base64")
            copy["config"] = config
        return copy
    if isinstance(schema, list):
        return [_with_base64(item) for item in schema]
    if isinstance(schema, tuple):
        return tuple(_with_base64(item) for item in schema)
    return schema


def _resolve(schema: Any, definitions: Mapping[str, Any]) -> Any:
    while isinstance(schema, dict) and schema.get("type") in ("definition-ref", "default"):
        schema = definitions.get(schema["schema_ref"]) if schema["type"] == "definition-ref" else schema["schema"]
    return schema


def _is_text_key(schema: Any, definitions: Mapping[str, Any]) -> bool:
    schema = _resolve(schema, definitions)
    if not isinstance(schema, dict):
        return True
    kind = schema.get("type")
    if kind == "literal":
        return all(isinstance(value, str) and not hasattr(value, "value") for value in schema.get("expected", ()))
    if kind == "enum":
        return all(isinstance(member.value, str) for member in schema.get("members", ()))
    if kind == "nullable":
        return False
    if kind == "union":
        choices = [choice[0] if isinstance(choice, tuple) else choice for choice in schema.get("choices", ())]
        return all(_is_text_key(choice, definitions) for choice in choices)
    # Nodes that wrap another (functions, constraints) are judged by what they hold; others by their name.
    inner = schema.get("schema") or schema.get("json_schema")
    if kind not in _KEY_TYPES and inner is not None:
        return _is_text_key(inner, definitions)
    return kind in _KEY_TYPES


def _fault(schema: Any) -> str | None:
    """Return why a value of this core schema cannot cross the wire and come back the same, or None."""
    definitions = {node["ref"]: node for node in _walk(schema) if "ref" in node}
    for node in _walk(schema):
        kind = node["type"]
        if kind == "generator":
            return "it is consumed while it is read; write list[...] or Sequence[...] instead"
        if kind == "callable":
            return "a function cannot be sent; send the data it needs, or the name of a task"
        if kind == "is-subclass":
            return "a class has no JSON form; send its name, or use a model, a dataclass or plain data"
        if kind == "dict" and not _is_text_key(node.get("keys_schema"), definitions):
            return "a JSON object has text keys only; use keys such as str, int, UUID or date, or a list of pairs"
        if node.get("serialization_exclude"):
            return "one of its fields is declared exclude=True and would be lost on the way"
        serialization = node.get("serialization")
        if isinstance(serialization, dict) and "_secret" in getattr(serialization.get("function"), "__name__", ""):
            return "a secret is sent as asterisks; pass a reference to it, or a plain str where that is safe"
    return None


class _Base(BaseModel):
    model_config = _CONFIG


class Fields:
    """Validator and serializer for a fixed set of named, annotated values.

    Args:
        owner: what they belong to, for messages: ``"task shop.add"``.
        annotations: name to annotation, in order.
        optional: names that may be absent.

    Raises:
        ConfigurationError: if an annotation cannot cross the wire; names it and the way out.
    """

    def __init__(self, owner: str, annotations: Mapping[str, Any], optional: frozenset[str] = frozenset()) -> None:
        annotations = {name: readable(annotation) for name, annotation in annotations.items()}
        self.names: tuple[str, ...] = tuple(annotations)
        annotations = {name: readable(annotation) for name, annotation in annotations.items()}
        self._keys = {name: f"f{index}" for index, name in enumerate(self.names)}
        self._names = {key: name for name, key in self._keys.items()}
        for name, annotation in annotations.items():
            _refuse_what_cannot_cross(owner, name, annotation)
        self._plain = {
            name: _PLAIN[annotation]
            for name, annotation in annotations.items()
            if isinstance(annotation, type | None) and annotation in _PLAIN
        }
        self._required = frozenset(annotations) - optional
        definitions: dict[str, Any] = {
            self._keys[name]: (annotation, None if name in optional else ...)
            for name, annotation in annotations.items()
        }
        self._model: type[BaseModel] = create_model("Values", __base__=_Base, **definitions)
        schema = _with_base64(self._model.__pydantic_core_schema__)
        # _use_prebuilt=False: without it pydantic-core takes a nested model's own, already compiled serializer
        self._validator = SchemaValidator(schema, _use_prebuilt=False)
        # The model's configuration does not reach values under Any, whose infinities and NaN would become null.
        self._serializer = SchemaSerializer(schema, CoreConfig(ser_json_inf_nan="constants"), _use_prebuilt=False)
        self.ambiguous: bool = any(
            node["type"] == "union" and len(node.get("choices", ())) > 1 for node in _walk(schema)
        )
        """True if a union may read a value back as another of its members; such values are compared when sent."""

    def check(self, values: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
        """Validate Python values; absent optional ones stay absent.

        Raises:
            ValidationError: pydantic's; :meth:`faults` turns it into our own words.
        """
        return self._named(self._validated(values, strict))

    def encode(self, values: Mapping[str, Any], *, strict: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Validate Python values and turn them into JSON types.

        Returns:
            ``(checked, dumped)``: the values as validated, and as JSON types.

        Raises:
            ValidationError: pydantic's.
            PydanticSerializationError, ValueError: if a value has no JSON form after all.
        """
        if self._are_plain(values):
            return dict(values), dict(values)
        model = self._validated(values, strict)
        present = None if len(values) == len(self.names) else {self._keys[name] for name in values}
        # round_trip leaves computed fields out: a model that forbids extra fields could not read them back
        dumped = self._serializer.to_python(
            model, mode="json", by_alias=False, round_trip=True, warnings="error", include=present
        )
        return self._named(model), {self._names[key]: value for key, value in dumped.items()}

    def _are_plain(self, values: Mapping[str, Any]) -> bool:
        """Tell whether there is nothing to validate: most calls are a few numbers and texts, of the declared types."""
        for name, value in values.items():
            kind = type(value)  # a proxy says another __class__
            # other text may have half of a surrogate pair, which is not Unicode
            if self._plain.get(name) is not kind or (kind is str and not value.isascii()):
                return False
        return self._required <= values.keys()

    def _validated(self, values: Mapping[str, Any], strict: bool) -> Any:
        keyed = {self._keys[name]: value for name, value in values.items()}
        return self._validator.validate_python(keyed, strict=strict, by_alias=True, by_name=True)

    def read(self, values: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
        """Validate values that came as JSON, by JSON's rules (text for dates, lists for tuples and sets …).

        Raises:
            ValidationError: pydantic's.
        """
        if self._are_plain(values):
            return dict(values)
        data = wire_json({self._keys[name]: value for name, value in values.items()})
        return self._named(self._validator.validate_json(data, strict=strict, by_alias=True, by_name=True))

    def faults(self, error: ValidationError) -> list[dict[str, Any]]:
        """Return pydantic's errors with our parameter names as first part of ``loc`` and without any input."""
        found = []
        for fault in error.errors(include_url=False, include_input=False, include_context=False):
            first, *rest = fault["loc"] or ("",)
            found.append(
                {"loc": [self._names.get(str(first), first), *rest], "msg": fault["msg"], "type": fault["type"]}
            )
        return found

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the values, under their own names."""
        schema = self._model.model_json_schema(by_alias=False)
        properties = {self._names[key]: part for key, part in schema.pop("properties", {}).items()}
        for name, part in properties.items():
            part["title"] = name
            part.pop("default", None)
        required = [self._names[key] for key in schema.pop("required", [])]
        return {**schema, "properties": properties, "required": required, "additionalProperties": False}

    def wire_schema(self) -> dict[str, Any]:
        """Return a JSON Schema of the same that leaves out nothing that decides, and nothing else."""
        schema = plain(self._model.model_json_schema(by_alias=False, schema_generator=WireSchema))
        properties = {self._names[key]: part for key, part in schema.pop("properties", {}).items()}
        required = sorted(self._names[key] for key in schema.pop("required", []))
        schema.pop(MARKS, None)
        return {**schema, "properties": properties, "required": required, "additionalProperties": False}

    def _named(self, model: Any) -> dict[str, Any]:
        values = model.__dict__
        return {self._names[key]: values[key] for key in self._keys.values() if key in model.__pydantic_fields_set__}


def _refuse_what_cannot_cross(owner: str, name: str, annotation: Any) -> None:
    """Compile one annotation alone, so that the message can name it."""
    if any(annotation is kind for kind in _CROSS):
        return
    shown = "the return value" if name == "return" else f"parameter {name!r}"
    try:
        model = create_model("Value", __base__=_Base, value=(annotation, ...))
        reason = _fault(model.__pydantic_core_schema__)
        if reason is None:
            model.model_json_schema(mode="validation")
            model.model_json_schema(mode="serialization")
    except (PydanticUserError, TypeError, AttributeError) as error:
        # the rest of pydantic's sentence recommends arbitrary_types_allowed, which would not help here
        said = str(error).splitlines()[0].split(". Set `arbitrary_types_allowed")[0]
        reason = f"{said}; use a model, a dataclass or plain data"
    if reason is not None:
        text = getattr(annotation, "__qualname__", None) if isinstance(annotation, type) else None
        raise ConfigurationError(
            f"{owner}: {shown} is annotated {text or annotation!r}, which cannot cross the wire: {reason}"
        )

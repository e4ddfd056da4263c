"""What breaks between a snapshot and the code of now: parameters, types, versions, results; and what does not."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from qbridge import ArgumentsError, ConfigurationError, Item, TaskSet
from qbridge.serialization.signature import Signature
from qbridge.snapshots import Change, call_differences, changes_since, read_snapshot, snapshot_of, snapshot_text
from qbridge.task import Task


class Size(BaseModel):
    width: int


class WideSize(BaseModel):
    width: int | None
    unit: str = "mm"


def task_of(function: Callable[..., Any], **options: Any) -> Task[..., Any]:
    return TaskSet().task(**{"name": "shop.paint", **options})(function)


def compared(old: Task[..., Any], new: Task[..., Any]) -> list[Change]:
    """Through the text of the file, as it is done."""
    return changes_since(read_snapshot(snapshot_text(snapshot_of([old])), "f.json"), [new])


def broken(old: Callable[..., Any], new: Callable[..., Any], **options: Any) -> list[str]:
    found = compared(task_of(old), task_of(new, **options))
    return [f"{change.place} {change.what}".strip() for change in found if change.breaks]


def paint(size: int, colour: str = "red") -> str:
    return colour


def test_the_text_of_a_snapshot_is_the_same_whatever_the_order() -> None:
    """And it ends with a line break, and says nothing about tasks of other code bases."""
    tasks = TaskSet()
    first, second = tasks.task(name="a")(paint), tasks.task(name="b")(paint)

    @tasks.remote(name="elsewhere")
    def elsewhere(number: int) -> int: ...  # type: ignore[empty-body]

    text = snapshot_text(snapshot_of([first, second, elsewhere]))
    assert text == snapshot_text(snapshot_of([second, first]))
    assert text.endswith("}\n")
    assert set(json.loads(text)["tasks"]) == {"a", "b"}
    assert changes_since(json.loads(text), [first, second]) == []


def test_what_old_callers_can_still_do_is_no_break() -> None:
    """A parameter with a default, a wider type, a field with a default, names for positions, anything by name."""

    def more(size: int, colour: str = "blue", gloss: bool = False) -> str: ...  # type: ignore[empty-body]
    def wider(size: float | None, colour: str | None = None) -> str: ...  # type: ignore[empty-body]
    def open_to_all(size: int, colour: str = "red", *more: int, **others: str) -> str: ...  # type: ignore[empty-body]
    def of_size(size: Size) -> str: ...  # type: ignore[empty-body]
    def of_wide_size(size: WideSize) -> str: ...  # type: ignore[empty-body]
    def variable(*sizes: int, **colours: int) -> None: ...
    def wide_variable(*lengths: int | None, **names: float) -> None: ...

    assert broken(paint, paint) == broken(paint, more) == broken(paint, wider) == broken(paint, open_to_all) == []
    assert broken(of_size, of_wide_size) == broken(variable, wide_variable) == []
    [change] = compared(task_of(paint), task_of(more))
    assert (change.place, change.verdict) == ("arguments", "compatible")


def test_what_old_callers_cannot_do_any_more_is_a_break() -> None:
    """Each with its place."""

    def renamed(length: int, colour: str = "red") -> str: ...  # type: ignore[empty-body]
    def reordered(colour: str = "red", size: int = 1) -> str: ...  # type: ignore[empty-body]
    def by_name(size: int, *, colour: str = "red") -> str: ...  # type: ignore[empty-body]
    def by_position(size: int, colour: str = "red", /) -> str: ...  # type: ignore[empty-body]
    def required(size: int, colour: str) -> str: ...  # type: ignore[empty-body]
    def further(size: int, gloss: bool, colour: str = "red") -> str: ...  # type: ignore[empty-body]
    def narrower(size: bool, colour: str = "red") -> str: ...  # type: ignore[empty-body]
    def other_result(size: int, colour: str = "red") -> str | None: ...

    assert broken(paint, renamed) == ["size is gone, or has another name", "length is new and has no default"]
    assert broken(paint, reordered) == ["arguments positional parameters are in another order, or have to be named"]
    assert broken(paint, by_name) == broken(paint, reordered)
    assert broken(paint, by_position) == [
        "size has to be given by position now", "colour has to be given by position now",
    ]  # fmt: skip
    assert broken(paint, required) == ["colour has to be given now"]
    assert len(broken(paint, further)) == 2
    assert broken(paint, narrower) == ["size was integer, is boolean"]
    assert broken(paint, other_result) == ["result old callers cannot read it (for them it was null, is string)"]


def test_what_models_variable_parameters_and_coercion_do_not_take_any_more_is_a_break() -> None:
    """Each with its place."""

    def of_size(size: Size) -> str: ...  # type: ignore[empty-body]
    def of_wide_size(size: WideSize) -> str: ...  # type: ignore[empty-body]
    def variable(*sizes: int, **colours: int) -> None: ...
    def named(size: int = 1, *sizes: int, gloss: int = 1, **colours: int) -> None: ...

    assert broken(of_wide_size, of_size) == ["size.width was null, is integer"]
    assert broken(variable, named) == [
        "sizes what was given there has no place now, or another one",
        "size may have been one of **colours before, of another type",
        "gloss may have been one of **colours before, of another type",
    ]
    assert broken(variable, paint)[0].startswith("size is new")
    found = compared(task_of(paint, strict=False), task_of(paint))
    assert [(change.place, change.verdict) for change in found] == [("arguments", "cannot tell")]


def test_an_upcaster_mends_a_break_if_it_takes_the_calls_of_then() -> None:
    """And a version alone does not."""

    def rectangle(width: int, height: int) -> str: ...  # type: ignore[empty-body]

    def upcast(new: Task[..., Any], size: Any) -> None:
        def paint_square(size: Any, colour: str = "red") -> Item:
            return new.item(size, size)

        paint_square.__annotations__["size"] = size
        new.upcast(1)(paint_square)

    raised = compared(task_of(paint), task_of(rectangle, version=2))
    assert {"Set version=2, and write @rectangle.upcast(1) with the arguments of before."} == {
        change.todo for change in raised if change.breaks
    }
    mended, misread = task_of(rectangle, version=2), task_of(rectangle, version=2)
    upcast(mended, int)
    upcast(misread, bool)
    assert [change.verdict for change in compared(task_of(paint), mended)] == ["compatible"] * 2
    [change] = [change for change in compared(task_of(paint), misread) if change.breaks]
    assert change.place == "the upcaster for version 1, size"
    [change] = compared(task_of(paint, version=3), task_of(paint, version=2))
    assert (change.place, change.breaks, change.todo) == ("version", True, "Set version=3 or more.")


def test_a_version_that_was_raised_without_an_upcaster_cannot_be_judged() -> None:
    """Cents for euros: the calls of before fit, are run as they are, and mean something else."""

    def more(size: int, colour: str = "red", gloss: bool = False) -> str: ...  # type: ignore[empty-body]

    for function in (paint, more):
        change = compared(task_of(paint), task_of(function, version=2))[0]
        assert (change.place, change.verdict) == ("version", "cannot tell")
        assert change.what.startswith("1 → 2, without an upcaster")
        assert change.todo.startswith(f"Write @{function.__name__}.upcast(1)")


def test_a_task_that_is_gone_breaks_and_a_new_one_does_not() -> None:
    """Remote ones are somebody else's: declared remote from now on, it has gone."""
    old = task_of(paint)
    there = snapshot_of([old])
    [gone] = changes_since(there, [])
    assert (gone.task, gone.breaks) == ("shop.paint", True)
    [new] = changes_since(snapshot_of([]), [old])
    assert (new.what, new.breaks) == ("is new", False)
    remote = TaskSet().remote(name="shop.paint")(paint)
    assert changes_since(there, [remote]) == [gone]


def test_another_pydantic_is_said_where_it_may_matter() -> None:
    """Its schemas may be written in another way."""
    there = {**snapshot_of([task_of(paint, strict=False)]), "pydantic": "2.1"}
    assert "made with pydantic 2.1" in changes_since(there, [task_of(paint)])[-1].what
    assert len(changes_since(there, [task_of(paint, strict=False)])) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"form": 2, "tasks": {}}', '{"form": 1}', '{"form":1,"tasks":{"a":{}}}'])
def test_a_file_that_is_no_snapshot_is_refused(text: str) -> None:
    """By name, with the command that makes one."""
    with pytest.raises(ConfigurationError, match=r"f\.json.*qbridge schema snapshot"):
        read_snapshot(text, "f.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (None, 5),
        ("version", "1"),
        ("version", True),
        ("fingerprint", None),
        ("parameters", [["size"]]),
        ("parameters", [1]),
        ("parameters", [["other", "keyword_only"]]),
        ("strict", 1),
        ("arguments", []),
        ("arguments", {"properties": 5}),
        ("result", "x"),
    ],
)
def test_a_damaged_snapshot_is_refused(field: str | None, value: Any) -> None:
    """Whatever is in it, the message names the file and the task."""
    there: Any = json.loads(snapshot_text(snapshot_of([task_of(paint)])))
    if field is None:
        there["tasks"]["shop.paint"] = value
    else:
        there["tasks"]["shop.paint"][field] = value
    with pytest.raises(ConfigurationError, match=r"f\.json: the task shop\.paint .*qbridge schema snapshot"):
        read_snapshot(json.dumps(there), "f.json")


BY_POSITION, EITHER, MANY, BY_NAME, NAMES = list(inspect._ParameterKind)

Shape = list[tuple[str, inspect._ParameterKind, Any, bool]]
"""Of each parameter: name, kind, annotation, whether it has a default."""


def made(shape: Shape) -> Signature:
    """The signature of a function with such parameters; defaults come last, as Python wants them."""
    ordered = sorted(shape, key=lambda one: (one[1], one[3] and one[1] != BY_NAME))
    defaults = False
    parameters = []
    for name, kind, annotation, default in ordered:
        defaults = kind not in (MANY, NAMES) and (default or (defaults and kind in (BY_POSITION, EITHER)))
        value = None if defaults else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, kind, annotation=annotation, default=value))

    def function(*args: Any, **kwargs: Any) -> None: ...

    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return Signature(function, "one")


ANNOTATIONS = st.sampled_from([int, str, int | None, int | str | None])
KINDS = st.sampled_from([BY_POSITION, EITHER, EITHER, BY_NAME])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A few parameters of any kind."""
    names = draw(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3))
    shape = [(name, draw(KINDS), draw(ANNOTATIONS), draw(st.booleans())) for name in names]
    for name, kind in (("more", MANY), ("others", NAMES)):
        if draw(st.booleans()):
            shape.append((name, kind, draw(ANNOTATIONS), False))
    return shape


@st.composite
def changed(draw: st.DrawFn) -> tuple[Signature, Signature]:
    """A signature, and what became of it in a step or two."""
    old = draw(shapes())
    new = list(old)
    for _ in range(draw(st.integers(0, 2))):
        step = draw(st.sampled_from(["add", "widen", "default", "kind", "remove"]))
        if step == "add" or not new:
            new += [one for one in draw(shapes()) if one[0] not in [other[0] for other in new]]
            continue
        index = draw(st.integers(0, len(new) - 1))
        name, kind, annotation, default = new.pop(index)
        if step == "widen":
            new.insert(index, (name, kind, annotation | None, default))
        elif step == "default":
            new.insert(index, (name, kind, annotation, True))
        elif step == "kind":
            new.insert(index, (name, kind if kind in (MANY, NAMES) else draw(KINDS), annotation, default))
    return made(old), made(new)


@settings(max_examples=100, deadline=None)
@given(pair=changed(), data=st.data())
def test_where_nothing_breaks_every_old_call_is_taken_and_means_the_same(
    pair: tuple[Signature, Signature], data: st.DataObject
) -> None:
    """For pairs of signatures of all kinds of parameters, and calls by position and by name."""
    old, new = pair
    if call_differences(old.wire_schema(), new.wire_schema()):
        return
    for args, kwargs in _some_calls(data):
        try:
            call = old.encode_call(args, kwargs)
        except ArgumentsError:
            continue
        new.decode_call(*call)
        was, now = old._bind(*call), new._bind(*call)
        for name, value in was.items():
            if name not in ("more", "others"):
                assert now[name] == value


def _some_calls(data: st.DataObject) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    value = st.sampled_from([1, None, "x"])
    for _ in range(5):
        args = data.draw(st.lists(value, max_size=4))
        yield tuple(args), data.draw(st.dictionaries(st.sampled_from("abcd"), value, max_size=3))

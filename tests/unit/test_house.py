"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import Backend

import qbridge
from qbridge import exceptions

TESTS = Path(__file__).parents[1]
PACKAGE = Path(qbridge.__file__).parent
EXAMPLES = TESTS.parent / "examples"
PUBLIC = sorted(name for name in qbridge.__all__ if not name.startswith("_"))
LONGEST = 400


def python_files() -> Iterator[Path]:
    for folder in (PACKAGE, TESTS, EXAMPLES):
        yield from (path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts)


# Files.


def test_no_file_is_long_without_a_reason() -> None:
    """A file of more than 400 lines says why: ``# long because: …``."""
    long = {
        str(path): length
        for path in python_files()
        if (length := len((text := path.read_text()).splitlines())) > LONGEST and "# long because: " not in text
    }
    assert {} == long


def test_every_module_says_what_it_answers() -> None:
    """The first thing in a file is its docstring."""
    silent = [str(path) for path in python_files() if path.stat().st_size and not ast.get_docstring(_tree(path))]
    assert [] == silent


def test_every_test_says_what_it_proves() -> None:
    """The docstring of a test is a sentence about behaviour."""
    silent = [
        f"{path.relative_to(TESTS)}:{node.lineno} {node.name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert [] == silent


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


# Public names.


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name: str) -> None:
    """A public name has a docstring, and so have the public methods and properties that it brings."""
    thing = getattr(qbridge, name)
    assert thing.__doc__, name
    if not inspect.isclass(thing):
        return
    undocumented = [
        attribute
        for attribute, value in inspect.getmembers(thing)
        if not attribute.startswith("_")
        and (inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, property))
        and _is_ours(value)
        and not inspect.getdoc(value)
        and not any(inspect.getdoc(getattr(base, attribute, None)) for base in thing.__mro__[1:])
    ]
    assert [] == undocumented


def _is_ours(value: Any) -> bool:
    function = value.fget if isinstance(value, property) else value
    return str(getattr(function, "__module__", "")).startswith("qbridge")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_line_in_the_typing_test(name: str) -> None:
    """What users import is checked by mypy and pyright in tests/typing/api.py."""
    assert re.search(rf"\b{name}\b", (TESTS / "typing" / "api.py").read_text())


INNER = {
    # what a Task asks of its bridge
    "Bridge": {"asend_call", "check_options", "check_queue", "queue_of", "send_all", "send_call"},
    "Task": {"bind_to", "definition"},  # what a bridge asks of its tasks
    "Retry": {"asked_wait", "bounded", "covers", "longest", "next_wait", "wait"},  # what a worker asks of the policy
    "BridgeConfig": {
        "all_queues",
        "broker_is_default",
        "model_post_init",
        "model_validate",
        "settings_customise_sources",
    },
    "Report": {"of"},
}  # fmt: skip
"""Members that are public between our own modules, and not what users call."""


@pytest.mark.parametrize(
    "name",
    [
        "Bridge",
        "BridgeConfig",
        "DeadLetters",
        "Progress",
        "Report",
        "Retry",
        "Task",
        "TaskContext",
        "TaskResult",
        "TaskSet",
    ],
)
def test_every_member_that_users_call_has_a_line_in_the_typing_test(name: str) -> None:
    """Methods and properties of what users hold, the async twins included."""
    text = (TESTS / "typing" / "api.py").read_text()
    members = {
        attribute
        for kind in getattr(qbridge, name).__mro__
        if kind.__module__.startswith("qbridge")
        for attribute, value in vars(kind).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
    }
    assert [] == sorted(one for one in members - INNER.get(name, set()) if not re.search(rf"\.{one}\b", text))


def test_every_error_is_a_public_name() -> None:
    """What can be raised can be caught: each error is importable from qbridge."""
    assert [] == sorted(set(exceptions.__all__) - set(qbridge.__all__))


# Imports.


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``statement``."""
    program = f"import sys; before = set(sys.modules); {statement}; print('\\n'.join(set(sys.modules) - before))"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    "module",
    ["sqlalchemy", "redis", "psycopg", "pymysql", "click", "rich", "amqp", "pytest", "qbridge.cli", "qbridge.testing",
     "qbridge.contrib", "qbridge.pytest_plugin"],
)  # fmt: skip
def test_importing_qbridge_loads_nothing_that_is_not_used(module: str) -> None:
    """``import qbridge`` is cheap: no driver, no command line, no test kit."""
    loaded = loaded_by("import qbridge")
    assert [] == sorted(name for name in loaded if name == module or name.startswith(f"{module}."))


def test_the_pytest_plugin_costs_its_users_nothing() -> None:
    """Every project that has qbridge installed loads the plugin with pytest: it brings itself and the package only."""
    loaded = loaded_by("import pytest; before |= set(sys.modules); import qbridge.pytest_plugin")
    assert {"qbridge", "qbridge.pytest_plugin"} == {name for name in loaded if name.startswith("qbridge")}
    assert not loaded & {"celery", "kombu", "pydantic", "sqlalchemy", "redis"}


# Errors.


def example(kind: type[exceptions.QBridgeError]) -> exceptions.QBridgeError:
    """An error with every field set."""
    values: dict[str, Any] = {
        "str": "text",
        "bool": True,
        "Sequence[str]": ["a", "b"],
        "Sequence[Mapping[str, Any]]": [{"loc": ["x", 1], "msg": "wrong", "type": "int_type"}],
    }
    parameters = inspect.signature(kind).parameters.values()
    return kind(*(values[one.annotation] for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD))


ERRORS = [getattr(exceptions, name) for name in sorted(exceptions.__all__)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickle(kind: type[exceptions.QBridgeError]) -> None:
    """Across a pickle an error keeps its type, fields and text."""
    error = example(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(error) is type(again)
    assert vars(error) == vars(again)
    assert str(error) == str(again) != ""


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_the_json_result_path(kind: type[exceptions.QBridgeError]) -> None:
    """Stored as a failed result by Celery and read again, an error keeps its type, fields and text."""
    with Celery(set_as_current=False, broker="memory://") as app:
        backend = Backend(app)
        error = example(kind)
        stored = json.loads(json.dumps(backend.prepare_exception(error, "json")))
        again = backend.exception_to_python(stored)
    assert type(error) is type(again)
    assert vars(error) == vars(again)
    assert str(error) == str(again)


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not exceptions.TaskFailed])
def test_errors_say_what_and_what_to_do(kind: type[exceptions.QBridgeError]) -> None:
    """The text is what happened and what to do next, for those errors too that are OSErrors."""
    assert "the broker is away. Start it." == str(kind("the broker is away", "Start it."))
    assert "the broker is away" == str(kind("the broker is away"))


def test_every_public_name_has_a_home_and_every_home_is_public() -> None:
    """The two lists of the front door are one."""
    assert {*qbridge._HOMES, "__version__"} == set(qbridge.__all__)
    assert all(getattr(qbridge, name) is not None for name in qbridge.__all__)

"""From ``-A proj.tasks:bridge`` to a bridge: which module, which object, and what to say when it is not there."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import click

from qbridge.bridge import Bridge
from qbridge.cli.complaints import CannotStart
from qbridge.exceptions import ConfigurationError

__all__ = ["app_option", "give_app_to", "import_task_modules", "load_bridge", "load_with_tasks"]

Command = TypeVar("Command", bound=Callable[..., Any])

_DEFAULT_NAME = "bridge"


def app_option(*, required: bool = True) -> Callable[[Command], Command]:
    """Return the decorator for ``-A``.

    Args:
        required: False where a command can do something useful without.
    """
    return click.option(
        "-A", "--app", required=required, metavar="MODULE[:BRIDGE]",
        help="Where the bridge is: proj.tasks:bridge; without a name, `bridge` or the module's only Bridge.",
    )  # fmt: skip


def load_bridge(where: str) -> Bridge:
    """Import the module and return its bridge; the working directory is looked in first, as Celery does.

    Args:
        where: ``"proj.tasks:bridge"`` or ``"proj.tasks"``.

    Raises:
        CannotStart: if there is no such module or object, or if importing it fails.
        ConfigurationError: if a configuration in it cannot work.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    name, _, attribute = where.partition(":")
    if name.endswith(".py") or "/" in name:
        raise CannotStart(
            f"{where} is a file's name", f"Name the module: -A {_module_of(name)}:{_DEFAULT_NAME}",
        )  # fmt: skip
    if not all(name.split(".")):
        raise CannotStart(f"{where!r} names no module", f"Write its full name: -A proj.tasks:{_DEFAULT_NAME}")
    module = _importing(name, partial(importlib.import_module, name))
    found = _named(module, attribute) if attribute else _only(module)
    if not isinstance(found, Bridge):
        todo = "Name the Bridge itself."
        if type(found).__name__ == "BridgeCelery":
            todo = "That is the Celery app of a bridge, for `celery -A`: name the Bridge itself."
        raise CannotStart(
            f"{where} is a {type(found).__name__}, not a Bridge",
            todo,
        )
    return found


def import_task_modules(bridge: Bridge) -> None:
    """Import what ``modules`` of the configuration names, so that all tasks are known.

    Args:
        bridge: a loaded one.

    Raises:
        CannotStart: if a module is missing or fails.
    """
    for name in bridge.config.modules:
        _importing(name, partial(importlib.import_module, name))
    _importing("the task modules", bridge.celery.loader.import_default_modules)
    bridge.celery.finalize()


def load_with_tasks(where: str) -> Bridge:
    """Return the bridge with all its tasks; raises as :func:`load_bridge` and :func:`import_task_modules`.

    Args:
        where: as of ``load_bridge``.
    """
    bridge = load_bridge(where)
    import_task_modules(bridge)
    return bridge


def give_app_to(context: click.Context, app: str | None, *commands: str) -> None:
    """Let a group's ``-A`` be that of its commands.

    Args:
        context: of the group.
        app: as it was given to the group; None: it was not.
        commands: their names.
    """
    if app is not None:
        context.default_map = {name: {"app": app} for name in commands}


def _importing(name: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except ConfigurationError as error:
        error.what = f"{_users_line(error.__traceback__)}{error.what}"
        raise error.with_traceback(None) from None
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise CannotStart(
                f"there is no module {error.name!r}",
                _near_modules(name),
            ) from None
        raise _failed(name, error) from None
    except SystemExit as error:
        raise _failed(name, error, f"importing {name} ended with {error!r}") from None
    except Exception as error:  # noqa: BLE001 - whatever a module does while it is imported
        raise _failed(name, error) from None


def _failed(name: str, error: BaseException, what: str = "") -> CannotStart:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _machinery(frame.filename)]
    said = traceback.format_exception_only(error)
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames), *said]
    return CannotStart(
        what or f"importing {name} failed: {said[-1].strip()}",
        f"It happened in {frames[-1].filename}, line {frames[-1].lineno}." if frames else "",
        details="".join(lines),
    )


def _machinery(filename: str) -> bool:
    """Whether a frame is of the import itself."""
    return filename.startswith("<frozen") or filename in (__file__, importlib.__file__)


def _users_line(trace: TracebackType | None) -> str:
    """Where in the user's code it happened: the last frame that is not ours."""
    # where libraries live; not sys.prefix, which may hold the user's folder too
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    ours = (str(Path(__file__).parents[1]), *libraries)
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if not _machinery(frame.filename) and not frame.filename.startswith(ours)
    ]
    return f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""


def _module_of(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).lstrip("./")


def _near_modules(name: str) -> str:
    top = name.partition(".")[0]
    here = Path.cwd()
    at_hand = {path.stem for path in here.glob("*.py")} | {path.parent.name for path in here.glob("*/__init__.py")}
    near = get_close_matches(top, at_hand, n=1)
    hint = f"Did you mean {near[0]!r}? " if near and near[0] != top else ""
    return f"{hint}Looked in {here} and in Python's path."


def _named(module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [key for key, value in vars(module).items() if isinstance(value, Bridge)]
            near = get_close_matches(part, [*names, *vars(module)], n=1)
            hint = (
                f"Did you mean {module.__name__}:{near[0]}?" if near else f"It has: {', '.join(names) or 'no Bridge'}."
            )
            raise CannotStart(
                f"module {module.__name__} has no {attribute!r}",
                hint,
            ) from None
    return found


def _only(module: ModuleType) -> Any:
    named = getattr(module, _DEFAULT_NAME, None)
    if isinstance(named, Bridge):
        return named
    names: dict[int, str] = {}
    for key, value in vars(module).items():
        if isinstance(value, Bridge):
            names.setdefault(id(value), key)
    if len(names) == 1:
        return getattr(module, next(iter(names.values())))
    if not names:
        raise CannotStart(
            f"module {module.__name__} has no Bridge", f"Make one there: {_DEFAULT_NAME} = Bridge()",
        )  # fmt: skip
    every = ", ".join(f"{module.__name__}:{key}" for key in names.values())
    raise CannotStart(
        f"module {module.__name__} has {len(names)} bridges",
        f"Name one of them: {every}",
    )

"""From -A to a bridge."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qbridge import Bridge, ConfigurationError
from qbridge.cli.complaints import CannotStart
from qbridge.cli.loading import import_task_modules, load_bridge

ONE = 'from qbridge import *\nqueue_bridge = Bridge(BridgeConfig(broker="embedded:///tmp/never-made.db"))\n'
Write = Callable[[str, str], None]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the working directory; what it brought into the process goes away again."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            for value in vars(sys.modules.pop(name)).values():
                if isinstance(value, Bridge):
                    value.close()


def test_the_only_bridge_is_found_whatever_its_name(module: Write) -> None:
    """A second name for the same bridge does not make it two."""
    module("onlyone", f"{ONE}again = queue_bridge\n")
    assert isinstance(load_bridge("onlyone"), Bridge)


def test_the_name_bridge_goes_before_others(module: Write) -> None:
    """`-A proj.tasks` means `proj.tasks:bridge`."""
    module("several", f"{ONE}bridge = Bridge(BridgeConfig(name='chosen'))\n")
    assert load_bridge("several").config.name == "chosen"


def test_attributes_may_be_dotted(module: Write) -> None:
    """`module:holder.bridge`."""
    module("nested", f"{ONE}class holder:\n    inner = queue_bridge\n")
    assert isinstance(load_bridge("nested:holder.inner"), Bridge)


@pytest.mark.parametrize(
    ("source", "where", "says"),
    [
        (ONE, "wrongname:queue_bridg", "Did you mean wrongname:queue_bridge?"),
        ("x = 1\n", "wrongname", "bridge = Bridge()"),
        (f"{ONE}other = Bridge()\n", "wrongname", "wrongname:queue_bridge, wrongname:other"),
        (f"{ONE}app = queue_bridge.celery\n", "wrongname:app", "name the Bridge itself"),
        (f"{ONE}app = 3\n", "wrongname:app", "Name the Bridge itself"),
        (ONE, "wrongnme", "Did you mean 'wrongname'?"),
        (ONE, "./wrongname.py", "-A wrongname:bridge"),
        (ONE, "", "'' names no module"),
        (ONE, ":queue_bridge", "names no module"),
        (ONE, ".wrongname", "Write its full name"),
        (ONE, "wrongname.", "names no module"),
        ("import sys\nsys.exit(0)\n", "wrongname", "importing wrongname ended with SystemExit(0)"),
        (ONE, "wrongname.inner", "no module 'wrongname.inner'"),
    ],
)
def test_what_is_not_there_is_said_with_a_way_out(module: Write, source: str, where: str, says: str) -> None:
    """Names that are near, or what to write."""
    module("wrongname", source)
    with pytest.raises(CannotStart) as caught:
        load_bridge(where)
    assert says in f"{caught.value.what} {caught.value.todo}"
    assert caught.value.exit_code == 2


def test_an_import_that_fails_deeper_is_the_modules_failure(module: Write) -> None:
    """A missing module that the application imports is not mistaken for the application's."""
    module("deeper", "import absent_dependency\n")
    with pytest.raises(CannotStart, match="importing deeper failed: ModuleNotFoundError") as caught:
        load_bridge("deeper")
    assert "deeper.py" in caught.value.details
    assert "importlib" not in caught.value.details


def test_a_wrong_configuration_stays_a_configuration_error(module: Write) -> None:
    """With the user's line in front, for the faults to be told one by one."""
    module("misconfigured", 'from qbridge import *\n\nbridge = Bridge(BridgeConfig(brokr="redis://h"))\n')
    with pytest.raises(ConfigurationError, match=r"misconfigured\.py, line 3: .*did you mean 'broker'"):
        load_bridge("misconfigured")


def test_task_modules_of_the_configuration_are_imported(module: Write) -> None:
    """What `modules` names declares its tasks; a module that is missing is said."""
    module("hosting", f"{ONE.replace(')) ', '')}".replace('.db"))', '.db", modules=["guesting"]))'))
    module("guesting", "from hosting import queue_bridge\n\n@queue_bridge.task\ndef guest() -> None: ...\n")
    bridge = load_bridge("hosting")
    import_task_modules(bridge)
    assert list(bridge.tasks) == ["guesting.guest"]

    module("lonely", ONE.replace('.db"))', '.db", modules=["nobody"]))'))
    with pytest.raises(CannotStart, match="no module 'nobody'"):
        import_task_modules(load_bridge("lonely"))

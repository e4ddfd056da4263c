"""Does everything that the README and the documentation show work as they say?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.docs.samples import ROOT, Sample, Story, pages, stories_of
from tests.docs.telling import Teller

STORIES = [story for page in pages() for story in stories_of(page)]

#: What samples write for a server on this machine, and the fixture and number of the fresh place that is used instead.
PLACES = {
    "rabbitmq": ("amqp://guest:guest@localhost//",),
    "redis": ("redis://localhost/0", "redis://localhost/1"),
    "postgresql": ("postgresql://qbridge:secret@localhost/qbridge",),
}


@contextmanager
def _servers(story: Story, request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The addresses of the servers that a story needs, instead of those that it names."""
    with ExitStack() as places:
        found = {}
        for kind in story.servers:
            server = request.getfixturevalue(f"qbridge_{kind}").heal()
            for url in PLACES[kind]:
                found[url] = places.enter_context(server.fresh())
        yield found


@pytest.mark.parametrize("story", STORIES, ids=[story.name for story in STORIES])
def test_a_story_goes_as_it_is_told(story: Story, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Files, commands, configurations and sessions of a page do what the page says, in the order of the page."""
    with _servers(story, request) as addresses, Teller(story, tmp_path, addresses) as teller:
        teller.tell()


def _samples_with(command: str) -> list[Sample]:
    return [sample for story in STORIES for sample in story.samples if command in sample.code and sample.run_by]


def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    """systemd itself takes it without a complaint, with a program and a file of settings where it names them."""
    (sample,) = [each for each in _samples_with("WatchdogSec=") if each.page.name == "run-workers.md"]
    analyze = shutil.which("systemd-analyze")
    assert analyze is not None, "systemd-analyze is missing: install Debian's package systemd"
    program = tmp_path / ".venv" / "bin" / "qbridge"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "worker.env").touch()
    text = sample.code.replace("/srv/shop", str(tmp_path)).replace("/etc/shop", str(tmp_path))
    unit = tmp_path / "shop-worker.service"
    unit.write_text(text.replace("User=shop", "User=daemon"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_first_command_runs_the_demo(tmp_path: Path) -> None:
    """The README's first command, in a copy of this checkout, as on a machine with Python and nothing else."""
    (sample,) = [each for each in _samples_with("qbridge demo") if each.page.name == "README.md"]
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    environment["PATH"] = f"{Path(sys.base_prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", sample.code.removeprefix("$ ")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "What you have seen" in done.stdout


def test_what_is_not_run_says_why() -> None:
    """A sample that no test runs has a reason; one with a test of its own names a test that exists."""
    samples = [sample for story in STORIES for sample in story.samples]
    assert samples
    for sample in samples:
        assert not sample.not_run or len(sample.not_run) > 10, sample.place
        assert not sample.run_by or sample.run_by in globals(), sample.place

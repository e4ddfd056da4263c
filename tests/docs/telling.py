"""How is a story told: in a folder of its own, with a Python prompt, workers and settings, as a reader would do it?"""

from __future__ import annotations

import doctest
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.docs import interpreter
from tests.docs.samples import Sample, Story

from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until

__all__ = ["Teller"]

#: Programs that go on until they are stopped, and what their log says once they work.
_BACKGROUND = {
    r"qbridge (-A \S+ )?worker\b": r"\bready\.",
    r"celery .*\bworker\b": r"\bready\.",
    r"(qbridge|celery) .*\bbeat\b": r"Sending due task",
    r"uvicorn\b": r"Uvicorn running",
}
_ASSIGNMENTS = re.compile(r"^(?:[A-Z_]+=\S+ +)+")
_COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_LOAD = "from qbridge import BridgeConfig; BridgeConfig()"
#: Warnings are errors, but for the one that the first steps are meant to show.
_STRICT = ("-W", "error", "-W", "default:no broker is configured")
_PATIENCE = 60.0


class Teller:
    """One story, told.

    Args:
        story: what is to be done.
        folder: where; empty.
        replacements: parts of samples to be replaced: addresses of servers.
    """

    def __init__(self, story: Story, folder: Path, replacements: Mapping[str, str]) -> None:
        self.story = story
        self.folder = folder
        self.replacements = replacements
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QBRIDGE_", "CELERY_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self.environment = {**kept, "PATH": path, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.prompt: subprocess.Popen[str] | None = None
        self.background: list[tuple[str, ChildProcess]] = []
        self.log = folder / ".log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_processes(demanding=kind is None)

    def tell(self) -> None:
        """Do all that the story says.

        Raises:
            AssertionError: if a sample does not do what its page says.
        """
        for sample in self.story.samples:
            if sample.restart:
                self.end_processes()
            if sample.not_run or sample.run_by:
                continue
            code = sample.code
            for old, new in self.replacements.items():
                code = code.replace(old, new)
            tell = getattr(self, f"tell_{sample.language or 'nothing'}", None)
            assert tell is not None, f"{sample.place}: how is {sample.language!r} run? Say 'not run, because …'"
            tell(sample, code)

    # -- kinds of samples

    def tell_python(self, sample: Sample, code: str) -> None:
        """A file, which is then imported; or a block of code."""
        if sample.file is None:
            self.ask(sample, code, session=False)
            return
        self.write(sample.file, code)
        if Path(sample.file).name.startswith(("test_", "conftest")):
            return  # a console sample runs pytest
        module = sample.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.run([sys.executable, *_STRICT, "-c", f"import {module}"], sample)

    def tell_pycon(self, sample: Sample, code: str) -> None:
        """A session at Python's prompt."""
        self.ask(sample, code, session=True)

    def tell_toml(self, sample: Sample, code: str) -> None:
        """A file that the configuration reads; it must be sound."""
        assert sample.file is not None, f"{sample.place}: the first line must name the file, such as # qbridge.toml"
        self.write(sample.file, code)
        self.run([sys.executable, *_STRICT, "-c", _LOAD], sample)

    tell_ini = tell_toml

    def tell_json(self, sample: Sample, code: str) -> None:
        """Something to read."""
        json.loads(code)

    def tell_console(self, sample: Sample, code: str) -> None:
        """Commands, and what they print where the page says it."""
        for line, (command, expected) in enumerate(_commands(code), start=sample.line):
            where = f"{sample.page.name}:{line} $ {command}"
            words = _ASSIGNMENTS.sub("", command)
            ready = next((says for program, says in _BACKGROUND.items() if re.match(program, words)), None)
            if command.startswith("export "):
                for name, value in re.findall(r"([A-Z_]+)=(\S+)", command):
                    self.environment[name] = value
                self.run([sys.executable, *_STRICT, "-c", _LOAD], sample)
            elif ready is not None:
                _compare(where, expected, self.begin(where, command, ready))
            else:
                _compare(where, expected, self.run(["bash", "-c", command], sample))

    # -- processes

    def write(self, name: str, code: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code, encoding="utf-8")

    def run(self, command: list[str], sample: Sample) -> str:
        """Run a program to its end; return what it printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{sample.place}: {command[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout

    def begin(self, where: str, command: str, ready: str) -> str:
        """Run a program in the background; return what it has printed once it works."""
        log = self.folder / f".log-{len(self.background)}"
        log.unlink(missing_ok=True)
        process = ChildProcess(["bash", "-c", f"exec {command}"], log=log, env=self.environment, cwd=self.folder)
        self.background.append((where, process))

        def works() -> bool:
            assert process.exit_code() is None, f"{where} has ended:\n{process.tail()}"
            return re.search(ready, log.read_text()) is not None

        wait_until(works, _PATIENCE, what=f"{where} to work")
        return log.read_text()

    def ask(self, sample: Sample, code: str, *, session: bool) -> None:
        """Have the prompt run something."""
        if self.prompt is None:
            with self.log.open("ab") as log:
                self.prompt = subprocess.Popen(
                    [sys.executable, *_STRICT, str(Path(interpreter.__file__))],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self.prompt.stdin is not None
        assert self.prompt.stdout is not None
        order = {"code": code, "session": session, "place": str(sample.page), "line": sample.line}
        self.prompt.stdin.write(json.dumps(order) + "\n")
        self.prompt.stdin.flush()
        answer = self.prompt.stdout.readline()  # bounded by the test's own timeout
        assert answer, f"{sample.place}: Python has ended\n{self.log.read_text()}"
        wrong = json.loads(answer)
        assert not wrong, f"{sample.place}: {wrong}\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(f"-- {where}\n{process.tail()}" for where, process in self.background)

    def end_processes(self, *, demanding: bool = True) -> None:
        """Stop the prompt and the programs in the background; they must end well."""
        prompt, self.prompt = self.prompt, None
        if prompt is not None:
            assert prompt.stdin is not None
            prompt.stdin.close()
            try:
                code = prompt.wait(30)
            finally:
                prompt.kill()
                if prompt.stdout is not None:
                    prompt.stdout.close()
            assert not demanding or code == 0, self.log.read_text()
        background, self.background = self.background, []
        for where, process in reversed(background):
            process.end(signal.SIGTERM, 30)
            code = process.exit_code()
            assert not demanding or code == 0, f"{where} ended with {code}:\n{process.tail()}"


def _commands(code: str) -> list[tuple[str, str]]:
    """The commands of a console sample, each with what the page says that it prints."""
    found: list[tuple[str, str]] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found and found[-1][0].endswith("\\"):
            found[-1] = (f"{found[-1][0][:-1]}{line.strip()}", "")
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    assert found, "a console sample begins with $"
    return found


def _compare(where: str, expected: str, got: str) -> None:
    if expected.strip():
        same = doctest.OutputChecker().check_output(expected, got, _COMPARE)
        assert same, f"{where}\nexpected:\n{expected}\ngot:\n{got}"

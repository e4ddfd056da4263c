"""Which samples does a page have, and what is to be done with each?

A page is a list of stories: what a reader would type one after the other, in one folder. Comments in the Markdown say
what the samples cannot say themselves::

    <!-- sample: new story -->                      an empty folder, new processes
    <!-- sample: new story on rabbitmq, redis -->   the same, with URLs of localhost leading to servers of the test kit
    <!-- sample: new processes -->                  the workers are stopped, Python is started again; files stay
    <!-- sample: not run, because … -->             the next sample is not run
    <!-- sample: run by test_… -->                  the next sample is run by a test of its own
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ROOT", "SHOWN", "Sample", "Story", "pages", "stories_of"]

ROOT = Path(__file__).parents[2]
#: Languages that show something and are not samples: diagrams, log lines.
SHOWN = {"text"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\S*).*$")
_COMMENT = re.compile(r"^ *<!-- sample: (?P<said>.+) -->$")
_FILE = re.compile(r"^# (?P<path>[\w./-]*\.(?:py|toml|env))$")


@dataclass
class Sample:
    """One code block.

    Args:
        page: the file that it is in.
        line: of its first line of code, counted from 1.
        language: as the fence says.
        code: its text.
        not_run: why it is not run; empty if it is.
        run_by: name of the test that runs it; empty if its story does.
        restart: new processes come first.
    """

    page: Path
    line: int
    language: str
    code: str
    not_run: str = ""
    run_by: str = ""
    restart: bool = False

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that its first line names, such as ``# shop/tasks.py``."""
        found = _FILE.match(self.code.partition("\n")[0])
        return found["path"] if found else None


@dataclass
class Story:
    """Samples that follow one another.

    Args:
        servers: kinds of servers that it needs.
        samples: in their order.
    """

    servers: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Page and first line."""
        return self.samples[0].place


def pages() -> list[Path]:
    """All pages that people read: the README and the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stories_of(page: Path) -> list[Story]:
    """Take a page apart.

    Args:
        page: a Markdown file.

    Raises:
        ValueError: if a comment or a fence cannot be understood.
    """
    found = [Story()]
    not_run = run_by = ""
    restart = False
    for said, sample in _blocks(page):
        if said == "new story" or said.startswith("new story on "):
            found.append(Story(tuple(name.strip() for name in said[len("new story on ") :].split(",") if name.strip())))
        elif said == "new processes":
            restart = True
        elif said.startswith("not run, "):
            not_run = said.removeprefix("not run, ")
        elif said.startswith("run by "):
            run_by = said.removeprefix("run by ")
        elif said:
            raise ValueError(f"{page}: what does 'sample: {said}' mean?")
        elif sample is not None:
            sample.not_run, sample.run_by, sample.restart = not_run, run_by, restart
            not_run, run_by, restart = "", "", False
            found[-1].samples.append(sample)
    return [story for story in found if story.samples]


def _blocks(page: Path) -> Iterator[tuple[str, Sample | None]]:
    """Yield what comments say, and samples, in their order."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if comment := _COMMENT.match(line):
            yield comment["said"], None
        elif fence := _FENCE.match(line):
            indent, code = len(fence["indent"]), []
            for _, inside in lines:
                if inside.strip() == fence["fence"]:
                    break
                code.append(inside[indent:])
            else:
                raise ValueError(f"{page}:{number}: this block has no end")
            if fence["language"] not in SHOWN and not fence["language"].startswith("{"):  # a directive
                yield "", Sample(page, number + 1, fence["language"], "\n".join(code) + "\n")

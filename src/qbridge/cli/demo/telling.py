"""How does the demo speak? Chapters, code, answers, bars and the final table, on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from qbridge.backends.base import Finding
from qbridge.cli.screen import symbol

if TYPE_CHECKING:
    from qbridge.cli.demo.steps import Row

__all__ = ["Teller"]


class Teller:
    """Prints the story.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._chapters = 0

    def opening(self, broker: str, results: str) -> None:
        """Say what is about to happen, and where."""
        title = Text.assemble(("qbridge demo", "bold"), "  typed tasks, a real worker process, real results")
        self.console.print(Panel(title, border_style="cyan", expand=False, padding=(0, 2)))
        self._place(broker, results)

    def worker(self, pid: int, seconds: float) -> None:
        """Say that the worker is there."""
        self.console.print(
            symbol(self.console, "ok"), Text(f"A worker is running: process {pid}, ready after {seconds:.1f} s")
        )

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Say what is waited for, as long as it lasts; on a terminal only."""
        return self.console.status(text)

    def chapter(self, title: str) -> None:
        """Begin a step."""
        self._chapters += 1
        self.console.print()
        self.console.print(Text(f"{self._chapters}. {title}", style="bold"))

    def code(self, text: str) -> None:
        """Show what is run."""
        shown: RenderableType = Text(text)
        if self.console.is_terminal:
            shown = Syntax(text, "python", background_color="default", word_wrap=True, theme="ansi_dark")
        self._indented(shown)

    def result(self, text: str) -> None:
        """Show what came back."""
        self._indented(Text(f"{self._arrow} {text}", style="green"))

    def error(self, text: str) -> None:
        """Show an error that came, wanted or not."""
        self._indented(Text(f"{self._arrow} {text}", style="yellow"))

    def traceback(self, text: str, lines: int = 3) -> None:
        """Show the end of a remote traceback."""
        every = text.rstrip().splitlines()
        if every:
            shown = ["… in the worker:", *every[-lines:]]
            self._indented(Text("\n".join(shown), style="dim"), indent=6)

    def bars(self) -> Progress:
        """Return progress bars; in a pipe only their last state is printed."""
        return Progress(
            TextColumn("   {task.description:<14}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console,
        )  # fmt: skip

    def table(self, rows: Sequence[Row], broker: str, results: str) -> None:
        """Show what was shown."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("shown", "expected", "seen"):
            table.add_column(heading, overflow="fold")
        table.add_column("time", justify="right", no_wrap=True)
        for row in rows:
            sign = symbol(self.console, "ok" if row.true else "error")
            table.add_row(sign, row.shown, Text(row.expected), Text(row.seen), f"{row.seconds:.2f} s")
        self.console.print()
        self.console.print(Text("What you have seen", style="bold"))
        self.console.print()
        self.console.print(table)
        self.console.print()
        self._place(broker, results)

    def problems(self, findings: Sequence[Finding]) -> None:
        """Show why it cannot begin."""
        for finding in findings:
            self.console.print(symbol(self.console, "error"), Text(finding.what), soft_wrap=True)
            if finding.todo:
                self.console.print(Text(f"  {finding.todo}"), soft_wrap=True)

    def failure(self, what: str, log: str, path: str) -> None:
        """Show why it did not work: the end of the worker's log."""
        self.console.print()
        self.console.print(symbol(self.console, "error"), Text(what))
        if log:
            self.console.print(Group(Text("The end of the worker's log:", style="bold"), Text(log, style="dim")))
        self.console.print(Text(f"The whole log: {path}"), soft_wrap=True)

    def what_next(self) -> None:
        """Say what to do next, in three lines."""
        self.console.print()
        self.console.print(Text("Next", style="bold"))
        for command, meaning in (
            ("your tasks", "bridge = Bridge() and @bridge.task in a module, tasks.py"),
            ("a worker", "qbridge worker -A tasks"),
            ("a server", "QBRIDGE_BROKER=amqp://… QBRIDGE_RESULTS=rpc:// qbridge check"),
        ):
            self.console.print(Text.assemble("  ", (f"{command:<12}", "cyan"), meaning), soft_wrap=True)

    def _place(self, broker: str, results: str) -> None:
        for label, url in (("broker ", broker), ("results", results)):
            self.console.print(Text.assemble("  ", (label, "dim"), "  ", url), soft_wrap=True)

    @property
    def _arrow(self) -> str:
        try:
            "→".encode(self.console.encoding)
        except (UnicodeEncodeError, LookupError):
            return "->"
        return "→"

    def _indented(self, shown: RenderableType, indent: int = 3) -> None:
        self.console.print(Padding(shown, (0, 0, 0, indent), expand=False))

"""What does a user read when a command cannot do its work? What happened, what to do, and no traceback of ours."""

from __future__ import annotations

from typing import IO, Any

import click
from click_didyoumean import DYMGroup
from rich.text import Text

from qbridge.cli.screen import error_screen, symbol
from qbridge.exceptions import ConfigurationError, QBridgeError

__all__ = ["CANNOT_START", "Complaint", "PoliteGroup"]

CANNOT_START = 2
"""Exit code: what was asked for cannot be done as it is configured or written."""


class Complaint(click.ClickException):
    """An error for people.

    Args:
        what: what happened, to which object.
        todo: what to do next; may be empty.
        details: the original traceback, or another text to be printed as it is; may be empty.
        exit_code: of the program.
    """

    def __init__(self, what: str, todo: str = "", *, details: str = "", exit_code: int = 1) -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo
        self.details = details
        self.exit_code = exit_code

    @classmethod
    def about(cls, error: QBridgeError) -> Complaint:
        """Make one of an error of ours; configuration errors exit with 2, all others with 1."""
        return cls(error.what, error.todo, exit_code=CANNOT_START if isinstance(error, ConfigurationError) else 1)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it to standard error."""
        console = error_screen()
        if self.details:
            console.print(Text(self.details.rstrip(), style="dim"), soft_wrap=True)
        console.print(symbol(console, "error"), Text(_sentence(self.what)), soft_wrap=True)
        for line in self.todo.splitlines():
            console.print(Text(f"  {line}"), soft_wrap=True)


def _sentence(text: str) -> str:
    return text if text.endswith((".", ":", "!", "?", ")")) or "\n" in text else f"{text}."


class PoliteGroup(DYMGroup):  # type: ignore[misc]  # click-didyoumean has no types
    """Commands that suggest the name that was meant, and turn errors of ours into complaints."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except QBridgeError as error:
            raise Complaint.about(error) from None

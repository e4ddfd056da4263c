"""What does a user read when a command cannot do its work? What happened, what to do, and no traceback of ours."""

from __future__ import annotations

from typing import IO, Any

import click
from click_didyoumean import DYMGroup  # type: ignore[import-untyped]
from rich.text import Text

from qbridge.cli.screen import error_screen, symbol, visible
from qbridge.exceptions import ConfigurationError, QBridgeError

__all__ = ["CannotStart", "Complaint", "PoliteGroup", "complaint_about"]


class Complaint(click.ClickException):
    """An error for people.

    Args:
        what: what happened, to which object.
        todo: what to do next; may be empty.
        details: the original traceback, or another text to be printed as it is; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, todo: str = "", *, details: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo
        self.details = details

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it to standard error."""
        console = error_screen()
        if self.details:
            console.print(Text(visible(self.details.rstrip()), style="dim"), soft_wrap=True)
        console.print(symbol(console, "error"), Text(visible(_sentence(self.what))), soft_wrap=True)
        for line in visible(self.todo).splitlines():
            console.print(Text(f"  {line}"), soft_wrap=True)


class CannotStart(Complaint):
    """What was asked for cannot be done as it is written or configured: exit code 2, as click's for wrong usage."""

    exit_code = 2


def complaint_about(error: QBridgeError) -> Complaint:
    """Make a complaint of an error of ours."""
    kind = CannotStart if isinstance(error, ConfigurationError) else Complaint
    return kind(error.what, error.todo)


def _sentence(text: str) -> str:
    return text if text.endswith((".", ":", "!", "?", ")")) or "\n" in text else f"{text}."


class PoliteGroup(DYMGroup):
    """Commands that suggest the name that was meant, and turn errors of ours into complaints."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except QBridgeError as error:
            raise complaint_about(error) from None

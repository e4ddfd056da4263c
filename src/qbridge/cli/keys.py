"""``qbridge keys``: how does one get a key with which messages and results are signed or encrypted?"""

from __future__ import annotations

import click

from qbridge.cli.complaints import Complaint
from qbridge.exceptions import ConfigurationError
from qbridge.serialization.keys import new_key

__all__ = ["keys"]


@click.command()
@click.option("--id", "name", metavar="NAME", help="Its id, which travels with each message. [default: today's date]")
def keys(name: str | None) -> None:
    """Make a key to sign or to encrypt with, and print it.

    It is kept nowhere: put it where your secrets are. Use each for one of the two lists,
    serialization.signing_keys and serialization.encryption_keys.
    """
    try:
        click.echo(new_key(name))
    except ConfigurationError as error:
        raise Complaint(error.what, error.todo) from None

"""How is the table shown and kept? A row per cell: on the screen, and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

import qbridge
from bench.faults.cells import Cell, all_cells
from bench.faults.judge import RESUMES, Verdict

__all__ = ["HEADER", "cells_of", "done_in", "show", "write"]

COUNTS = (
    *("submitted", "confirmed", "uncertain", "executed", "again", "twice", "concurrently", "lost", "dead", "stuck"),
    *("refused_and_ran", "no_result", "still", "fell"),
)
HEADER = ("version", "system", "broker", "results", "pool", "seed", *COUNTS, *(f"resume_{name}" for name in RESUMES))


def cells_of(cell: Cell, seed: int, verdict: Verdict) -> list[str]:
    """The row of a cell."""
    row = [qbridge.__version__, cell.system, cell.broker, cell.results, cell.pool, str(seed)]
    for name in COUNTS:
        value = getattr(verdict, name)
        row.append("" if value is None else str(value if isinstance(value, int) else len(value)))
    return row + [f"{verdict.resume[name]:.1f}" if name in verdict.resume else "" for name in RESUMES]


def show(rows: Iterable[list[str]]) -> None:
    """Print the table."""
    table = Table()
    for name in HEADER[1:]:
        table.add_column(name.replace("_", " "), justify="right" if name in HEADER[6:] else "left")
    for row in rows:
        table.add_row(*row[1:])
    Console(width=240).print(table)


def done_in(path: Path, tasks: int) -> frozenset[Cell]:
    """The cells that a table has of this version, with as many tasks.

    Args:
        path: the file.
        tasks: how many there should be.
    """
    if not path.exists():
        return frozenset()
    with path.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["version"] == qbridge.__version__ and int(row["submitted"]) >= tasks
        ]
    names = {(row["system"], row["broker"], row["results"], row["pool"]) for row in rows}
    return frozenset(cell for cell in all_cells() if (cell.system, cell.broker, cell.results, cell.pool) in names)


def write(path: Path, rows: Iterable[list[str]]) -> None:
    """Write the table, rows of cells that were not run again kept as they are.

    Args:
        path: the file.
        rows: new ones.
    """
    kept = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(row[1:5]): row for row in list(csv.reader(file))[1:]}
    kept |= {tuple(row[1:5]): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *kept.values()])

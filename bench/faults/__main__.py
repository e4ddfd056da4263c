"""How is the table made? ``python -m bench.faults``; all cells take about an hour, two at a time.

A cell's row is in the CSV as soon as the cell is done; with ``--resume`` the same command goes on after the last one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from bench.faults.cells import SYSTEMS, Cell, all_cells
from bench.faults.run import Load, run
from bench.faults.story import story
from bench.faults.table import cells_of, done_in, show, write


def main() -> int:
    """Run the chosen cells, show the table, and say whether qbridge kept its promises."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default="", help="broker:pool or broker×results:pool, with commas; all by default")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="may be given more than once")
    parser.add_argument("--tasks", type=int, help="at least so many in each cell: 10000; 500 with --short")
    parser.add_argument(
        "--rate", type=float, help="tasks a second; as many as make the sends last as long as the story"
    )
    parser.add_argument("--short", action="store_true", help="the story of the tests: some seconds per cell")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--csv", type=Path)
    parser.add_argument(
        "--resume", action="store_true", help="leave out the cells that the CSV has, of this version and as large"
    )
    parser.add_argument("--keep", type=Path, help="keep the files of each cell in this folder")
    given = parser.parse_args()
    chosen = [cell for cell in all_cells() if _is_chosen(cell, given.cells, given.system)]
    tasks = given.tasks or (500 if given.short else 10_000)
    done = done_in(given.csv, tasks) if given.csv and given.resume else frozenset()
    chosen = [cell for cell in chosen if cell not in done]
    print(f"{len(chosen)} cells, {tasks} tasks each, --seed {given.seed}", flush=True)
    rows: dict[Cell, list[str]] = {}
    failed: list[str] = []
    writing = Lock()

    def one(cell: Cell) -> None:
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        try:
            told = story(cell, given.seed, short=given.short)
            verdict = run(cell, told, Load(tasks, given.rate or tasks / told.length, given.seed), folder)
            rows[cell] = cells_of(cell, given.seed, verdict)
            print(f"{cell}: {' '.join(rows[cell][6:])}", flush=True)
            if cell.system == "qbridge" and (verdict.lost or verdict.stuck):
                failed.append(f"{cell}: lost {sorted(verdict.lost)}, stuck {sorted(verdict.stuck)}")
            if verdict.submitted < tasks:
                failed.append(f"{cell}: only {verdict.submitted} of {tasks} tasks were sent")
            if given.csv:
                with writing:
                    write(given.csv, [rows[cell]])
        except Exception as error:  # the other cells go on
            failed.append(f"{cell}: {error!r}")
        finally:
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                shutil.move(folder, given.keep / str(cell).replace(" ", "-"))
            else:
                shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(given.jobs) as jobs:
        list(jobs.map(one, chosen))
    show(rows[cell] for cell in chosen if cell in rows)
    for line in failed:
        print(line)
    return bool(failed)


def _is_chosen(cell: Cell, cells: str, systems: list[str] | None) -> bool:
    names = {f"{cell.broker}:{cell.pool}"} if cell.results != "rpc" else set()
    names.add(f"{cell.broker}×{cell.results}:{cell.pool}")
    return (not cells or bool(names & set(cells.split(",")))) and (not systems or cell.system in systems)


if __name__ == "__main__":
    sys.exit(main())

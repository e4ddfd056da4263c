"""Does the judge of the fault table see a lost, a doubled, a concurrent, a stuck task in made-up evidence?"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench.faults.cells import Cell, all_cells
from bench.faults.fleet import Fleet
from bench.faults.judge import RESUMES, Evidence, Happened, Run, judge, runs_of
from bench.faults.recorder import Line, Recorder, RunLog
from bench.faults.sender import Sender
from bench.faults.story import OF_WORKERS, story
from bench.faults.submit import Sent
from bench.faults.table import HEADER, cells_of, done_in, write
from bench.faults.workload import numbers_in, task_id, workload
from qbridge.testing.servers.process import ChildProcess


def ran(number: int, began: float, until: float, mark: str = "E", *, attempt: int = 1, pid: int = 1) -> Run:
    """A run that ended, or (without a mark) whose process was last seen alive then."""
    return Run(number, attempt, pid, began, until if mark else None, mark, until)


def sent(*numbers: int, at: float = 0.0) -> list[Sent]:
    return [Sent("C", number, at) for number in numbers]


def test_a_task_that_ran_once_is_executed_and_nothing_else() -> None:
    """The ordinary case, a retry included."""
    verdict = judge(Evidence(sent(1, 2), [ran(1, 1, 2), ran(2, 1, 2, "R"), ran(2, 3, 4, attempt=2)]))
    assert {1, 2} == verdict.executed == verdict.confirmed
    assert not verdict.lost | verdict.stuck | verdict.twice | verdict.concurrently | verdict.again


def test_a_confirmed_task_that_is_nowhere_is_lost() -> None:
    """Whether it never ran, was cut short, or failed without its next attempt; one that was not confirmed is not."""
    sends = [*sent(1, 2, 3), Sent("R", 4, 0.0), Sent("U", 5, 0.0)]
    verdict = judge(Evidence(sends, [ran(2, 1, 2, ""), ran(3, 1, 2, "R")]))
    assert {1, 2, 3} == verdict.lost


def test_a_task_that_is_still_in_the_broker_is_stuck_and_not_lost() -> None:
    """A copy of one that has run is neither."""
    verdict = judge(Evidence(sent(1, 2), [ran(2, 1, 2)], left=frozenset({1, 2})))
    assert {1} == verdict.stuck
    assert not verdict.lost


def test_a_dead_letter_is_neither_lost_nor_stuck() -> None:
    """It is where it was said to be."""
    verdict = judge(Evidence(sent(1), [], dead=frozenset({1}), left=frozenset({1})))
    assert {1} == verdict.dead
    assert not verdict.lost | verdict.stuck


def test_two_ends_of_an_attempt_are_executed_twice() -> None:
    """One that was cut short and begun again was executed once."""
    runs = [ran(1, 1, 2), ran(1, 3, 4), ran(2, 1, 2, "", pid=2), ran(2, 3, 4), ran(3, 1, 2, "R"), ran(3, 3, 4, "R")]
    verdict = judge(Evidence(sent(1, 2, 3), runs))
    assert {1, 3} == verdict.twice
    assert {2} == verdict.again
    assert not verdict.concurrently


def test_runs_that_overlap_are_concurrent() -> None:
    """Also if the first was cut short: it went on until its process was last seen alive."""
    runs = [ran(1, 1, 3), ran(1, 2, 4), ran(2, 1, 3, "", pid=2), ran(2, 2, 4), ran(3, 1, 2, "", pid=2), ran(3, 2, 4)]
    assert {1, 2} == judge(Evidence(sent(1, 2, 3), runs)).concurrently


def test_a_send_that_was_refused_must_not_run() -> None:
    """The sender was told that it had not arrived."""
    verdict = judge(Evidence([Sent("R", 1, 0.0), Sent("U", 2, 0.0)], [ran(1, 1, 2), ran(2, 1, 2)]))
    assert {1} == verdict.refused_and_ran
    assert {2} == verdict.uncertain


def test_an_executed_task_without_a_result_is_seen() -> None:
    """Where results can be read."""
    evidence = Evidence(sent(1, 2), [ran(1, 1, 2), ran(2, 1, 2)], stored=frozenset({2}))
    assert frozenset({1}) == judge(evidence).no_result


def test_time_to_resume_after_a_death_is_that_of_the_next_run() -> None:
    """Of all calls that ran in the dead, the longest; an outage in between does not count."""
    happened = [
        Happened("kill_worker", 10, 10, frozenset({7})),
        Happened("freeze_broker", 11, 11),
        Happened("thaw_broker", 41, 41),
    ]
    runs = [ran(1, 9, 10, "", pid=7), ran(1, 12, 13, pid=8), ran(2, 9, 10, "", pid=7), ran(2, 43, 44, pid=8)]
    assert 3.0 == judge(Evidence(sent(1, 2), runs, happened)).resume["worker"]


def test_of_two_deaths_the_later_one_counts() -> None:
    """A process is killed, and a moment later the worker that would have seen to it."""
    happened = [
        Happened("kill_child", 10, 10, frozenset({7})),
        Happened("kill_parent", 11, 11, frozenset({6, 7})),
    ]
    resume = judge(Evidence(sent(1), [ran(1, 9, 10, "", pid=7), ran(1, 15, 16, pid=8)], happened)).resume
    assert {"worker": 4.0} == resume


def test_time_to_resume_after_an_outage_is_that_of_the_first_new_task() -> None:
    """Those that workers had in their hands prove nothing."""
    happened = [Happened("kill_broker", 10, 10), Happened("start_broker", 12, 14)]
    runs = [ran(1, 14.5, 15), ran(2, 17, 18)]
    assert 3.0 == judge(Evidence(sent(1, 2), runs, happened, held=1)).resume["broker"]


def test_time_to_resume_is_also_that_of_the_first_call_sent_afterwards() -> None:
    """It was in nobody's hands; the first that was answered afterwards may have been sent before."""
    happened = [Happened("kill_broker", 10, 10), Happened("start_broker", 12, 14)]
    sends = [*sent(1, at=9.0), *sent(2, at=14.2), *sent(3, at=15.0)]
    runs = [ran(1, 9, 9.1), ran(2, 14.3, 15), ran(3, 16, 17)]
    assert 2.0 == judge(Evidence(sends, runs, happened, held=24)).resume["broker"]


def test_a_server_fails_while_nobody_was_killed_lately() -> None:
    """Else "seconds to resume" would be those that a worker needs to start."""
    for seed in range(20):
        events = story(Cell("qbridge", "redis", "redis", "process"), seed).events
        kills = [event.at for event in events if event.act.startswith(("kill_worker", "kill_parent", "kill_child"))]
        assert 30 == len(kills)
        for acts in RESUMES.values():
            for event in events:
                if event.act in acts and event.act not in OF_WORKERS:
                    assert not [at for at in kills if event.at - 3 < at < event.at + 8], event


def test_a_sender_that_does_not_end_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the run says so: what it did not send is missing in the table, not waited for."""
    process = ChildProcess(
        [sys.executable, "-c", "import time; time.sleep(600)"], log=tmp_path / "sender.txt", env={}, cwd=tmp_path
    )
    sender = Sender(process, "a cell", 60)
    try:
        assert sender.sends
        sender.give(time.monotonic())
        assert not sender.sends
        assert process.exit_code() is not None
    finally:
        process.kill()
    sender.demand_success()  # it did not fail by itself
    assert "a cell: the sender did not end" in capsys.readouterr().out


def test_a_worker_that_was_killed_is_not_there(tmp_path: Path) -> None:
    """Although it has said that it consumes; else all are killed within a moment, and nobody is left to go on."""
    fleet = Fleet(all_cells()[0], {}, tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    for number in range(2):
        fleet._workers.append(ChildProcess(command, log=tmp_path / f"{number}.txt", env={}, cwd=tmp_path))
        fleet._ready.append(tmp_path / f"{number}.ready")
        fleet._ready[-1].touch()
    try:
        assert fleet.all_consume
        first = fleet.kill_worker(0)
        assert not fleet.all_consume
        assert fleet.is_well
        assert not first & fleet.kill_worker(0), "the next one that consumes"
        assert not fleet.is_well
    finally:
        fleet.end()


def test_what_a_process_wrote_is_read_back(tmp_path: Path) -> None:
    """While it grows; a run without an end goes on until its process was last seen."""
    recorder, log = Recorder(tmp_path), RunLog(tmp_path)
    with recorder.run(3, 1):
        log.look()
        assert log.busy()
        assert not log.done
    log.look()
    assert {3} == log.done
    assert not log.busy()
    open_run = Line("B", 4, 1, 0, 5.0)
    (run,) = runs_of({Path("17-1.log"): [open_run]}, {17: 6.0}, 99.0)
    assert (6.0, None) == (run.until, run.ended)


def test_a_story_and_a_workload_are_the_same_for_each_system_and_seed() -> None:
    """So that the rows of the table can be compared; ids are found again in whatever a broker keeps."""
    ours, theirs = Cell("qbridge", "redis", "redis", "process"), Cell("celery", "redis", "redis", "process")
    assert story(ours, 5) == story(theirs, 5) != story(ours, 6)
    assert 20 == sum(event.act in ("kill_worker", "kill_parent") for event in story(ours, 5).events)
    assert list(workload(100, 5)) == list(workload(100, 5)) != list(workload(100, 6))
    assert {3, 999_999} == numbers_in(f'["{task_id(3)}", {{"root_id": "{task_id(999_999)}"}}]'.encode())


def test_a_row_takes_the_place_of_the_cell_s_former_one(tmp_path: Path) -> None:
    """So that cells can be run again one by one."""
    one, other, *_ = all_cells()
    verdict = judge(Evidence(sent(1, 2), [ran(1, 1, 2), ran(2, 1, 2)]))
    for cell in (one, other, one):
        write(tmp_path / "table.csv", [cells_of(cell, 1, verdict)])
    header, *rows = (tmp_path / "table.csv").read_text().splitlines()
    assert ",".join(HEADER) == header
    assert {one, other} == done_in(tmp_path / "table.csv", 2)
    assert not done_in(tmp_path / "table.csv", 3), "they were smaller"
    assert [one.pool, other.pool] == [row.split(",")[4] for row in rows]

"""What became of every call? What was sent, what ran, what is left in the broker, and when what happened: compared.

The judge sees evidence only, no server and no process, so that it can be tested on made-up cases.
"""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.faults.recorder import Line, pid_of
from bench.faults.story import OUTAGES, Act
from bench.faults.submit import Sent

__all__ = ["RESUMES", "Evidence", "Happened", "Run", "Verdict", "judge", "runs_of"]

RESUMES: dict[str, tuple[Act, ...]] = {
    "worker": ("kill_worker", "kill_parent"),
    "child": ("kill_child",),
    "broker": ("start_broker",),
    "freeze": ("thaw_broker",),
    "results": ("start_results",),
    "cut": ("cut",),
    "loss": ("lose",),
    "stall": ("resume",),
    "roll": ("roll",),
}
"""What the table calls each fault after which things have to go on."""

_CONCURRENT = 0.002
"""Seconds that two runs of one call must overlap by: the end of one is written a moment after it."""


@dataclass(frozen=True)
class Run:
    """One run of an attempt.

    Args:
        number: of the call.
        attempt: the first is 1.
        pid: process that it ran in.
        began: monotonic seconds.
        ended: monotonic seconds; None if nothing says that it ended.
        mark: how it ended: ``E``, ``R``, ``X``; empty if nothing says.
        until: when it ended, or when its process was last seen alive.
    """

    number: int
    attempt: int
    pid: int
    began: float
    ended: float | None
    mark: str
    until: float


@dataclass(frozen=True)
class Happened:
    """One thing that has happened.

    Args:
        act: what.
        began: monotonic seconds.
        ended: monotonic seconds, when it was done.
        pids: processes that it ended.
    """

    act: Act
    began: float
    ended: float
    pids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Evidence:
    """All that is known of a run.

    Args:
        sends: one per call, in order.
        runs: every run of every call.
        happened: the story as it went.
        left: calls of which a message is in the broker at the end, waiting, delayed or held by a worker.
        dead: calls of which a dead letter is there.
        stored: calls whose result says SUCCESS; None if nobody can tell.
        still: workers that were alive at the end and began nothing in the last seconds in which tasks came.
        fell: workers that ended without being told to.
        held: messages that all workers together may have fetched ahead.
    """

    sends: Sequence[Sent]
    runs: Sequence[Run]
    happened: Sequence[Happened] = ()
    left: frozenset[int] = frozenset()
    dead: frozenset[int] = frozenset()
    stored: frozenset[int] | None = None
    still: int = 0
    fell: int = 0
    held: int = 0


@dataclass(frozen=True)
class Verdict:
    """What became of the calls, by number.

    Args:
        submitted: calls that were sent, or tried.
        confirmed: of these, calls that the broker has taken, for all the sender knows.
        uncertain: calls of which the sender cannot say whether they arrived.
        executed: calls that have come to their end.
        again: calls of which a run was cut short and another begun.
        twice: calls of which an attempt came to its end more than once.
        concurrently: calls of which two runs went on at the same time.
        lost: confirmed calls that were not executed and are nowhere.
        dead: calls that are dead letters.
        stuck: confirmed calls that were not executed and are still in the broker.
        refused_and_ran: calls that the sender was told had not arrived, and which ran.
        no_result: executed calls without a stored success; None if nobody can tell.
        still: workers that stood still at the end.
        fell: workers that ended without being told to.
        resume: the longest seconds until things went on, by the names of ``RESUMES``.
    """

    submitted: int
    confirmed: frozenset[int]
    uncertain: frozenset[int]
    executed: frozenset[int]
    again: frozenset[int]
    twice: frozenset[int]
    concurrently: frozenset[int]
    lost: frozenset[int]
    dead: frozenset[int]
    stuck: frozenset[int]
    refused_and_ran: frozenset[int]
    no_result: frozenset[int] | None
    still: int
    fell: int
    resume: Mapping[str, float] = field(default_factory=dict)


def runs_of(lines: Mapping[Path, Sequence[Line]], last_seen: Mapping[int, float], now: float) -> list[Run]:
    """Make runs of the lines of all processes.

    Args:
        lines: by file.
        last_seen: processes that are dead, and when they were last seen alive.
        now: monotonic seconds; a run that nothing ended goes on until then in a process that lives.
    """
    runs = []
    for path, written in lines.items():
        pid = pid_of(path)
        ends = {line.run: line for line in written if line.mark != "B"}
        for line in written:
            if line.mark == "B":
                end = ends.get(line.run)
                until = end.at if end is not None else max(line.at, last_seen.get(pid, now))
                mark, ended = ("", None) if end is None else (end.mark, end.at)
                runs.append(Run(line.number, line.attempt, pid, line.at, ended, mark, until))
    return sorted(runs, key=lambda run: run.began)


def judge(evidence: Evidence) -> Verdict:
    """Say what became of every call."""
    by_number: dict[int, list[Run]] = defaultdict(list)
    for run in evidence.runs:
        by_number[run.number].append(run)
    confirmed = frozenset(sent.number for sent in evidence.sends if sent.outcome == "C")
    refused = {sent.number for sent in evidence.sends if sent.outcome == "R"}
    executed = frozenset(number for number, runs in by_number.items() if any(run.mark == "E" for run in runs))
    open_ends = confirmed - executed
    return Verdict(
        submitted=len(evidence.sends),
        confirmed=confirmed,
        uncertain=frozenset(sent.number for sent in evidence.sends if sent.outcome == "U"),
        executed=executed,
        again=frozenset(number for number, runs in by_number.items() if _was_cut_short(runs)),
        twice=frozenset(number for number, runs in by_number.items() if _ended_twice(runs)),
        concurrently=frozenset(number for number, runs in by_number.items() if _overlap(runs)),
        lost=open_ends - evidence.dead - evidence.left,
        dead=evidence.dead,
        stuck=open_ends & evidence.left - evidence.dead,
        refused_and_ran=frozenset(refused & by_number.keys()),
        no_result=None if evidence.stored is None else executed - evidence.stored,
        still=evidence.still,
        fell=evidence.fell,
        resume=_resumes(evidence, by_number),
    )


def _was_cut_short(runs: Sequence[Run]) -> bool:
    """A run was cut short, and its attempt begun again."""
    return any(one.mark in ("", "X") and other.attempt == one.attempt and other.began > one.began
               for one in runs for other in runs)  # fmt: skip


def _ended_twice(runs: Sequence[Run]) -> bool:
    """One attempt came to its end twice, or two attempts ended well."""
    ended = [run.attempt for run in runs if run.mark in ("E", "R")]
    return len(ended) > len(set(ended)) or sum(run.mark == "E" for run in runs) > 1


def _overlap(runs: Sequence[Run]) -> bool:
    ordered = sorted(runs, key=lambda run: run.began)
    latest = float("-inf")
    for run in ordered:
        if run.began < latest - _CONCURRENT:
            return True
        latest = max(latest, run.until)
    return False


# How long until things went on


def _outages(happened: Sequence[Happened]) -> list[tuple[float, float]]:
    found = []
    for number, one in enumerate(happened):
        if one.act in OUTAGES:
            ending = (other.ended for other in happened[number:] if other.act == OUTAGES[one.act])
            found.append((one.began, next(ending, float("inf"))))
    return sorted(found)


def _resumes(evidence: Evidence, by_number: Mapping[int, Sequence[Run]]) -> dict[str, float]:
    outages = _outages(evidence.happened)
    begins = sorted(run.began for run in evidence.runs)
    # sends follow one another: what is sent after a moment is what follows one that was answered after it
    answers = [sent.at for sent in evidence.sends]
    firsts = [min((run.began for run in by_number.get(sent.number, ())), default=None) for sent in evidence.sends]

    def sent_after(one: Happened) -> list[float]:
        after = bisect(answers, one.ended) + 1
        return [first for first in firsts[after:] if first is not None]

    longest: dict[str, float] = {}
    for name, acts in RESUMES.items():
        waits: list[float] = []
        for one in evidence.happened:
            if one.act in acts:
                found = (
                    _after_death(one, by_number, evidence.happened, outages)
                    if one.pids
                    else _after_outage(one, begins, sent_after(one), evidence.held, outages)
                )
                waits += found
        if waits:
            longest[name] = max(waits)
    return longest


def _after_death(
    one: Happened,
    by_number: Mapping[int, Sequence[Run]],
    happened: Sequence[Happened],
    outages: Sequence[tuple[float, float]],
) -> Iterable[float]:
    """Seconds from a death to the next run of each call that ran in the dead, outages not counted.

    If the worker died too before it could see to a dead process of its own, its death is the one that counts.
    """
    for runs in by_number.values():
        for run in runs:
            if run.pid in one.pids and run.ended is None and run.began <= one.ended:
                after = [other.began for other in runs if other.began > one.began and other is not run]
                if after and not any(
                    one.began < other.began < min(after) and run.pid in other.pids for other in happened
                ):
                    yield _without(one.began, min(after), outages)


def _after_outage(
    one: Happened, begins: Sequence[float], news: Sequence[float], held: int, outages: Sequence[tuple[float, float]]
) -> Iterable[float]:
    """Seconds until a call begins that was sent afterwards, or more than the workers had in their hands."""
    after = bisect(begins, one.ended) + held
    proofs = [min(news)] if news else []
    proofs += begins[after : after + 1]
    if proofs:
        yield _without(one.ended, min(proofs), outages)


def _without(begin: float, end: float, outages: Sequence[tuple[float, float]]) -> float:
    """Seconds between two moments, without the outages in between."""
    away, reached = 0.0, begin
    for start, stop in outages:
        low, high = max(start, reached), min(stop, end)
        if high > low:
            away += high - low
            reached = high
    return max(0.0, end - begin - away)

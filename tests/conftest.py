"""What every test starts from: an environment without settings, signals as in a terminal, reproducible examples."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from celery import _state
from hypothesis import HealthCheck, settings

# Under "ci" the same examples each time: a red run can be repeated, and a green one says what it said before.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI", "").lower() in {"1", "true", "yes"} else "dev")

# A developer's own settings are not the tests' (QBRIDGE_TEST_* name servers, and stay).
for _name in list(os.environ):
    if _name.startswith(("QBRIDGE_", "CELERY_")) and not _name.startswith("QBRIDGE_TEST_"):
        del os.environ[_name]

# A shell starts what it runs in the background with SIGINT ignored, which every child inherits: Ctrl-C would mean
# nothing to the programs under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What a test has printed goes from process to process as UTF-8, which has no lone surrogates."""
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]


@pytest.fixture(scope="module", autouse=True)
def celery_is_left_as_it_was_found() -> Iterator[None]:
    """No module leaves something in what Celery keeps for the whole process: the next one would fail of it.

    A shared task goes to every app that is finalized later, and a second one of its name makes each of them warn. An
    app that stays the default one is current in the tests of others.
    """
    before = _kept_by_celery()
    yield
    assert before == _kept_by_celery()


@pytest.fixture(scope="module", autouse=True)
def logging_and_environment_are_left_as_they_were_found() -> Iterator[None]:
    """Celery's worker in this process sets up logging for good: levels and handlers, and variables for its children.

    A later test would miss warnings of the root logger and all of ``celery.task``; its worker processes would take the
    level of logging from the environment.
    """
    loggers = [logging.getLogger(), *map(logging.getLogger, ("celery", "celery.task", "celery.redirected"))]
    before = [(logger, logger.level, logger.handlers[:], logger.propagate, logger.disabled) for logger in loggers]
    environment = dict(os.environ)
    yield
    for logger, level, handlers, propagate, disabled in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate, logger.disabled = propagate, disabled
    # pytest's own variable changes with each test, and pytest takes it away itself
    changed = {name for name in os.environ.keys() | environment if os.environ.get(name) != environment.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]


def _kept_by_celery() -> dict[str, Any]:
    shared = {
        cell.cell_contents
        for callback in _state._on_app_finalizers
        for cell in callback.__closure__ or ()
        if callable(cell.cell_contents)
    }
    return {
        "shared tasks": {each for each in shared if not each.__module__.startswith("celery.")},
        "default app": _state.default_app,
        "current app": _state._tls.current_app,
    }

"""Do Celery's and kombu's own integration tests pass on a bridge? Fetches them, runs them, compares.

``python tests/interop/run.py`` fetches the source distributions of the installed Celery and kombu with pip, takes
their ``t`` folders, starts private servers, and runs each part on the app under a bridge with ``defaults="celery"``.
Where something fails, the part is run on plain Celery too: a test that passes there is a defect of ours and makes the
run fail; one that fails on both is listed. ``--plain`` runs everything on plain Celery instead, for a look.

Nothing of theirs is kept: both projects' tests stay in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

from qbridge.testing.servers import PostgreSQLServer, RabbitMQServer, RedisServer, obtain

HERE = Path(__file__).parent

SMALL = [
    "test_backend_leak_in_fixture_teardown",
    "test_beat",
    "test_connection_recovery",
    "test_group_chains",
    "test_inspect",
    "test_loader",
    "test_redis_backend",
    "test_request_backend_down",
    "test_serialization",
    "test_tasks",
    "test_upgrade",
    "test_worker",
]
CANVAS = ["test_canvas"]
DATABASE = ["test_database_backend"]


@dataclass(frozen=True)
class Part:
    """Some test modules of one project on one broker and one result backend."""

    name: str
    project: str
    broker: str
    results: str
    modules: list[str]
    #: Words for pytest.
    options: tuple[str, ...] = ()
    #: Minutes after which the run of a module is ended.
    minutes: int = 15


PARTS = [
    Part("kombu on RabbitMQ", "kombu", "rabbitmq", "redis", ["test_py_amqp"]),
    Part("kombu on Redis", "kombu", "redis", "redis", ["test_redis", "test_redis_brpop_qos"]),
    Part("Celery on Redis", "celery", "redis", "redis", SMALL),
    Part("Celery on RabbitMQ and Redis", "celery", "rabbitmq", "redis", SMALL),
    Part("Celery on RabbitMQ and rpc", "celery", "rabbitmq", "rpc", ["test_tasks", "test_inspect"]),
    Part("Celery on Redis and PostgreSQL", "celery", "redis", "postgresql", ["test_tasks", *DATABASE]),
    Part("canvas on Redis", "celery", "redis", "redis", CANVAS, minutes=40),
    Part("canvas on RabbitMQ and Redis", "celery", "rabbitmq", "redis", CANVAS, minutes=40),
]


def fetch(project: str, folder: Path) -> Path:
    """Unpack the tests of the installed version of a project; nothing of it is built or installed."""
    wanted = f"{project}=={version(project)}"
    # For this project only: what pip needs to look into it may come as a wheel.
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", project]
    command += ["--dest", str(folder / "sdist"), wanted]
    subprocess.run(command, check=True)
    (archive,) = (folder / "sdist").glob(f"{project}-*.tar.gz")
    with tarfile.open(archive) as packed:
        for member in packed:
            inside = member.name.partition("/")[2]
            if inside.startswith("t/") or inside in {"pyproject.toml", "setup.cfg"}:
                packed.extract(member, folder, filter="data")
    (place,) = folder.glob(f"{project}-*")
    return place


@dataclass
class Outcome:
    """How the tests of one run ended, by name."""

    tests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    unfinished: list[str] = field(default_factory=list)

    def named(self, *ends: str) -> list[str]:
        """Names of the tests that ended so."""
        return [name for name, end in self.tests.items() if end in ends]


def run(part: Part, place: Path, *, plain: bool, log: Path) -> Outcome:
    """Run a part on fresh servers of its own: both suites leave queues behind, and Celery's uses fixed keys."""
    began = time.monotonic()
    report = log.with_suffix(".xml")
    log.unlink(missing_ok=True)
    with ExitStack() as stack:
        servers = {
            kind.name: stack.enter_context(obtain(kind))
            for kind in (RabbitMQServer, RedisServer, PostgreSQLServer)
            if kind is RedisServer or kind.name in {part.broker, part.results}
        }
        urls = {name: server.url for name, server in servers.items()} | {"rpc": "rpc://"}
        if "postgresql" in urls:
            urls["postgresql"] = "db+" + urls["postgresql"]
        redis = urlsplit(urls["redis"])
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "TEST_BROKER": urls[part.broker].replace("amqp://", "pyamqp://"),
            "TEST_BACKEND": urls[part.results],
            "REDIS_HOST": redis.hostname or "",
            "REDIS_PORT": str(redis.port),
            "REDIS_6379_TCP": str(redis.port),
            "INTEROP_SUITE": part.project,
            "WORKER_LOGLEVEL": "INFO",  # as their own CI: some tests look at the log
            "PYTHONPATH": str(HERE),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        }
        if "rabbitmq" in urls:
            rabbitmq = urlsplit(urls["rabbitmq"])
            environment |= {"RABBITMQ_HOST": rabbitmq.hostname or "", "RABBITMQ_5672_TCP": str(rabbitmq.port)}
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-W", "ignore", "--timeout=300"]
        command.append(f"--junitxml={report}")
        if part.project == "celery":
            command += ["-p", "celery.contrib.pytest"]
        if not plain:
            command += ["-p", "on_bridge"]
        outcome = Outcome()
        # A process each: some change theirs for good.
        for module in part.modules:
            report.unlink(missing_ok=True)
            with log.open("a") as out:
                try:
                    subprocess.run(
                        [*command, *part.options, f"t/integration/{module}.py"],
                        cwd=place,
                        env=environment,
                        stdout=out,
                        stderr=out,
                        check=False,
                        timeout=part.minutes * 60,
                    )
                except subprocess.TimeoutExpired:
                    outcome.unfinished.append(module)
                    continue
            outcome.tests |= read(report)
    outcome.seconds = time.monotonic() - began
    return outcome


def read(report: Path) -> dict[str, str]:
    """Read pytest's report: name of the test as pytest takes it → passed, failed, skipped."""
    tests: dict[str, str] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        module, *kind = case.get("classname", "").removeprefix("t.integration.").split(".")
        name = "::".join([f"t/integration/{module}.py", *kind, case.get("name", "")])
        ends = {child.tag for child in case}
        end = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else "passed"
        if tests.get(name) != "failed":
            tests[name] = end
    return tests


def main() -> int:
    """Run all parts, or those whose name contains a word given; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the parts with this in their name; none: all")
    parser.add_argument("--plain", action="store_true", help="run on plain Celery")
    parser.add_argument("--keep", type=Path, help="folder for logs; else they are thrown away")
    chosen = parser.parse_args()
    parts = [part for part in PARTS if not chosen.words or any(word in part.name for word in chosen.words)]
    ours: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qbridge-interop-") as name:
        folder = Path(name)
        logs = chosen.keep or folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        places = {project: fetch(project, folder / project) for project in sorted({part.project for part in parts})}
        for part in parts:
            slug = part.name.replace(" ", "-")
            first = run(part, places[part.project], plain=chosen.plain, log=logs / f"{slug}.log")
            failed = first.named("failed")
            print(
                f"{part.name}: {len(first.named('passed'))} passed, {len(failed)} failed, "
                f"{len(first.named('skipped'))} skipped in {first.seconds:.0f} s",
                flush=True,
            )
            ours += [f"{part.name}: {module} not finished in {part.minutes} minutes" for module in first.unfinished]
            if chosen.plain or not failed:
                continue
            second = run(part, places[part.project], plain=True, log=logs / f"{slug}-plain.log")
            for test in failed:
                if second.tests.get(test) == "passed":
                    ours.append(f"{part.name}: {test}")
                print(f"  {test}: {second.tests.get(test, 'not run')} on plain Celery", flush=True)
    for line in ours:
        print(f"fails on a bridge only: {line}")
    return 1 if ours else 0


if __name__ == "__main__":
    raise SystemExit(main())

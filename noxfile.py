"""The one way to run anything: lint, typing, tests, services, acceptance, docs, wheel, demo, bench.

``nox`` runs what CI runs. ``nox -l`` lists the sessions; ``nox -s unit -- -k retry`` hands words to pytest.
The last line is the number of tests of all sessions, ``N passed, M failed``; a session that fails without a failed
test counts as one.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import nox
import nox.command

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
# The cheap ones first: a wrong line shows within seconds, a wrong promise within minutes.
nox.options.sessions = ["lint", "typing", "unit", "contract", "integration", "acceptance", "docs", "wheel", "demo"]

ROOT = Path(__file__).parent
GROUPS = nox.project.load_toml(ROOT / "pyproject.toml")
IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
JUNIT = ROOT / ".nox" / "junit"

BROKERS = ["rabbitmq", "redis", "embedded"]
RESULTS = ["rpc", "redis", "postgresql", "sqlite"]
# MariaDB once: to us it differs from PostgreSQL by its driver only.
PAIRS = [(broker, results) for broker in BROKERS for results in RESULTS] + [("rabbitmq", "mariadb")]


# The sum of all sessions.

_reports: list[Path] = []
_failed_without_report: list[str] = []


def session(
    **options: object,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``nox.session`` that remembers failures, for the last line, and keeps bytecode."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(session: nox.Session, *args: object, **kwargs: object) -> None:
            before = _counts()["failed"]
            # Where bytecode is not kept, each of the thousand processes that tests start compiles Celery, SQLAlchemy
            # and pydantic again: that is more than half of the time until a worker consumes.
            session.env["PYTHONDONTWRITEBYTECODE"] = None
            try:
                function(session, *args, **kwargs)
            except BaseException as error:
                # A skipped session is not a failed one; nox has no public name for its signal.
                if type(error).__name__ != "_SessionSkip" and _counts()["failed"] == before:
                    _failed_without_report.append(session.name)
                raise

        return nox.session(**options)(run)  # type: ignore[call-overload,no-any-return]  # options are nox's own

    return decorate


def _counts() -> dict[str, int]:
    """Tests of all sessions so far, from the files that pytest wrote."""
    total = {"passed": 0, "failed": len(_failed_without_report), "skipped": 0}
    for report in _reports:
        if not report.exists():
            continue
        for suite in ET.parse(report).getroot().iter("testsuite"):
            number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            total["failed"] += number["failures"] + number["errors"]
            total["skipped"] += number["skipped"]
            total["passed"] += number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    return total


@atexit.register
def _last_line() -> None:
    if _reports or _failed_without_report:
        total = _counts()
        if total["skipped"]:
            print(f"{total['skipped']} skipped", flush=True)
        for name in _failed_without_report:
            print(f"failed without a failed test: session {name}", flush=True)
        print(f"{total['passed']} passed, {total['failed']} failed", flush=True)


# What sessions share.


def _install(session: nox.Session, *groups: str, extra: str = "all") -> None:
    """Install the project as it lies here, and groups of tools."""
    session.install("-e", f".[{extra}]", *nox.project.dependency_groups(GROUPS, *groups))


def _need_servers(session: nox.Session) -> None:
    """Install missing servers where we may; elsewhere their tests skip, and fail in CI."""
    session.run("python", "-m", "qbridge.testing.servers", "install", success_codes=[0] if IN_CI else [0, 1])


def _need_systemd(session: nox.Session) -> None:
    """Install what reads systemd's units, where we may: the documentation shows one, and it is checked."""
    if shutil.which("systemd-analyze") is None and shutil.which("apt-get") and os.geteuid() == 0:
        session.run("apt-get", "install", "-y", "--no-install-recommends", "systemd", external=True, silent=True)


def _run_all(session: nox.Session, *commands: list[str]) -> None:
    """Run every command even if one fails: a reader wants to know all that is wrong."""
    failed: list[str] = []
    for command in commands:
        try:
            session.run(*command)
        except nox.command.CommandFailed:
            failed.append(command[0])
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def _pytest(
    session: nox.Session,
    folder: str,
    *options: str,
    cwd: Path = ROOT,
    report: str | None = None,
    runner: tuple[str, ...] = ("python", "-m", "pytest"),
) -> None:
    """Run the tests of a folder; one that does not exist yet is skipped, one without tests is a failure."""
    if not any((cwd / folder).rglob("test_*.py")):
        session.skip(f"there are no tests in {folder} yet")
    file = JUNIT / f"{report or session.name}.xml".replace("/", "-")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    _reports.append(file)
    with session.chdir(cwd):
        session.run(*runner, folder, f"--junitxml={file}", *options, *session.posargs)


# Tests wait for processes and servers more than they compute: four run at a time on two cores, each process with
# servers of its own. Where a file shares a server's state or a worker among its tests, the file stays together.
_BESIDE = ("-n", "4")
# Three for the tests of single services, whose faults have deadlines: with four they were late now and then.
# xdist would begin with the files that have most tests; those that take longest have few.
_FILES_BESIDE = ("-n", "3", "--dist=loadfile", "--no-loadscope-reorder")
# What computes: the starts of programs, in the acceptance tests, are nothing else.
_COMPUTING = ("-n", "2")
_COMPUTING_BESIDE = (*_COMPUTING, "--dist=loadfile")


# The sessions.


@session()
def lint(session: nox.Session) -> None:
    """Style, formatting, floors, docstrings."""
    _install(session, "lint")
    _run_all(
        session,
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["lint-imports", "--no-logo"],
        ["interrogate", "src"],
    )


@session()
def typing(session: nox.Session) -> None:
    """mypy and pyright over the sources and tests/typing, and the completeness of the public types."""
    _install(session, "typing")
    expected = ["tests/typing"] if (ROOT / "tests" / "typing").exists() else []
    _run_all(
        session,
        ["mypy", "src", *expected],
        ["pyright"],
        ["python", "tests/typing/completeness.py"],
    )


@session()
def unit(session: nox.Session) -> None:
    """What needs no server, with branch coverage."""
    _install(session, "test")
    session.run("coverage", "erase")
    # Not by pytest-cov: pytest imports our plugin before any other plugin could begin to measure.
    try:
        _pytest(session, "tests/unit", *_COMPUTING_BESIDE, runner=("coverage", "run", "-m", "pytest"))
    finally:
        session.run("coverage", "combine", silent=True)
        session.run("coverage", "report", "--skip-covered")


@session()
def contract(session: nox.Session) -> None:
    """The contract on every pair, in four processes with servers of their own; lists each pair."""
    _install(session, "test")
    _need_servers(session)
    _pytest(session, "tests/contract", *_BESIDE, "--dist=loadgroup")


@session()
@nox.parametrize("broker,results", PAIRS)
def services(session: nox.Session, broker: str, results: str) -> None:
    """The contract on one pair: nox -s "services(broker='redis', results='rpc')"."""
    _install(session, "test")
    _need_servers(session)
    pair = [f"--qbridge-broker={broker}", f"--qbridge-results={results}"]
    _pytest(session, "tests/contract", *pair, report=f"services-{broker}-{results}")


@session()
def integration(session: nox.Session) -> None:
    """What only one real service has, and faults."""
    _install(session, "test")
    _need_servers(session)
    _pytest(session, "tests/integration", *_FILES_BESIDE)


@session()
def acceptance(session: nox.Session) -> None:
    """Real worker processes, the command line, the examples."""
    _install(session, "test", "examples")
    _need_servers(session)
    _pytest(session, "tests/acceptance", *_COMPUTING, "--dist=load")


@session()
def docs(session: nox.Session) -> None:
    """Build the documentation strictly, and run its samples."""
    _install(session, "docs", "test", "examples")
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--fresh-env", "--quiet", "docs", "site")
    _need_servers(session)
    _need_systemd(session)
    _pytest(session, "tests/docs", *_BESIDE, "--dist=load")


@session(reuse_venv=False)
def wheel(session: nox.Session) -> None:
    """Build, check, install into a new environment, and test what was installed."""
    session.install(*nox.project.dependency_groups(GROUPS, "wheel", "test"))
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(dist), silent=True)
    (archive,) = dist.glob("*.whl")
    session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    session.run("check-wheel-contents", str(archive))
    _compare_contents(session, archive)
    session.install(f"qbridge[all] @ {archive.as_uri()}")

    # A place with the tests and without the sources: what is imported is what was installed.
    place = Path(session.create_tmp()).resolve() / "installed"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("pyproject.toml", "SECURITY.md"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    with session.chdir(place):
        session.run("python", "-c", "import qbridge; assert 'site-packages' in qbridge.__file__, qbridge.__file__")
    _pytest(session, "tests/unit", *_COMPUTING_BESIDE, cwd=place, report="wheel-unit")
    if any((place / "tests" / "contract").rglob("test_*.py")):
        session.run("python", "-m", "qbridge.testing.servers", "install", "redis", "rabbitmq")
        pairs = ["-k", "embedded-sqlite or rabbitmq-redis"]
        _pytest(session, "tests/contract", *_BESIDE, "--dist=loadgroup", *pairs, cwd=place, report="wheel-contract")


def _compare_contents(session: nox.Session, archive: Path) -> None:
    """The wheel holds every file of the package, and nothing else."""
    with zipfile.ZipFile(archive) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "qbridge").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    if packed != expected:
        session.error(f"wheel and sources differ: {sorted(packed ^ expected)}")


@session()
def demo(session: nox.Session) -> None:
    """The README's first command; words behind -- go to it: nox -s demo -- --broker redis://localhost."""
    # Without any extra: `pip install qbridge` alone must run it.
    session.install("-e", ".")
    with session.chdir(session.create_tmp()):
        session.run("qbridge", "demo", *session.posargs)


@session()
def coverage(session: nox.Session) -> None:
    """Every test in one environment, worker processes measured too; not part of the default run."""
    _install(session, "test", "examples")
    _need_servers(session)
    session.run("coverage", "erase")
    for folder in ("unit", "contract", "integration", "acceptance"):
        if any((ROOT / "tests" / folder).rglob("test_*.py")):
            session.run("coverage", "run", "-m", "pytest", f"tests/{folder}", *session.posargs)
    session.run("coverage", "combine")
    session.run("coverage", "report", "--skip-covered")
    session.run("coverage", "html")


@session()
def interop(session: nox.Session) -> None:
    """Celery's and kombu's own integration suites on a bridge, beside plain Celery; long, not in the default run."""
    _install(session, "test")
    session.install(
        "pip", "pytest-order", "pytest-subtests", "pytest-rerunfailures", "pytest-docker-tools", "boto3", "pytz"
    )
    _need_servers(session)
    session.run("python", "tests/interop/run.py", *session.posargs)


@session()
def rabbitmq4(session: nox.Session) -> None:
    """The contract, delays and hazards of RabbitMQ 4.0, from Debian trixie in a folder: as root, with debootstrap."""
    _install(session, "test")
    _need_servers(session)
    root = ROOT / ".nox" / "trixie"
    if not any(root.glob("usr/lib/rabbitmq/lib/rabbitmq_server-4.*")):
        session.run("debootstrap", "--variant=minbase", "--include=rabbitmq-server", "trixie", str(root), external=True)
    session.env["QBRIDGE_TEST_RABBITMQ_ROOT"] = str(root)
    _pytest(
        session, "tests/contract", "--qbridge-broker=rabbitmq", "--qbridge-results=redis", report="rabbitmq4-contract"
    )
    _pytest(session, "tests/integration", "-k", "test_delays and rabbitmq", report="rabbitmq4-delays")
    _pytest(session, "tests/hazards", "-k", "test_row_05", "--timeout=600", report="rabbitmq4-hazards")


@session()
def hazards(session: nox.Session) -> None:
    """What plain Celery does to people, and that we do not: on real servers; long, not in the default run."""
    _install(session, "test")
    _need_servers(session)
    _pytest(session, "tests/hazards", "--timeout=600")


@session()
def fuzz(session: nox.Session) -> None:
    """Messages that nobody means: a million at the decoder, 100,000 at a running worker on each broker; hours."""
    _install(session, "test")
    _need_servers(session)
    session.env.update(QBRIDGE_TEST_FUZZ_DECODED="1000000", QBRIDGE_TEST_FUZZ_SENT="100000")
    _pytest(session, "tests/unit/worker/test_fuzz_decoder.py", "tests/fuzz", "--timeout=14400", "-s")


@session()
def audit(session: nox.Session) -> None:
    """Known vulnerabilities and licences of what we depend on; asks services on the network."""
    session.install("-e", ".[all]", "pip-audit>=2.7", "pip-licenses>=5")
    session.run("pip-licenses", "--order=license", "--fail-on=GNU Affero General Public License v3")
    report = Path(session.create_tmp()) / "audit.json"
    session.run("pip-audit", "--skip-editable", "--format=json", f"--output={report}")
    # a mirror without the index's data about vulnerabilities makes pip-audit skip everything, and succeed
    found = json.loads(report.read_text())["dependencies"]
    skipped = [one["name"] for one in found if "skip_reason" in one and one["name"] != "qbridge"]
    session.log(f"{len(found) - len(skipped)} audited, {len(skipped)} not: {', '.join(skipped)}")
    if len(skipped) * 2 > len(found):
        session.error("this index tells of no vulnerabilities: nothing was audited")


@session()
def bench(session: nox.Session) -> None:
    """Measure the overhead over raw Celery; not a test, and not part of the default run."""
    _install(session, "bench")
    _need_servers(session)
    version = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["version"]
    everything = ["--all", "--csv", f"bench/results/overhead-{version}.csv"]
    session.run("python", "bench/overhead.py", *(session.posargs or everything))


@session()
def faults(session: nox.Session) -> None:
    """What faults do to tasks, beside plain Celery; an hour, not in the default run.

    Words behind -- go to it: ``nox -s faults -- --cells redis:thread --system qbridge``.
    """
    _install(session, "bench")
    _need_servers(session)
    version = nox.project.load_toml(ROOT / "pyproject.toml")["project"]["version"]
    everything = ["--jobs", "2", "--csv", f"bench/results/faults-{version}.csv"]
    session.run("python", "-m", "bench.faults", *(session.posargs or everything))


@session()
def format(session: nox.Session) -> None:  # noqa: A001 - the name that people type
    """Repair what ruff can repair; not part of the default run."""
    session.install(*nox.project.dependency_groups(GROUPS, "lint"))
    session.run("ruff", "check", "--fix", ".", success_codes=[0, 1])
    session.run("ruff", "format", ".")

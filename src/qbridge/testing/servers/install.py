"""Where do the servers' programs come from: the machine, apt, docker compose, or somebody who is told how?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qbridge.testing.servers.absence import ServerMissing

__all__ = ["PACKAGES", "compose_url", "install", "missing", "program"]

#: The Debian package of each server, and a program that is there once it is installed.
PACKAGES: dict[str, tuple[str, str]] = {
    "rabbitmq": ("rabbitmq-server", "rabbitmq-server"),
    "redis": ("redis-server", "redis-server"),
    "postgresql": ("postgresql", "initdb"),
    "mariadb": ("mariadb-server", "mariadbd"),
}

#: What the repository's compose.yaml publishes: ports that no other service of a developer is likely to have.
COMPOSE_URLS: dict[str, str] = {
    "rabbitmq": "amqp://guest:guest@127.0.0.1:45672//",
    "redis": "redis://127.0.0.1:46379/0",
    "postgresql": "postgresql+psycopg://qbridge:qbridge@127.0.0.1:45432/qbridge",
    "mariadb": "mysql+pymysql://root:qbridge@127.0.0.1:43306/qbridge",
}
COMPOSE_MANAGEMENT_URL = "http://guest:guest@127.0.0.1:45673"

_POLICY = Path("/usr/sbin/policy-rc.d")


def find_program(name: str, *folders: str) -> str | None:
    """Path of a program: in one of ``folders``, else on the path or in the system folders; None if nowhere."""
    if name == "initdb":
        folders = (*folders, *(str(found) for found in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))
    searched = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    return shutil.which(name, path=searched)


def program(name: str, *folders: str) -> str:
    """Path of a program.

    Args:
        name: its name.
        folders: looked at before the path.

    Raises:
        ServerMissing: if it is nowhere.
    """
    found = find_program(name, *folders)
    if found is None:
        raise ServerMissing(f"the program {name} is not on this machine")
    return found


def missing(servers: Iterable[str]) -> list[str]:
    """Those of ``servers`` whose programs are not on this machine."""
    return [server for server in servers if find_program(PACKAGES[server][1], "/usr/lib/rabbitmq/bin") is None]


def install(servers: Iterable[str]) -> None:
    """Install what is missing with apt, if this is Debian or Ubuntu and we are root; says so on standard error.

    No service is started: a ``policy-rc.d`` forbids it while apt runs.

    Args:
        servers: keys of ``PACKAGES``.

    Raises:
        ServerMissing: if something is missing and cannot be installed; the message names every other way.
    """
    lacking = missing(servers)
    if not lacking:
        return
    packages = [PACKAGES[server][0] for server in lacking]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ServerMissing(_all_ways(lacking))
    print(f"qbridge.testing: installing {' '.join(packages)} with apt (no service is started)", file=sys.stderr)
    guarded = not _POLICY.exists()
    if guarded:
        _POLICY.write_text("#!/bin/sh\n# written by qbridge.testing for the length of one apt run\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        _apt("update")
        _apt("install", "--yes", "--no-install-recommends", *packages)
    except subprocess.CalledProcessError as error:
        raise ServerMissing(
            f"apt could not install {' '.join(packages)}; the end of its output:\n"
            f"{(error.stdout or '')[-2000:]}\n{_all_ways(lacking)}"
        ) from error
    finally:
        if guarded:
            with suppress(OSError):
                _POLICY.unlink()
    still = missing(lacking)
    if still:
        raise ServerMissing(f"apt installed {' '.join(packages)}, but {_all_ways(still)}")


def _apt(*arguments: str) -> None:
    subprocess.run(
        # Another apt may be running (another worker of the same test run, an unattended upgrade): wait for it.
        ["apt-get", "-o", "DPkg::Lock::Timeout=600", "-qq", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )


def _all_ways(servers: list[str]) -> str:
    packages = " ".join(PACKAGES[server][0] for server in servers)
    variables = " ".join(f"QBRIDGE_TEST_{server.upper()}_URL" for server in servers)
    return (
        f"the programs of {', '.join(servers)} are not on this machine. Three ways to have them: "
        f"(1) install them: `sudo apt-get install {packages}` (the test kit does it itself as root on Debian, Ubuntu); "
        f"(2) with docker: `docker compose up --detach --wait {' '.join(servers)}` in the repository (the test kit "
        "does it itself where docker runs); "
        f"(3) name servers that run elsewhere in {variables}"
    )


def compose_url(server: str) -> str | None:
    """Start a server with docker compose, where docker runs and a compose.yaml of qbridge is at hand.

    Returns:
        Its URL; None where there is no docker or no compose.yaml. The container is left running, for the next run.
    """
    file = _compose_file()
    if file is None or shutil.which("docker") is None:
        return None
    print(f"qbridge.testing: starting {server} with docker compose ({file})", file=sys.stderr)
    try:
        subprocess.run(
            ["docker", "compose", "--file", str(file), "up", "--detach", "--wait", server],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
            timeout=600,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        detail = error.stderr if isinstance(error.stderr, str) else error
        print(f"qbridge.testing: docker compose did not start {server}: {detail}", file=sys.stderr)
        return None
    if server == "rabbitmq":
        os.environ.setdefault("QBRIDGE_TEST_RABBITMQ_MANAGEMENT_URL", COMPOSE_MANAGEMENT_URL)
    return COMPOSE_URLS[server]


def _compose_file() -> Path | None:
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "compose.yaml"
        if file.exists() and "qbridge" in file.read_text():
            return file
    return None

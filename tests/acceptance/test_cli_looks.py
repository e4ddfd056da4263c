"""`qbridge check|tasks|queues|watch`: what they tell people and machines, on every broker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.cli_programs import Folder

from qbridge import __version__
from qbridge.testing.waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    place = Folder(tmp_path)
    yield place
    place.close()


@pytest.fixture(params=["embedded", "redis", "rabbitmq"])
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A project on each broker; results in a file."""
    if request.param == "embedded":
        place = Folder(tmp_path)
        yield place
        place.close()
        return
    with request.getfixturevalue(f"qbridge_{request.param}").fresh() as url:
        place = Folder(tmp_path, broker=url)
        yield place
        place.close()


def test_queues_tells_what_waits_and_who_consumes(any_folder: Folder) -> None:
    """Depths and consumers as far as the broker knows them, before, during and after a worker."""
    folder = any_folder
    kind = folder.bridge.config.broker.kind
    before = {queue["name"]: queue for queue in folder.json("queues", "-A", "shop")["queues"]}
    assert set(before) == {"default", "reports"}
    assert before["default"]["waiting"] == (0 if kind == "redis" else None), "Redis does not know empty queues"

    priorities = ("low", "normal", "high") if kind != "rabbitmq" else ("normal",) * 3
    sent = [folder.bridge.send("shop.add", (1, 2), priority=priority) for priority in priorities]
    told = folder.json("queues", "-A", "shop")
    waiting = {queue["name"]: queue for queue in told["queues"]}
    assert waiting["default"]["waiting"] == 3
    assert waiting["default"]["consumers"] == (None if kind == "redis" else 0)
    assert "shop.add" in waiting["default"]["tasks"]
    text = folder.run("queues", "-A", "shop").stdout
    assert re.search(r"^default +3 ", text, re.MULTILINE)
    assert ("no worker consumes it" in text) == (kind != "redis")

    worker = folder.start("worker", "-A", "shop", "-c", "1")
    worker.ready()
    assert [result.get(timeout=20) for result in sent] == [3, 3, 3]  # the slow one would overtake the low one
    running = folder.bridge.send("shop.slow", (100,))
    wait_until(lambda: running.progress() is not None, 20, what="the task to run")
    during = folder.json("queues", "-A", "shop")
    default = next(queue for queue in during["queues"] if queue["name"] == "default")
    assert default["waiting"] == 0
    if kind == "redis":
        assert during["held"] == 1
    else:
        assert default["consumers"] == 1
    if kind == "embedded":
        assert default["running"] == 1
    (folder.path / ".state" / "enough").touch()
    assert worker.stop() == 0


def test_dead_letters_are_listed_shown_replayed_and_discarded(folder: Folder) -> None:
    """Arguments are shown on request only; what is replayed runs, what is discarded is gone, and nothing by mistake."""
    for number in range(3):
        folder.bridge.send("shop.later", (f"secret-{number}",), task_id=f"task-{number}")
    box = folder.bridge.dead_letters
    with folder.bridge.worker(pool="solo"):
        wait_until(lambda: len(box.list()) == 3, 20, what="the dead letters")
    assert folder.json("queues", "-A", "shop")["queues"][0]["dead_letters"] == 3
    told = folder.json("dead-letters", "list", "-A", "shop")["dead_letters"]
    assert [(one["reason"], one["task_id"]) for one in told] == [("unknown_task", f"task-{n}") for n in range(3)]
    first, second, third = (one["id"] for one in told)
    shown = folder.run("-A", "shop", "dead-letters", "show", first).stdout
    assert "NotRegistered" in shown
    assert "secret" not in shown
    assert "secret-0" in folder.run("dead-letters", "show", first, "-A", "shop", "--body").stdout
    assert folder.run("dead-letters", "discard", "-A", "shop").returncode == 2
    assert folder.run("dead-letters", "discard", "--all", "-A", "shop").returncode == 1, "nobody said yes"
    assert [one["id"] for one in folder.json("dead-letters", "discard", first, "-A", "shop")["discarded"]] == [first]
    replayed = folder.run("dead-letters", "replay", second, first, "-A", "shop")
    assert replayed.returncode == 1
    assert "1 replayed" in replayed.stdout
    assert first in replayed.stderr
    assert [letter.id for letter in box.list()] == [third]
    text = folder.run("dead-letters", "list", "-A", "shop", COLUMNS="40").stdout
    assert "shop.later" in text, "no cell is folded in a pipe"
    [line] = [line for line in text.splitlines() if third in line]
    assert "shop.later" in line
    assert "secret" not in text


def test_a_dead_letter_that_cannot_be_sent_again_is_skipped_and_told(folder: Folder) -> None:
    """Those behind it are sent, and the exit code says that not all were."""
    app = folder.bridge.celery
    queue = app.amqp.queues["default"]
    with app.producer_or_acquire() as producer:
        producer.publish(
            b"0", exchange=queue.exchange, routing_key="default", declare=[queue], content_type="application/json",
            content_encoding="binary", headers={"qbridge_unreadable": "bm8="}, confirm_timeout=5,
        )  # fmt: skip
    folder.bridge.send("shop.later", ("one",))
    folder.bridge.send("shop.later", ("two",))
    box = folder.bridge.dead_letters
    with folder.bridge.worker(pool="solo"):
        wait_until(lambda: len(box.list()) == 3, 20, what="the dead letters")
    [bad] = [letter.id for letter in box.list() if letter.task is None]
    first = folder.run("dead-letters", "replay", "--queue", "default", "--limit", "1", "--json", "-A", "shop")
    assert (first.returncode, len(json.loads(first.stdout)["replayed"])) == (1, 1)
    assert list(json.loads(first.stdout)["skipped"]) == [bad]
    second = folder.run("dead-letters", "replay", "--all", "-A", "shop")
    assert second.returncode == 1
    assert "1 replayed" in second.stdout
    assert f"the dead letter {bad} cannot be sent again" in second.stderr
    assert [letter.id for letter in box.list()] == [bad]


def test_queues_of_a_broker_that_is_away(tmp_path: Path) -> None:
    """A clean message and exit code 1, within its timeout."""
    folder = Folder(tmp_path, broker="amqp://shop:pw1234@127.0.0.1:9//")
    done = folder.run("queues", "-A", "shop", "--timeout", "2", timeout=15)
    folder.close()
    assert done.returncode == 1
    assert "qbridge check" in done.stderr
    assert "Traceback" not in done.stderr
    assert "pw1234" not in done.stdout + done.stderr


def test_tasks_tells_signatures_and_policies(folder: Folder) -> None:
    """For people in lines, for machines in JSON; nothing is connected."""
    text = folder.run("tasks", "-A", "shop").stdout
    assert "shop.add(a: int, b: int) -> int" in text
    assert "shop.slow(steps: int) -> int" in text, "the context is not in the signature"
    assert "queue reports  at least once  4 attempts on ConnectionError, OSError  limit 60 s" in text
    told = {task["name"]: task for task in folder.json("tasks", "-A", "shop")["tasks"]}
    assert told["shop.fail"]["async"] is True
    assert told["shop.render"]["queue"] == "reports"
    assert told["shop.render"]["time_limit"] == 60
    assert told["shop.render"]["retry"]["attempts"] == 4
    assert told["shop.add"]["retry"] is None
    assert (told["shop.add"]["version"], len(told["shop.add"]["fingerprint"])) == (1, 12)
    assert not list((folder.path / ".state").iterdir())


def test_check_says_what_is_fine_and_what_is_not(folder: Folder, tmp_path: Path) -> None:
    """Exit code 0 and 1; findings grouped; JSON with the same findings; never a secret."""
    good = folder.run("check")
    assert good.returncode == 0, good.stdout
    assert "✓ Nothing is wrong" in good.stdout
    assert folder.run("check", "-A", "shop").returncode == 0

    bad = folder.run("check", QBRIDGE_BROKER="amqp://shop:pw1234@127.0.0.1:9//", PYTHONIOENCODING="ascii")
    assert bad.returncode == 1
    assert re.search(r"^Broker +amqp://shop:\*\*@127.0.0.1:9", bad.stdout, re.MULTILINE)
    assert "FAILED nothing listens at 127.0.0.1:9" in bad.stdout
    machine = folder.run("check", "--json", QBRIDGE_BROKER="amqp://shop:pw1234@127.0.0.1:9//")
    told = json.loads(machine.stdout)
    assert machine.returncode == 1
    assert told["ok"] is False
    assert "broker.unreachable" in [finding["code"] for finding in told["findings"]]
    assert "pw1234" not in bad.stdout + bad.stderr + machine.stdout + machine.stderr


def test_check_takes_a_wrong_configuration_as_a_finding(folder: Folder) -> None:
    """All faults of all sources, each a finding, without a traceback; a module that fails is one as well."""
    done = folder.run("check", "--json", QBRIDGE_BROKR="redis://:pw1234@h", QBRIDGE_WORKER__POOL="threads")
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(told["findings"]) == 2
    assert {finding["code"] for finding in told["findings"]} == {"configuration.invalid"}
    assert "QBRIDGE_BROKER" in done.stdout
    assert "pw1234" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

    (folder.path / "broken.py").write_text("import absent\n")
    failed = folder.run("check", "-A", "broken", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["findings"][0]["code"] == "application.import"


def test_watch_follows_a_task_to_its_end(folder: Folder) -> None:
    """Each report of progress is a line in a pipe; the exit code tells how it ended."""
    worker = folder.start("worker", "-A", "shop", "-c", "1")
    worker.ready()
    watching = folder.start("watch", "watched", "-A", "shop")
    watching.wait_for("PENDING")
    folder.bridge.send("shop.slow", (20,), task_id="watched")
    assert watching.process.wait(20) == 0
    reports = re.findall(r"^PROGRESS (\d+)/20 \(\d+%\) step \d+$", watching.text, re.MULTILINE)
    assert len(reports) > 1
    assert reports == sorted(reports, key=int)
    assert "SUCCESS: 20" in watching.text

    failing = folder.bridge.send("shop.fail", ("nothing there",))
    done = folder.run("watch", failing.id, "-A", "shop")
    assert done.returncode == 1
    assert "FAILURE: LookupError: nothing there" in done.stdout

    done = folder.run("watch", "unheard-of", "-A", "shop", "--timeout", "0.5")
    assert done.returncode == 3
    assert "no such task" in done.stdout
    assert worker.stop() == 0


def test_watch_cannot_read_rpc_results(folder: Folder) -> None:
    """Said at once, naming what can be read elsewhere."""
    done = folder.run("watch", "some-id", "-A", "shop", QBRIDGE_RESULTS="rpc://", timeout=15)
    assert done.returncode == 1
    assert "redis" in done.stderr


def test_both_ways_to_start_the_program_are_the_same() -> None:
    """`python -m qbridge` and the console script; the version; a misspelt command; help for each command."""
    script = Path(sys.executable).with_name("qbridge")
    for command in ([sys.executable, "-m", "qbridge"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == f"qbridge {__version__}\n"
    wrong = subprocess.run([str(script), "wroker"], capture_output=True, text=True, timeout=30, check=False)
    assert wrong.returncode == 2
    assert "worker" in wrong.stderr

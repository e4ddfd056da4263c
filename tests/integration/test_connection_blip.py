"""What becomes of a running task whose worker loses its connection: does it run once, and is its message settled?"""

from __future__ import annotations

import pytest

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until


@pytest.mark.parametrize(("pool", "says"), [("thread", "while it runs here"), ("solo", "its acknowledgement was lost")])
def test_a_run_survives_its_connection(
    qbridge_rabbitmq: RabbitMQServer,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
    says: str,
) -> None:
    """The broker delivers its message again, and the same worker does not run it beside itself, or after itself."""
    folder = tmp_path_factory.mktemp("blip")
    with qbridge_rabbitmq.fresh() as url, TcpProxy.to(url) as proxy:
        contract = Contract(url, f"sqlite:///{folder}/results.db", folder)
        environment = {**contract.process_environment(), "QBRIDGE_BROKER": proxy.url(url)}
        monkeypatch.setattr(contract, "process_environment", lambda: environment)
        path, release = contract.path(), contract.path("release")
        try:
            with contract.worker_of("fragile", pool=pool) as worker:
                result = contract.tasks.hold.using(queue="fragile").delay(str(path), str(release))
                wait_until(lambda: runs(path), 20, what="the task to run")
                proxy.cut()
                if pool == "solo":  # its one thread runs the task: it looks at the connection afterwards
                    release.touch()
                wait_until(lambda: says in worker.log.read_text(), 20, what="the copy to come")
                release.touch()
                assert result.get(timeout=20) == 1
                after = contract.tasks.note.using(queue="fragile").delay(str(contract.path()), "after")
                assert after.get(timeout=20) == "after"
                worker.ask_to_stop()
                assert worker.wait(20) == 0
            assert contract.depth("fragile") == 0, "the copy was settled"
            assert len(runs(path)) == 1
        finally:
            contract.close()

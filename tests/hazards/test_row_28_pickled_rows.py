"""Row 28: somebody writes a pickle into the table of results; does who reads it run what is in it?"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from qbridge import Bridge, BridgeConfig, PayloadError


class Attack:
    """What runs when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database with one result, which somebody has replaced."""
    place = f"sqlite:///{tmp_path}/results.db"
    app: Any = Celery("plain", backend=f"db+{place}", set_as_current=False)
    app.backend.store_result("1", 3, "SUCCESS")
    engine = sa.create_engine(place)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE celery_taskmeta SET result = :result"),
            {"result": pickle.dumps(Attack(tmp_path / "ran"), 2)},
        )
    engine.dispose()
    app.close()
    return place


def test_plain_celery_runs_it(url: str, tmp_path: Path) -> None:
    """Its own results were pickles once, and it reads such rows as that whatever ``accept_content`` says."""
    app: Any = Celery("plain", backend=f"db+{url}", set_as_current=False)
    app.conf.accept_content = ["json"]
    app.AsyncResult("1").result  # noqa: B018 - reading is what runs it
    assert (tmp_path / "ran").exists()
    app.close()


def test_ours_refuses_it(url: str, tmp_path: Path) -> None:
    """The reader gets an error, and nothing has run."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=url)) as bridge:
        with pytest.raises(PayloadError, match="pickle"):
            bridge.result("1").get(timeout=5)
        assert not (tmp_path / "ran").exists()

"""What rpc results and no results mean to Celery."""

from __future__ import annotations

import celery
import pytest
from celery.app.defaults import DEFAULTS
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend

from qbridge.backends.none import NoResults
from qbridge.backends.rpc import RpcResults
from qbridge.exceptions import ConfigurationError


def test_celery_reads_the_rpc_settings() -> None:
    """Results survive a restart of the broker, and dead senders' queues go after an hour."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(RpcResults(expires=90).celery_settings())
    assert isinstance(app.backend, RPCBackend)
    assert (90, True, False) == (app.backend.expires, app.backend.persistent, app.backend.thread_safe)
    assert set() == set(RpcResults().celery_settings()) - set(DEFAULTS) - {"result_backend_thread_safe"}
    assert 3600.0 == RpcResults().expires


def test_under_celerys_defaults_rpc_sets_what_was_written() -> None:
    """A bridge can join an existing fleet."""
    assert {"result_backend": "rpc://"} == RpcResults.from_url("rpc://").minimal_celery_settings()
    assert {"result_backend": "rpc://", "result_persistent": True} == RpcResults(
        persistent=True
    ).minimal_celery_settings()


@pytest.mark.parametrize("url", ["rpc://u:s3cret@h", "rpc://h", "rpc:///v", "rpc://?expires=1", "redis://h", "rpc"])
def test_rpc_has_no_place_of_its_own(url: str) -> None:
    """Results travel over the broker."""
    with pytest.raises(ConfigurationError) as caught:
        RpcResults.from_url(url)
    assert "s3cret" not in str(caught.value)


def test_rpc_says_what_it_cannot() -> None:
    """Only the sender reads, once."""
    capabilities = RpcResults().capabilities
    assert (False, False, False) == (capabilities.readable_elsewhere, capabilities.chords, capabilities.progress)
    assert ["info"] == [finding.level for finding in RpcResults().check()]


def test_no_results_are_not_computed_for_nobody() -> None:
    """The backend is Celery's disabled one, and tasks know it."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(NoResults.from_url("disabled://").celery_settings())
    assert isinstance(app.backend, DisabledBackend)
    assert app.conf.task_ignore_result
    assert "disabled://" == NoResults().safe_url()
    assert ["info"] == [finding.level for finding in NoResults().check()]
    with pytest.raises(ConfigurationError):
        NoResults.from_url("redis://")

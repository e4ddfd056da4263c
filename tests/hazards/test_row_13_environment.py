"""Row 13: a variable of the environment names another server than the code; who wins, and who is told?"""

from __future__ import annotations

import pytest
from celery import Celery

from qbridge import BridgeConfig, ConfigurationError


def test_plain_celery_goes_to_the_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, also where the application assigns its own."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://staging:6379/1")
    app = Celery("plain", broker="redis://production/0", set_as_current=False)
    assert app.conf.broker_url == "redis://staging:6379/1"
    app.conf.broker_url = "redis://production/0"
    assert app.connection_for_write().hostname == "staging"


def test_ours_refuses_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://staging:6379/1")
    with pytest.raises(ConfigurationError, match="CELERY_BROKER_URL"):
        BridgeConfig(broker="redis://production/0")

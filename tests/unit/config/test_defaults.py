"""What does a bridge get when little or nothing is said?"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from qbridge.backends.database import DatabaseResults
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.backends.none import NoResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.config import BridgeConfig, QueueConfig, SerializationConfig, WorkerConfig
from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry


def test_nothing_said_means_embedded_broker_and_sqlite_beside_it(project: Path) -> None:
    """Without any setting, messages and results go to two files under .qbridge/."""
    config = BridgeConfig()
    assert config.broker == EmbeddedBroker()
    assert isinstance(config.results, DatabaseResults)
    assert config.results.url.get_secret_value().endswith(f":///{project}/.qbridge/results.db")
    assert config.broker_is_default
    assert (config.default_queue, config.delivery, config.timezone) == ("default", "at_least_once", "UTC")
    assert config.findings == ()
    assert not (project / ".qbridge").exists()


def test_results_lie_beside_an_embedded_file_elsewhere(tmp_path: Path) -> None:
    """Results follow the embedded broker to its folder."""
    config = BridgeConfig(broker=EmbeddedBroker(path=tmp_path / "elsewhere" / "b.db"))
    assert isinstance(config.results, DatabaseResults)
    assert config.results.url.get_secret_value().endswith(f"{tmp_path}/elsewhere/results.db")
    assert not config.broker_is_default


def test_a_shared_broker_gets_no_file_for_results() -> None:
    """A file serves one machine, so a broker that serves several has no results until they are configured."""
    assert BridgeConfig(broker="redis://localhost").results == NoResults()


def test_defaults_celery_are_celerys() -> None:
    """Under defaults="celery" what is not set is what Celery would do."""
    config = BridgeConfig(defaults="celery")
    assert isinstance(config.broker, RabbitMQBroker)
    assert config.broker.celery_url() == "amqp://guest:guest@localhost:5672/%2F"
    assert config.results == NoResults()
    assert (config.default_queue, config.delivery) == ("celery", "at_most_once")
    assert config.model_fields_set == {"defaults"}


def test_defaults_celery_keep_what_is_set() -> None:
    """Under defaults="celery" a field that is set counts."""
    config = BridgeConfig(defaults="celery", default_queue="mine", delivery="at_least_once", broker="redis://h")
    assert (config.default_queue, config.delivery, config.broker.kind) == ("mine", "at_least_once", "redis")


def test_config_is_frozen() -> None:
    """A configuration does not change, nor do its raw settings."""
    config = BridgeConfig(celery={"task_track_started": True})
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.celery["x"] = 1  # type: ignore[index]


def test_config_compares_hashes_copies_and_pickles() -> None:
    """Two equal configurations are equal in every process."""
    config = BridgeConfig(
        broker="amqp://u:p@h//", retry=Retry(on=OSError), queues=["a"], celery={"task_track_started": True}
    )
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert other == config
        assert hash(other) == hash(config)
        assert other.broker.celery_url() == config.broker.celery_url()
        assert other.broker_is_default is False


def test_queues_are_found_by_name() -> None:
    """The default queue exists without being listed, and a listed one is taken as it is listed."""
    config = BridgeConfig(queues=["reports", QueueConfig("others", declare=False)])
    assert [queue.name for queue in config.all_queues] == ["default", "reports", "others"]
    assert config.queue("others") == QueueConfig("others", declare=False)
    assert config.queue("reprots") is None
    listed = BridgeConfig(broker="amqp://h//", queues=[QueueConfig("default", type="classic")])
    assert listed.all_queues == (QueueConfig("default", type="classic"),)


def test_small_models_raise_our_error_alone() -> None:
    """A small model built by hand reports like the configuration, not like pydantic."""
    with pytest.raises(ConfigurationError, match=r"WorkerConfig cannot work: pool: .*did you mean 'process'\?"):
        WorkerConfig(pool="proces")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="QueueConfig cannot work: nam: no such field; did you mean 'name'"):
        QueueConfig("a", nam="b")  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="max_payload_bytes"):
        SerializationConfig(max_payload_bytes=0)
    with pytest.raises(TypeError, match="one name"):
        QueueConfig("a", "b")  # type: ignore[misc]


def test_model_validate_reads_a_mapping_like_arguments() -> None:
    """model_validate raises our error too, and returns a config as it is."""
    config = BridgeConfig.model_validate({"broker": "redis://h"})
    assert config.broker.kind == "redis"
    assert BridgeConfig.model_validate(config) is config
    with pytest.raises(ConfigurationError, match="did you mean 'broker'"):
        BridgeConfig.model_validate({"brokr": "redis://h"})
    with pytest.raises(ConfigurationError):
        BridgeConfig.model_validate(3)


def test_importing_and_building_a_config_loads_no_driver() -> None:
    """The configuration imports neither celery nor kombu nor a driver."""
    code = (
        "import sys; from qbridge.config import BridgeConfig; BridgeConfig(broker='amqp://h//', results='rpc://');"
        "print(sorted({'celery', 'kombu', 'amqp', 'redis', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"

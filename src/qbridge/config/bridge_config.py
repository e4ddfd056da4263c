"""The one config of a bridge: which fields, from which sources, under which rules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AnyUrl,
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from qbridge.backends.base import Finding
from qbridge.backends.database import DatabaseResults
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.backends.none import NoResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults
from qbridge.backends.rpc import RpcResults
from qbridge.config.celery_names import check_setting, zone_exists
from qbridge.config.cross_checks import cross_faults
from qbridge.config.environment import CELERY_VARIABLES, conflicting_environment
from qbridge.config.faults import Fault, as_error, attribute, build, faults_of
from qbridge.config.from_celery import Conversion
from qbridge.config.merging import Merged, Said
from qbridge.config.models import QueueConfig, SerializationConfig, WorkerConfig, check_queue_name
from qbridge.config.owned import Lifted, lift, refuse_owned
from qbridge.config.raw_settings import RawSettings
from qbridge.config.retry_policy import read_retry, write_retry
from qbridge.config.rooms import BROKERS, RESULTS
from qbridge.config.sources import gather
from qbridge.config.tree import node_of_model
from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry

__all__ = ["BridgeConfig"]

#: kombu's default broker, for ``defaults="celery"``.
_CELERY_BROKER = "amqp://guest:guest@localhost:5672//"


def _default_broker(given: Mapping[str, Any]) -> RabbitMQBroker | RedisBroker | EmbeddedBroker:
    """Without a broker anywhere: what Celery would use, or the embedded one."""
    return RabbitMQBroker.from_url(_CELERY_BROKER) if given["defaults"] == "celery" else EmbeddedBroker()


def _default_results(given: Mapping[str, Any]) -> RpcResults | RedisResults | DatabaseResults | NoResults:
    """Without a result backend anywhere: SQLite beside the embedded broker's file, else none.

    A file serves one machine, so a broker that serves several gets no such default; Celery's own is none, too.
    """
    broker = given["broker"]
    if isinstance(broker, EmbeddedBroker) and given["defaults"] == "safe":
        # Absolute, as the broker's own URL is: a worker that changes its directory keeps its results.
        return DatabaseResults(url=f"sqlite:///{broker.path.absolute().with_name('results.db')}")
    return NoResults()


def _queues(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigurationError("should be a list of names or of QueueConfig", "write queues=['reports', 'mail']")
    return tuple({"name": part} if isinstance(part, str) else part for part in value)


def _modules(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _raw(value: Any) -> RawSettings:
    if not isinstance(value, Mapping):
        raise ConfigurationError(
            "should be a mapping of Celery's settings", "write celery={'task_track_started': True}, for example"
        )
    # Paths are relative here; the field's own name is put in front by whoever reads the faults.
    found = [fault for name, part in value.items() if (fault := check_setting(str(name), part)) is not None]
    if found:
        raise as_error([Fault(fault.path[1:], fault.what, fault.todo) for fault in found])
    return RawSettings({str(name): part for name, part in value.items()})


class BridgeConfig(BaseSettings):
    """Everything that a bridge needs to know.

    Each field comes from the strongest source that says something about it: arguments, environment variables
    (``QBRIDGE_WORKER__POOL``), ``.env``, ``qbridge.toml``, ``[tool.qbridge]`` in ``pyproject.toml``.

    Args:
        broker: where messages go: a URL, a mapping with its ``kind``, or one of the broker models.
        results: where results are kept, likewise.
        delivery: whether a task whose worker died runs again.
        retry: the ``Retry`` of tasks that name none.
        serialization: how arguments and results are written down.
        worker: what a worker is.
        queues: queues beside those that tasks name.
        default_queue: queue of tasks that name none.
        modules: task modules that a worker imports.
        defaults: ``"safe"``, or ``"celery"``: wherever nothing is set, exactly what Celery would do.
        timezone: IANA name, for schedules and naive times.
        name: of the application, for connection names and monitoring.
        celery: raw Celery settings, the way down.

    Raises:
        ConfigurationError: if anything in any source is unknown or cannot work, one line per fault.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True, use_attribute_docstrings=True
    )

    # First, because what stands for "nothing said" depends on it.
    defaults: Literal["safe", "celery"] = "safe"
    """`safe`: settings that lose nothing; `celery`: wherever nothing is set, exactly what Celery would do."""
    broker: Annotated[
        RabbitMQBroker | RedisBroker | EmbeddedBroker, Field(discriminator="kind"), BeforeValidator(BROKERS.read)
    ] = Field(default_factory=_default_broker)
    """Where messages go: a URL, or the fields of one kind. Unset: a file under `.qbridge/` in the working directory."""
    results: Annotated[
        RpcResults | RedisResults | DatabaseResults | NoResults,
        Field(discriminator="kind"),
        BeforeValidator(RESULTS.read),
    ] = Field(default_factory=_default_results)
    """Where results are kept: a URL, or the fields of one kind.
    Unset: an SQLite file beside the embedded broker's; none with any other broker."""
    delivery: Literal["at_least_once", "at_most_once"] = Field(
        default_factory=lambda given: "at_most_once" if given["defaults"] == "celery" else "at_least_once"
    )
    """Whether a task whose worker died runs again; a task may say otherwise. `at_least_once`, and Celery's
    `at_most_once` under `defaults="celery"`."""
    retry: Annotated[
        InstanceOf[Retry] | None, BeforeValidator(read_retry), PlainSerializer(write_retry, when_used="json")
    ] = None
    """How failed tasks that have no `Retry` of their own are tried again; unset: they are not."""
    serialization: SerializationConfig = SerializationConfig()
    """How arguments and results are written down."""
    worker: WorkerConfig = WorkerConfig()
    """What a worker is."""
    queues: Annotated[tuple[QueueConfig, ...], BeforeValidator(_queues)] = ()
    """Queues beside those that tasks name."""
    default_queue: str = Field(default_factory=lambda given: "celery" if given["defaults"] == "celery" else "default")
    """Queue of tasks that name none; `celery` under `defaults="celery"`."""
    modules: Annotated[tuple[str, ...], BeforeValidator(_modules)] = ()
    """Task modules that a worker imports."""
    timezone: str = "UTC"
    """IANA name of the time zone of schedules and of times without one."""
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    """Name of the application, for task names of `__main__`, connection names and monitoring."""
    celery: Annotated[
        Mapping[str, Any],
        PlainValidator(_raw),
        PlainSerializer(lambda raw: RawSettings(raw).masked(), when_used="json"),
    ] = RawSettings()
    """Raw Celery settings, checked against what Celery 5.7 reads."""

    _findings: tuple[Finding, ...] = PrivateAttr(default=())

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            defaults: Literal["safe", "celery"] = "safe",
            broker: RabbitMQBroker | RedisBroker | EmbeddedBroker | str | SecretStr | AnyUrl | Mapping[str, Any] = ...,
            results: RpcResults
            | RedisResults
            | DatabaseResults
            | NoResults
            | str
            | SecretStr
            | AnyUrl
            | Mapping[str, Any] = ...,
            delivery: Literal["at_least_once", "at_most_once"] = "at_least_once",
            retry: Retry | None = None,
            serialization: SerializationConfig | Mapping[str, Any] = ...,
            worker: WorkerConfig | Mapping[str, Any] = ...,
            queues: Iterable[QueueConfig | str | Mapping[str, Any]] = (),
            default_queue: str = "default",
            modules: Iterable[str] = (),
            timezone: str = "UTC",
            name: str | None = None,
            celery: Mapping[str, Any] = ...,
        ) -> None: ...

    else:

        def __init__(self, /, **values: Any) -> None:
            said = gather(node_of_model(type(self)), values)
            lifted = _adopt_celery(said) if said.values.get("defaults") == "celery" else []
            problems = list(said.faults)
            try:
                build(type(self), lambda: super(BridgeConfig, self).__init__(**said.values))
            except ConfigurationError as error:
                problems += faults_of(error)
            else:
                problems += [] if problems else self._judge(lifted)
            if problems:
                raise as_error(attribute(problems, said.origin))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave the sources to ``gather``, which refuses unknown names and knows who said what."""
        return (init_settings,)

    @classmethod
    def from_celery(
        cls, source: Mapping[str, Any] | ModuleType | str | object, namespace: str | None = None
    ) -> BridgeConfig:
        """Make a config of an existing Celery configuration; what cannot be taken over is in ``.findings``.

        Args:
            source: a mapping, a module, the dotted name of one (``"proj.celeryconfig"``, ``"proj.conf:Config"``), or
                any object with settings as attributes, such as ``django.conf.settings``.
            namespace: the prefix of the settings, as in ``config_from_object(..., namespace="CELERY")``; None: none,
                unless the names show that there is one (``CELERY_BROKER_URL``).

        Returns:
            A config with ``defaults="celery"``.

        Raises:
            ConfigurationError: if the source cannot be read at all, or the result cannot work.
        """
        read = Conversion(source, namespace)
        config = read.build(cls)
        config._findings = tuple(read.findings)
        return config

    @field_validator("default_queue")
    @classmethod
    def _default_queue_fits(cls, value: str) -> str:
        return check_queue_name(value)

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, value: str) -> str:
        if not zone_exists(value):
            raise ConfigurationError(
                "there is no such time zone here",
                "write an IANA name such as 'UTC' or 'Europe/Berlin' (without a database of zones: pip install tzdata)",
            )
        return value

    @field_validator("modules")
    @classmethod
    def _modules_are_dotted(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ConfigurationError(
                    f"{name[:80]!r} is not the name of a module", "write it as in an import: 'proj.tasks'"
                )
        return value

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What ``from_celery`` could not take over, or Celery had ignored in silence; else empty."""
        return self._findings

    @property
    def broker_is_default(self) -> bool:
        """True if no source says anything about the broker."""
        return "broker" not in self.model_fields_set

    @property
    def all_queues(self) -> tuple[QueueConfig, ...]:
        """The queues of the configuration, the default one among them and first if it is not listed."""
        if any(queue.name == self.default_queue for queue in self.queues):
            return self.queues
        return (QueueConfig(self.default_queue), *self.queues)

    def queue(self, name: str) -> QueueConfig | None:
        """Find a queue.

        Args:
            name: its name.

        Returns:
            The queue of that name, or None if the configuration does not have it.
        """
        return next((queue for queue in self.all_queues if queue.name == name), None)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Read a mapping like arguments.

        Args:
            obj: a mapping of fields, or a ``BridgeConfig``.
            options: pydantic's own; only ``strict``-less, context-less validation is supported, others are ignored.

        Raises:
            ConfigurationError: if it cannot work.
        """
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise ConfigurationError(
                "a configuration is a mapping of fields", "write BridgeConfig(broker='redis://...')"
            )
        return cls(**{str(name): value for name, value in obj.items()})

    def _judge(self, lifted: list[Lifted]) -> list[Fault]:
        found = list(cross_faults(self))
        if self.defaults == "safe":
            found += refuse_owned(self.celery)
        else:
            found += [fault for said in lifted if (fault := self._contradicts(said)) is not None]
        for finding in conflicting_environment(self):
            found.append(Fault((), finding.what, finding.todo))
        return found

    def _contradicts(self, said: Lifted) -> Fault | None:
        """A raw setting against the field that another source gave a value."""
        held: Any = self
        for step in said.field:
            held = getattr(held, step)
        if _means(said, held):
            return None
        field = ".".join(said.field)
        return Fault(("celery", said.setting), f"says something else than {field}", f"keep one of them, best {field}")


def _means(said: Lifted, held: Any) -> bool:
    if said.field[0] in ("broker", "results") and len(said.field) == 1:
        side = BROKERS if said.field[0] == "broker" else RESULTS
        try:
            meant = side.read(said.value)
        except ConfigurationError:
            return False
        return bool(meant.kind == held.kind and meant.celery_url() == held.celery_url())
    if said.field == ("queues",):
        return {queue["name"] for queue in said.value} <= {queue.name for queue in held}
    if said.field == ("modules",):
        return set(said.value) <= set(held)
    return bool(said.value == held)


def _adopt_celery(said: Merged) -> list[Lifted]:
    """Under ``defaults="celery"``: fill fields that nobody set from raw settings and from Celery's own variables."""
    raw = said.values.get("celery")
    taken: list[Lifted] = []
    if isinstance(raw, Mapping):
        sound = {name: value for name, value in raw.items() if check_setting(str(name), value) is None}
        taken = lift(sound)
        for one in taken:
            if not said.has(one.field):
                said.add(Said(one.field, one.value, f"celery[{one.setting!r}]"))
    for variable in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        field = CELERY_VARIABLES[variable]
        if field not in said.values and (url := os.environ.get(variable)):
            said.add(Said((field,), url, f"environment variable {variable}"))
    return taken

"""Which room does a URL or a mapping mean?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import AnyUrl, BaseModel, SecretStr

from qbridge.backends.database import DatabaseResults
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.backends.none import NoResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults
from qbridge.backends.rpc import RpcResults
from qbridge.config.suggest import did_you_mean
from qbridge.exceptions import ConfigurationError

__all__ = ["BROKERS", "RESULTS", "AnyBroker", "AnyResults", "Side", "explicit", "url_text"]

AnyBroker = RabbitMQBroker | RedisBroker | EmbeddedBroker
AnyResults = RpcResults | RedisResults | DatabaseResults | NoResults

#: Words that Celery takes for a URL.
_BARE = {"disabled": "none", "amqp": "rabbitmq"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]{0,39})://")


@dataclass(frozen=True)
class Side:
    """One of the two tagged unions, with everything that reading it needs.

    Args:
        word: what it is called in messages.
        rooms: model per ``kind``.
        default: the ``kind`` that is meant where no field tells.
        examples: URLs for messages.
    """

    word: str
    rooms: Mapping[str, type[Any]]
    default: str
    examples: str

    def read(self, value: Any) -> Any:
        """Make of a URL, a mapping or a room what pydantic's tagged union can validate.

        Args:
            value: what the operator wrote.

        Returns:
            A room, or a mapping with its ``kind``.

        Raises:
            ConfigurationError: if it cannot be told which room is meant; never shows the value.
        """
        text = url_text(value)
        if text is not None:
            return self.from_url(text)
        if isinstance(value, Mapping):
            return self._read_mapping({str(name): part for name, part in value.items()})
        if isinstance(value, tuple(self.rooms.values())):
            return value
        names = ", ".join(model.__name__ for model in self.rooms.values())
        raise ConfigurationError(
            f"the {self.word} is {_article(type(value).__name__)}",
            f"write a URL such as {self.examples}, or one of {names}",
        )

    def from_url(self, url: str) -> Any:
        """Read a URL.

        Args:
            url: with its password, if any.

        Returns:
            The room.

        Raises:
            ConfigurationError: if the scheme is unknown or the room cannot read the rest.
        """
        kind = self.kind_of_url(url)
        if url.startswith("unix://"):  # redis-py's word for kombu's redis+socket
            url = f"redis+socket{url.removeprefix('unix')}"
        _refuse_misread(url, kind)
        model = self.rooms[kind]
        return model() if url == kind and kind != "none" else model.from_url(url)

    @property
    def schemes(self) -> Mapping[str, str]:
        """The ``kind`` behind each URL scheme."""
        known = {scheme: kind for kind, model in self.rooms.items() for scheme in model.schemes}
        return {**known, "unix": "redis"}

    def kind_of_url(self, url: str) -> str:
        """Tell which room a URL means, without reading the rest of it.

        Args:
            url: with its password, if any.

        Raises:
            ConfigurationError: if no room is meant.
        """
        if url in self.rooms:
            return url
        if url in _BARE and _BARE[url] in self.rooms:
            return _BARE[url]
        found = _SCHEME.match(url)
        if found is None:
            # Not even a part of it is shown: who forgot the scheme may have written user:password@host.
            todo = did_you_mean(url, self.rooms) if url.isalpha() and len(url) < 10 else ""
            what = "is not a URL" if url.strip() else "is empty"
            raise ConfigurationError(f"the {self.word} {what}", todo or f"write one such as {self.examples}")
        scheme = found[1].lower()
        # db+postgresql://, postgresql+psycopg://: what is in front of the plus sign says which service is meant.
        kind = self.schemes.get(scheme) or self.schemes.get(scheme.partition("+")[0])
        if kind is None:
            raise ConfigurationError(
                f"no {self.word} here speaks {scheme}://",
                did_you_mean(scheme, self.schemes) or f"known: {', '.join(f'{name}://' for name in self.schemes)}",
            )
        return kind

    def _read_mapping(self, given: dict[str, Any]) -> Any:
        url = given.get("url")
        kind = given.get("kind")
        if url is not None and (text := url_text(url)) is not None:
            of_url = self.kind_of_url(text)
            if kind is not None and kind != of_url:
                raise ConfigurationError(
                    f"the {self.word} has a kind and the URL of another, {of_url!r}", "leave kind out"
                )
            base = explicit(self.from_url(text))
            return {**base, **{name: part for name, part in given.items() if name != "url"}, "kind": of_url}
        if kind is not None:
            if not isinstance(kind, str) or kind not in self.rooms:
                todo = did_you_mean(kind, self.rooms) if isinstance(kind, str) else ""
                raise ConfigurationError(
                    f"there is no such kind of {self.word}", todo or f"known: {', '.join(self.rooms)}"
                )
            return given
        return {**given, "kind": self._kind_of_fields(set(given))}

    def _kind_of_fields(self, names: set[str]) -> str:
        fitting = [kind for kind, model in self.rooms.items() if names <= set(model.model_fields)]
        if self.default in fitting:
            return self.default
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ConfigurationError(
                f"{_these(names)} may mean {' or '.join(fitting)}, and no kind tells which {self.word} is meant",
                f"write kind ({' or '.join(map(repr, fitting))}) beside, or a URL such as {self.examples}",
            )
        known = {name: kind for kind, model in self.rooms.items() for name in model.model_fields}
        strangers = sorted(names - set(known))
        if strangers:
            todo = did_you_mean(strangers[0], known) or f"known: {', '.join(sorted(known))}"
            raise ConfigurationError(f"no {self.word} has {_these(set(strangers))}", todo)
        raise ConfigurationError(
            f"no single {self.word} has {_these(names)}", f"write a kind beside: {', '.join(self.rooms)}"
        )


BROKERS = Side(
    word="broker",
    rooms={"rabbitmq": RabbitMQBroker, "redis": RedisBroker, "embedded": EmbeddedBroker},
    default="embedded",
    examples="amqp://user:password@host//, redis://host/0 or embedded:///path/to/bridge.db",
)

RESULTS = Side(
    word="result backend",
    rooms={"rpc": RpcResults, "redis": RedisResults, "database": DatabaseResults, "none": NoResults},
    default="database",
    examples="rpc://, redis://host/1, postgresql+psycopg://user:password@host/name or none",
)


def url_text(value: Any) -> str | None:
    """The text of a URL, however it is wrapped; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, AnyUrl) or type(value).__module__.startswith("pydantic.networks"):
        return str(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, str) for part in value):
        return ";".join(value)  # kombu's way to write several servers
    return None


def _refuse_misread(url: str, kind: str) -> None:
    """Refuse URLs of which a part of the password would be taken for something that is printed: a path, a host."""
    if kind == "database" and url.count("://") > 1:
        raise ConfigurationError("this is a list of database URLs", "write one")
    for one in url.split(";"):
        scheme, _, rest = one.partition("://")
        if kind == "embedded" or "sqlite" in scheme:
            continue  # no password, and a file may be called as it likes
        authority = re.split("[/?#]", rest, maxsplit=1)[0]
        # SQLAlchemy ends the password at its first '@', kombu at the last one before the path.
        early = authority.partition(":")[2].count("@") > 1 if kind == "database" else False
        if early or "@" in rest[len(authority) :]:
            raise ConfigurationError(
                "this URL has an unquoted '@' behind its host, or an unquoted '/', '?' or '#' in its password",
                "percent-encode special characters in name and password (urllib.parse.quote(password, safe=''))",
            )


def explicit(room: BaseModel) -> dict[str, Any]:
    """The fields that were set on a room, nested models too, as a mapping that other values can be laid over."""
    return {
        name: explicit(part) if isinstance(part := getattr(room, name), BaseModel) else part
        for name in room.model_fields_set
    }


def _these(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "these fields"


def _article(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"

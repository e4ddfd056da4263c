"""Whatever is written: a configuration or a ConfigurationError, and never a secret."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from qbridge.backends.base import Finding
from qbridge.config import BridgeConfig, describe, known_settings
from qbridge.exceptions import ConfigurationError

CANARY = "Zq7CanaryXw"
SCHEMES = (
    "amqp", "amqps", "pyamqp", "redis", "rediss", "sentinel", "redis+socket", "unix", "embedded", "rpc", "disabled",
    "db+postgresql", "postgresql+psycopg", "mysql+pymysql", "mongodb", "amqpp", "", "x y",
)  # fmt: skip
VARIABLES = sorted({row.environment for row in describe() if row.environment})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 70000), st.floats(), st.text(max_size=12), st.binary(max_size=4)
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
#: A password with characters that URLs do not like; what is checked for is the canary in it.
passwords = st.builds(
    lambda before, after: f"{CANARY}{before}{CANARY}{after}",
    st.text("@/#?%:;é &", max_size=3),
    st.text("@/#?%:;é &", max_size=3),
)


@st.composite
def urls(draw: st.DrawFn) -> str:
    """URLs with a password, right and wrong in many ways."""
    password = draw(passwords)
    if draw(st.booleans()):
        password = quote(password, safe="")
    scheme = draw(st.sampled_from(SCHEMES))
    user = draw(st.sampled_from(["", "u", "u%40"]))
    host = draw(st.sampled_from(["", "h", "h:1", "h:x", "[::1]", "[::1", "h:99999999", "a b"]))
    path = draw(st.sampled_from(["", "/", "//", "/0", "/x", "//x", "/%2F", "/x?y=1", "/0?ssl_cert_reqs=none", "#f"]))
    separator = draw(st.sampled_from(["://", "://", "://", ":/", ""]))
    url = f"{scheme}{separator}{user}:{password}@{host}{path}"
    return f"{url};{url}" if draw(st.booleans()) else url


def judge(construct: Any, *args: Any, **kwargs: Any) -> BridgeConfig | None:
    """Build a config and look for the canary in everything that can be printed."""
    seen: list[str] = []
    config: BridgeConfig | None = None
    caught: ConfigurationError | None = None
    try:
        config = construct(*args, **kwargs)
    except ConfigurationError as error:
        caught = error
        seen += [str(error), repr(error), repr(error.__dict__), *traceback.format_exception(error)]
    if caught is not None:
        assert (caught.__cause__, caught.__context__) == (None, None)
        assert str(caught)
    else:
        assert isinstance(config, BridgeConfig)
        seen += [repr(config), str(config), str(config.model_dump()), config.model_dump_json()]
        seen += [config.broker.safe_url(), config.results.safe_url(), repr(config.findings)]
    for text in seen:
        assert CANARY not in text
    return config


@given(broker=urls(), results=urls())
def test_any_url(broker: str, results: str) -> None:
    """Passwords in URLs, readable or not, never come out."""
    judge(BridgeConfig, broker=broker)
    judge(BridgeConfig, results=results)


@given(st.dictionaries(st.sampled_from(sorted(BridgeConfig.model_fields)) | st.text(max_size=8), anything, max_size=4))
def test_any_arguments(arguments: dict[str, Any]) -> None:
    """Any values for any fields make a config or a ConfigurationError."""
    judge(BridgeConfig, **arguments)


@given(
    kind=st.sampled_from(["rabbitmq", "redis", "embedded", "rpc", "database", "none", "x", None]),
    fields=st.dictionaries(
        st.sampled_from([row.path.partition(".")[2] for row in describe() if row.path.startswith(("broker.", "res"))]),
        anything,
        max_size=4,
    ),
    url=st.none() | urls(),
)
def test_any_mapping_for_a_room(kind: str | None, fields: dict[str, Any], url: str | None) -> None:
    """Any fields of a room, with passwords among them, likewise."""
    given_fields = {**fields, "password": CANARY}
    if kind is not None:
        given_fields["kind"] = kind
    if url is not None:
        given_fields["url"] = url
    judge(BridgeConfig, broker=given_fields)
    judge(BridgeConfig, results=given_fields)


@given(
    st.dictionaries(
        st.sampled_from(VARIABLES) | st.from_regex(r"\AQBRIDGE_[A-Z_]{0,12}\Z").filter(lambda n: "TEST" not in n),
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
            st.just(CANARY),
            urls().filter(lambda url: "\x00" not in url),
            st.sampled_from(['{"a": 1}', f'{{"password": "{CANARY}"', f'["{CANARY}', "[1", "none", "1", "true"]),
        ),
        max_size=4,
    )
)
def test_any_environment(variables: dict[str, str]) -> None:
    """Any variables make a config or a ConfigurationError; what is not a secret's place may show its own text."""
    harmless = {"QBRIDGE_NAME", "QBRIDGE_DEFAULT_QUEUE", "QBRIDGE_QUEUES", "QBRIDGE_MODULES", "QBRIDGE_TIMEZONE"}
    secretless = {
        name: value
        for name, value in variables.items()
        if name not in harmless and not name.endswith(("USERNAME", "HOST", "HOSTS", "VHOST", "PATH", "UNIX_SOCKET"))
        and not name.endswith("HEALTH_FILE")
        and not name.endswith(("KEY_PREFIX", "MASTER_NAME", "ON", "SERVER_HOSTNAME", "TABLE_NAMES", "SCHEMAS"))
    }  # fmt: skip
    with mock.patch.dict(os.environ, secretless):
        judge(BridgeConfig)


settings_mappings = st.dictionaries(
    st.one_of(
        st.sampled_from(sorted(known_settings())),
        st.sampled_from(sorted(known_settings())).map(lambda name: f"CELERY_{name.upper()}"),
        st.sampled_from(sorted(known_settings())).map(lambda name: name[:-1]),
        st.text(max_size=8),
    ),
    st.one_of(anything, st.just(CANARY), urls()),
    max_size=5,
)


@given(settings_mappings)
def test_any_raw_settings(settings: dict[str, Any]) -> None:
    """Raw settings are taken or refused, and their values are not shown."""
    secret = {name: value for name, value in settings.items() if "queue" not in name.lower()}
    judge(BridgeConfig, celery=secret)


@given(settings_mappings, st.sampled_from([None, "CELERY", "X"]))
def test_any_celery_configuration(settings: dict[str, Any], namespace: str | None) -> None:
    """from_celery reports; what it reports shows no value."""
    harmless = ("queue", "imports", "include", "timezone", "user", "host", "vhost", "prefix", "table", "schemas")
    secret = {name: value for name, value in settings.items() if not any(word in name.lower() for word in harmless)}
    config = judge(BridgeConfig.from_celery, secret, namespace)
    if config is not None:
        assert all(isinstance(finding, Finding) and finding.what for finding in config.findings)


@given(st.text(max_size=300))
def test_any_file(text: str) -> None:
    """Any text in any of the files makes a config or a ConfigurationError that shows none of it."""
    for name in ("qbridge.toml", ".env", "pyproject.toml"):
        path = Path.cwd() / name
        path.write_text(f"[tool.qbridge]\n{text}\n{CANARY}", encoding="utf-8", errors="replace")
        try:
            judge(BridgeConfig)
        finally:
            path.unlink()

"""``check`` on a real Redis: each trouble by its name, nothing changed on the server, no secret said."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import celery
import pytest
from kombu.exceptions import OperationalError
from pydantic import SecretStr

from qbridge.backends.base import Finding
from qbridge.backends.redis import RedisBroker, RedisResults, Sentinel, scripts
from qbridge.backends.tls import TLS
from qbridge.config import QueueConfig
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

SECRET = "s3cret-password"


@pytest.fixture
def url(qbridge_redis: RedisServer) -> Iterator[str]:
    """URL of an empty database."""
    with qbridge_redis.heal().fresh() as url:
        yield url


@contextmanager
def account(server: RedisServer, url: str, *rules: str) -> Iterator[tuple[RedisBroker, RedisResults]]:
    """Both models for an ACL user with these rules."""
    update = {"username": "weak", "password": SecretStr(SECRET)}
    with server.client(url) as client:
        client.execute_command("ACL", "SETUSER", "weak", "reset", "on", f">{SECRET}", *rules)
        try:
            yield (
                RedisBroker.from_url(url).model_copy(update=update),
                RedisResults.from_url(url).model_copy(update=update),
            )
        finally:
            client.execute_command("ACL", "DELUSER", "weak")


@contextmanager
def setting(server: RedisServer, **settings: str) -> Iterator[None]:
    """Redis settings for the length of a block."""
    with server.client() as client:
        before = {name: client.config_get(name)[name] for name in settings}
        try:
            for name, value in settings.items():
                client.config_set(name, value)
            yield
        finally:
            for name, value in before.items():
                client.config_set(name, value)


def look(room: RedisBroker | RedisResults, *queues: QueueConfig) -> dict[str, Finding]:
    """Findings by code; their time is bounded and they keep the password to themselves."""
    bound = room.publish_timeout if isinstance(room, RedisBroker) else 3 * room.socket_timeout
    started = time.monotonic()
    findings = list(room.check(queues) if isinstance(room, RedisBroker) else room.check())
    assert time.monotonic() - started < bound + 1
    assert SECRET not in repr(findings)
    assert all(finding.todo for finding in findings if finding.level in ("error", "warning"))
    return {finding.code: finding for finding in findings}


def errors(found: dict[str, Finding]) -> Sequence[str]:
    """Codes of what is wrong."""
    return [code for code, finding in found.items() if finding.level == "error"]


def test_a_healthy_server_has_no_errors_and_is_left_as_it_was(url: str, qbridge_redis: RedisServer) -> None:
    """Its version is named; not a key appears."""
    assert [] == errors(broker := look(RedisBroker.from_url(url), QueueConfig("default")))
    assert [] == errors(results := look(RedisResults.from_url(url)))
    assert "Redis" in broker["broker.server"].what
    assert "results.server" in results
    with qbridge_redis.client(url) as client:
        assert [] == client.keys("*")


def test_how_long_a_killed_workers_tasks_wait_is_said(url: str) -> None:
    """As long as ``lease``."""
    found = look(RedisBroker.from_url(url).model_copy(update={"lease": 12.0}))
    assert "run elsewhere after 12 s" in found["broker.lease"].what


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_policy_that_throws_keys_away_is_named(policy: str, url: str, qbridge_redis: RedisServer) -> None:
    """Tasks would go first: an error. Results come back by running again: a warning."""
    with setting(qbridge_redis, **{"maxmemory": "100mb", "maxmemory-policy": policy}):
        assert ["broker.eviction_policy"] == errors(found := look(RedisBroker.from_url(url)))
        assert policy in found["broker.eviction_policy"].what
        assert "noeviction" in found["broker.eviction_policy"].todo
        assert "warning" == look(RedisResults.from_url(url))["results.eviction_policy"].level


def test_tasks_in_memory_only_are_a_warning(url: str, qbridge_redis: RedisServer) -> None:
    """A restart of Redis loses them."""
    assert "warning" == look(RedisBroker.from_url(url))["broker.persistence"].level
    with setting(qbridge_redis, appendonly="yes"):
        assert "broker.persistence" not in look(RedisBroker.from_url(url))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (("~*", "&*", "+@all", "-lpush", "-evalsha"), "LPUSH, EVALSHA"),
        (("~other*", "&*", "+@all"), "keys 'default'"),
        (("~*", "resetchannels", "+@all"), "channels"),
        (("~*", "&*", "+ping", "+info", "+client", "+select"), "MULTI"),
        (("~*", "&*"), "first command"),
    ],
)
def test_a_missing_permission_is_named(rules: Sequence[str], words: str, url: str, qbridge_redis: RedisServer) -> None:
    """Which command, key or channel, and how it is given."""
    with account(qbridge_redis, url, *rules) as (broker, _):
        assert ["broker.permission"] == errors(found := look(broker, QueueConfig("default")))
        assert words in found["broker.permission"].what
        assert "ACL SETUSER weak" in found["broker.permission"].todo


def test_every_command_of_the_scripts_is_asked_for(url: str, qbridge_redis: RedisServer) -> None:
    """What an account may not run ends a script half-way."""
    texts = [script.text for script in vars(scripts).values() if isinstance(script, scripts.Script)]
    used = {name for text in texts for pair in re.findall(r"call\('(\w+)'|ours\([^,]+, '(\w+)'", text) for name in pair}
    assert {"TIME", "HEXISTS", "XADD", "GET", "LPOS"} < used
    rules = ("~*", "&*", "+ping", "+info", "+client", "+select", "+multi", "+discard", "+subscribe")
    with account(qbridge_redis, url, *rules) as (broker, _):
        named = look(broker, QueueConfig("default"))["broker.permission"].what
        assert set() == used - set(re.findall(r"[A-Z]+", named)) - {""}


def test_the_recommended_acl_is_enough(url: str, qbridge_redis: RedisServer) -> None:
    """What the findings say to grant is granted here, with a key prefix."""
    with account(qbridge_redis, url, "~app:*", "&*", "+@all", "-@dangerous", "+info") as rooms:
        for room in rooms:
            assert [] == errors(look(room.model_copy(update={"key_prefix": "app:"})))
        assert ["results.permission"] == errors(look(rooms[1]))


def test_a_wrong_password_is_named_as_such(url: str, qbridge_redis: RedisServer) -> None:
    """And is not shown."""
    with account(qbridge_redis, url, "+@all") as rooms:
        for room in rooms:
            wrong = room.model_copy(update={"password": SecretStr(f"{SECRET}x")})
            assert [f"{'broker' if isinstance(room, RedisBroker) else 'results'}.credentials"] == errors(look(wrong))


def test_a_password_that_nobody_asked_for_is_named(url: str) -> None:
    """Redis refuses it; so do we, with its reason."""
    found = look(RedisBroker.from_url(url).model_copy(update={"password": SecretStr(SECRET)}))
    assert "has no password" in found["broker.credentials"].what


def test_a_server_with_a_password_wants_it() -> None:
    """Without it nothing is looked at."""
    with RedisServer(requirepass=SECRET) as server:
        broker = RedisBroker(host="127.0.0.1", port=server.port)
        assert "did not get a password" in look(broker)["broker.credentials"].what
        assert [] == errors(look(broker.model_copy(update={"password": SecretStr(SECRET)})))


def test_a_database_that_is_not_there_is_named(url: str) -> None:
    """There are 16 unless the server's configuration says otherwise."""
    assert ["broker.db_missing"] == errors(look(RedisBroker.from_url(url).model_copy(update={"db": 100_000})))


def test_a_cluster_is_refused() -> None:
    """kombu cannot use one."""
    with RedisServer(settings={"cluster-enabled": "yes", "databases": "1"}) as server:
        assert ["broker.cluster"] == errors(look(RedisBroker(host="127.0.0.1", port=server.port)))


def test_a_replica_is_refused(qbridge_redis: RedisServer) -> None:
    """It takes no writes."""
    with RedisServer() as replica, replica.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        assert ["results.replica"] == errors(look(RedisResults(host="127.0.0.1", port=replica.port)))


def test_a_unix_socket_is_looked_at() -> None:
    """And its absence named."""
    with RedisServer(unix_socket=True) as server:
        path = str(server.unix_socket)
        assert [] == errors(look(RedisBroker(unix_socket=path)))
        assert path in look(RedisResults(unix_socket=path))["results.server"].what
    assert path in look(RedisBroker(unix_socket=path))["broker.unreachable"].what


def test_tls_is_looked_at() -> None:
    """With a CA it is fine, without it is not trusted, without TLS it is not understood."""
    with RedisServer(tls=True) as server:
        assert server.ca is not None
        where: dict[str, Any] = {"host": "localhost", "port": server.port}
        assert [] == errors(look(RedisBroker(**where, tls=TLS(ca_file=server.ca.certificate))))
        assert "not trusted" in look(RedisBroker(**where, tls=True))["broker.tls"].what
        assert ["broker.check_failed"] == errors(look(RedisBroker(**where)))


def test_a_frozen_server_is_named_in_time(url: str, qbridge_redis: RedisServer) -> None:
    """It accepts, and does not answer."""
    qbridge_redis.freeze()
    try:
        assert ["broker.frozen"] == errors(look(RedisBroker.from_url(url).model_copy(update={"publish_timeout": 2.0})))
        assert ["results.frozen"] == errors(look(RedisResults.from_url(url).model_copy(update={"socket_timeout": 0.5})))
    finally:
        qbridge_redis.heal()


def test_nobody_there_is_named() -> None:
    """Refused, or not known to the name service."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = look(RedisBroker(host="127.0.0.1", port=closed.getsockname()[1]))
        assert "refused" in found["broker.unreachable"].what
    assert "name service" in look(RedisResults(host="no.such.host.invalid"))["results.unreachable"].what


def test_sentinels_are_asked_for_the_master(qbridge_redis: RedisServer) -> None:
    """What is no Sentinel is named; the others are asked too."""
    sentinel = Sentinel(hosts=[f"127.0.0.1:{qbridge_redis.port}", "127.0.0.1:1"], master_name="m")
    found = look(RedisBroker(sentinel=sentinel))
    assert {"broker.sentinel", "broker.unreachable"} == set(errors(found))


def test_a_plain_send_to_a_frozen_server_ends_in_time(url: str, qbridge_redis: RedisServer) -> None:
    """kombu alone, under our settings: three answers are waited for, which is ``publish_timeout``."""
    broker = RedisBroker.from_url(url).model_copy(update={"publish_timeout": 4.5})
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(broker.celery_settings(), task_ignore_result=True)
    app.send_task("warm")
    qbridge_redis.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(OperationalError):
            app.send_task("cold")
        assert time.monotonic() - started < 4.5 + 1
    finally:
        qbridge_redis.heal()
        app.close()


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # by Celery's own backend
def test_a_plain_result_on_a_frozen_server_is_given_up(url: str, qbridge_redis: RedisServer) -> None:
    """Celery alone, under our settings: four attempts of one ``socket_timeout``, and the waits between them."""
    results = RedisResults.from_url(url).model_copy(update={"socket_timeout": 0.5})
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(results.celery_settings())
    backend = app.backend
    backend.store_result("warm", 1, "SUCCESS")
    wait_until(lambda: backend.get_task_meta("warm")["status"] == "SUCCESS", timeout=5, what="the result")
    qbridge_redis.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(Exception, match="failed to store"):
            backend.store_result("cold", 1, "SUCCESS")
        assert time.monotonic() - started < 4 * 0.5 + 3 + 1
    finally:
        qbridge_redis.heal()
        app.close()


def test_keys_of_others_are_named_by_their_kind(url: str, qbridge_redis: RedisServer) -> None:
    """A cache in the same database is a warning; queues, results and what Celery keeps beside them are not."""
    with qbridge_redis.client(url) as client:
        client.rpush("any-queue", "x")
        client.set("celery-task-meta-1", "x")
        client.sadd("_kombu.binding.celery", "x")
        client.hset("unacked", "x", "x")
        client.hset("qbridge.claims", "x", "x")
        for room in (RedisBroker.from_url(url), RedisResults.from_url(url)):
            assert not any(code.endswith(".shared") for code in look(room))
        client.set("session:8d9f-secret-of-somebody", "x")
        for number in range(1000):
            client.rpush(f"queue-{number}", "x")
        client.zadd("ranking", {"x": 1})
        found = [look(RedisBroker.from_url(url))["broker.shared"], look(RedisResults.from_url(url))["results.shared"]]
        for finding in found:
            assert "warning" == finding.level
            assert "secret-of-somebody" not in finding.what
            assert "'session…'" in finding.what or "'ranking…'" in finding.what
        prefixed = RedisResults.from_url(url).model_copy(update={"key_prefix": "app:"})
        assert "results.shared" not in look(prefixed)

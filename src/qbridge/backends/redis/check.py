"""What is wrong between us and this Redis? A look at the live server that changes nothing on it.

Permissions are asked for by queueing the real commands on the real keys in a MULTI that is then discarded: Redis
looks at the account when a command is queued, and runs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from qbridge.backends.base import Finding
from qbridge.backends.network import reach, redact
from qbridge.backends.redis.explain import Part, explain, secrets_of, who
from qbridge.backends.redis.neighbours import shared
from qbridge.backends.urls import Address

if TYPE_CHECKING:
    from qbridge.backends.redis.broker import RedisBroker
    from qbridge.backends.redis.results import RedisResults
    from qbridge.backends.redis.server import RedisServer

__all__ = ["check_broker", "check_results"]


_PRIORITY_SEPARATOR = "\x06\x16"
"""Between a queue's name and a priority, in the name of kombu's list for it."""


@dataclass(frozen=True)
class _Probe:
    """A command that the account must be allowed to run, on a key that it must be allowed to use."""

    key: str
    command: tuple[str | float, ...]


def _on(key: str, *commands: str) -> list[_Probe]:
    """Probes for commands written as in redis-cli, with ``KEY`` in the place of the key."""
    return [_Probe(key, tuple(key if word == "KEY" else word for word in command.split())) for command in commands]


def check_broker(broker: RedisBroker, queues: Sequence[Any] = ()) -> tuple[Finding, ...]:
    """Look at a Redis that is to be a broker, within ``publish_timeout`` seconds."""
    prefix = broker.key_prefix
    probes: list[_Probe] = []
    for name in [queue.name for queue in queues] or ["default"]:
        queue = f"{prefix}{name}"
        probes += _on(queue, "LPUSH KEY x", "RPUSH KEY x", "BRPOP KEY 1", "RPOP KEY", "LLEN KEY", "DEL KEY")
        probes += _on(f"{queue}.dead", "LPUSH KEY x", "LRANGE KEY 0 0", "LPOS KEY x", "LREM KEY 1 x")
        wake = f"{prefix}qbridge.wake.{name}"
        probes += _on(wake, "XADD KEY * w 1", "PEXPIRE KEY 1", "XREAD STREAMS KEY 0", "DEL KEY")
        probes += _on(f"{queue}{_PRIORITY_SEPARATOR}9", "LPUSH KEY x")
    # kombu's own bookkeeping: what is delivered and not acknowledged, and which queues an exchange has.
    probes += _on(f"{prefix}unacked", "HSET KEY x x", "HGET KEY x", "HDEL KEY x")
    probes += _on(f"{prefix}unacked_index", "ZADD KEY 0 x", "ZREM KEY x", "ZRANGE KEY 0 0 BYSCORE")
    probes += _on(f"{prefix}unacked_mutex", "SET KEY x NX EX 1", f"EVALSHA {'0' * 40} 1 KEY")
    # What our scripts run, which are themselves sent whole the first time.
    probes += _on(
        f"{prefix}qbridge.claims", "EVAL return 1 KEY", "HSET KEY x x", "HGETALL KEY", "HEXISTS KEY x", "TIME"
    )
    probes += _on(f"{prefix}qbridge.holders", "ZADD KEY 0 x", "ZRANGE KEY 0 0", "ZREM KEY x", "ZSCORE KEY x")
    probes += _on(f"{prefix}qbridge.again", "HSET KEY x x", "HGET KEY x", "HDEL KEY x")
    probes += _on(f"{prefix}qbridge.swept", "GET KEY", "SET KEY x")
    probes += _on(f"{prefix}qbridge.schedule", "ZADD KEY 0 x", "ZRANGEBYSCORE KEY 0 0", "ZREM KEY x")
    probes += _on(f"{prefix}qbridge.scheduled", "HSET KEY x x", "HGET KEY x", "HDEL KEY x")
    probes += _on(f"{prefix}_kombu.binding.celery", "SADD KEY x", "SREM KEY x", "SMEMBERS KEY")
    probes += _on(f"{prefix}/{broker.db}.celery.pidbox", "PUBLISH KEY x")
    visit = _Visit("broker", broker, broker.publish_timeout, probes)
    findings = visit.findings()
    return (*findings, *(() if visit.failed else _when_killed(broker)))


def check_results(results: RedisResults) -> tuple[Finding, ...]:
    """Look at a Redis that is to keep results, within three ``socket_timeout``."""
    key = f"{results.key_prefix}celery-task-meta-qbridge-check"
    probes = _on(key, "SETEX KEY 1 x", "SET KEY x", "GET KEY", "MGET KEY", "DEL KEY", "PUBLISH KEY x", "EXPIRE KEY 1")
    return tuple(_Visit("results", results, 3 * results.socket_timeout, probes).findings())


def _when_killed(broker: RedisBroker) -> Iterator[Finding]:
    yield Finding(
        "info",
        "broker.lease",
        f"tasks of a killed worker run elsewhere after {broker.lease:g} s",
        "A shorter lease is quicker, and less patient with a worker that stands still.",
    )


class _Visit:
    def __init__(self, part: Part, server: RedisServer, patience: float, probes: Sequence[_Probe]) -> None:
        self.part: Part = part
        self.server = server
        self.patience = patience
        self.probes = probes
        self.end = time.monotonic() + patience
        self.failed = False

    def findings(self) -> list[Finding]:
        found: list[Finding] = []
        try:
            for finding in self._look():
                found.append(finding)  # noqa: PERF402 - what was found before an error counts
        except Exception as error:  # noqa: BLE001 - a check reports, whatever happens
            found.append(explain(error, self.part, self.server))
        self.failed = any(finding.level == "error" for finding in found)
        return found

    def _finding(
        self, level: Literal["ok", "info", "warning", "error"], code: str, what: str, todo: str = ""
    ) -> Finding:
        return Finding(level, f"{self.part}.{code}", what, todo)

    @property
    def left(self) -> float:
        """Seconds for the next step; each may take a third of what there is in all."""
        return max(0.1, min(self.patience / 3, self.end - time.monotonic()))

    # -- looking

    def _look(self) -> Iterator[Finding]:
        if self.server.unix_socket is not None:
            path = Path(self.server.unix_socket)
            if not path.is_socket():
                yield self._finding(
                    "error",
                    "unreachable",
                    f"there is no socket at {path}",
                    "Start Redis with 'unixsocket' in its configuration, or correct unix_socket.",
                )
                return
        elif self.server.sentinel is None:
            trouble = reach(self.server.server, self.left, of=self.part, product="Redis")
            if trouble is not None:
                yield trouble
                return
        master: Address | None = None
        if self.server.sentinel is not None:
            for answer in self._ask_sentinels():
                if isinstance(answer, Address):
                    master = answer
                else:
                    yield answer
            if master is None:
                return
        client = self._client(master)
        try:
            client.ping()
            yield from self._inspect(client, master)
            yield from self._permissions(client)
            if not self.server.key_prefix:  # it was thought of
                yield from shared(client, self.part, self.server.db)
        finally:
            with suppress(Exception):
                client.close()

    def _client(self, master: Address | None) -> Any:
        server = self.server
        where: dict[str, Any]
        if server.unix_socket is not None:
            where = {"unix_socket_path": server.unix_socket}
        else:
            address = master or server.server
            where = {"host": address.host, "port": address.port, **self._tls()}
        no_retries: Any = None  # redis-py's types know no None, its code does; left out, it makes ten
        return redis.Redis(
            **where,
            db=server.db,
            username=server.username,
            password=server.password.get_secret_value() if server.password else None,
            socket_timeout=self.left,
            socket_connect_timeout=self.left,
            retry=no_retries,
            protocol=2,  # in RESP3 the answer to SUBSCRIBE is a push, which read_response passes over
        )

    def _tls(self) -> dict[str, Any]:
        options = self.server.ssl_options()
        return {} if options is None else {"ssl": True, **options}

    def _ask_sentinels(self) -> Iterator[Finding | Address]:
        """Ask each Sentinel where the master is; the first answer is also yielded."""
        sentinel = self.server.sentinel
        if sentinel is None:
            return
        master: Address | None = None
        troubles: list[Finding] = []
        for server in sentinel.servers:
            trouble = reach(server, self.left, of=self.part, product="Sentinel")
            if trouble is not None:
                troubles.append(trouble)
                continue
            kwargs = self.server.sentinel_options(self.left)["sentinel_kwargs"]
            asked: Any = redis.Redis(host=server.host, port=server.port, **kwargs)
            try:
                answer = asked.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", sentinel.master_name)
            except (RedisError, OSError) as error:
                said = redact(error, *secrets_of(self.server))
                troubles.append(
                    self._finding(
                        "error",
                        "sentinel",
                        f"the Sentinel {server} did not answer: {type(error).__name__}: {said}",
                        "Look at its log; its account is sentinel.username and sentinel.password.",
                    )
                )
                continue
            finally:
                with suppress(Exception):
                    asked.close()
            if not answer:
                troubles.append(
                    self._finding(
                        "error",
                        "sentinel",
                        f"the Sentinel {server} knows no master {sentinel.master_name!r}",
                        "redis-cli -p 26379 SENTINEL MASTERS lists those that it knows; correct sentinel.master_name.",
                    )
                )
                continue
            host, port = (part.decode() if isinstance(part, bytes) else str(part) for part in answer)
            master = master or Address(host, int(port))
        for trouble in troubles:
            yield Finding("warning" if master else "error", trouble.code, trouble.what, trouble.todo)
        if master is not None:
            yield master

    # -- the server itself

    def _inspect(self, client: Any, master: Address | None) -> Iterator[Finding]:
        place = f"{master} ({self.server.place})" if master else self.server.place
        try:
            about: dict[str, Any] = client.info()
        except NoPermissionError:
            yield self._finding(
                "warning",
                "permission",
                f"{who(self.server)} may not run INFO: memory policy and persistence of {place} were not looked at",
                f"ACL SETUSER {self.server.username or 'default'} +info",
            )
            return
        name, version = _product(about)
        yield self._finding("ok", "server", f"{name} {version} at {place}, {who(self.server)}")
        if about.get("redis_mode") == "cluster":
            yield self._finding(
                "error",
                "cluster",
                f"{place} is a Redis Cluster, which Celery and kombu cannot use",
                "Use a single server or a Sentinel group: a task needs several keys at once.",
            )
        if about.get("role") == "slave":
            yield self._finding(
                "error",
                "replica",
                f"{place} is a replica: it takes no writes",
                f"Point at its master ({about.get('master_host')}:{about.get('master_port')}), or use sentinel.",
            )
        yield from self._memory(about)
        yield from self._persistence(about)

    def _memory(self, about: dict[str, Any]) -> Iterator[Finding]:
        policy, limit, used = about.get("maxmemory_policy"), int(about.get("maxmemory", 0)), about.get("used_memory", 0)
        if policy not in (None, "noeviction"):
            now = "" if limit else " (maxmemory is 0: nothing is evicted as long as that stays so)"
            yield self._finding(
                "error" if self.part == "broker" else "warning",
                "eviction_policy",
                f"maxmemory-policy is {policy}: when memory is full, Redis throws away "
                f"{'tasks' if self.part == 'broker' else 'results before they expire'}{now}",
                "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf.",
            )
        if limit and used > limit * 0.9:
            yield self._finding(
                "warning",
                "memory",
                f"Redis uses {used / limit:.0%} of its maxmemory; at 100% it refuses writes",
                "Raise maxmemory, or let results expire sooner.",
            )

    def _persistence(self, about: dict[str, Any]) -> Iterator[Finding]:
        if about.get("rdb_last_bgsave_status") == "err" or about.get("aof_last_write_status") == "err":
            yield self._finding(
                "error",
                "disk",
                "Redis could not write to its disk, and refuses writes because of it",
                "Look at its log and at the free space of its dir.",
            )
        if self.part == "broker" and not about.get("aof_enabled"):
            yield self._finding(
                "warning",
                "persistence",
                "appendonly is off: a restart of Redis loses the tasks that were queued since its last snapshot",
                "redis-cli CONFIG SET appendonly yes, and the same in redis.conf.",
            )

    # -- the account

    def _permissions(self, client: Any) -> Iterator[Finding]:
        commands: list[str] = []
        keys: list[str] = []
        channels: list[str] = []
        connection = client.connection_pool.get_connection()
        try:
            _run(connection, "MULTI")
            for probe in self.probes:
                try:
                    _run(connection, *probe.command)
                except NoPermissionError as error:
                    refused = _refused(error)
                    seen = {"command": commands, "key": keys, "channel": channels}[refused]
                    seen.append(str(probe.command[0]) if refused == "command" else probe.key)
                except ResponseError:
                    continue  # not a question of the account
            with suppress(RedisError):
                _run(connection, "DISCARD")
            try:
                _run(connection, "SUBSCRIBE", f"{self.server.key_prefix}qbridge-check")
            except NoPermissionError as error:
                (commands if _refused(error) == "command" else channels).append("SUBSCRIBE")
        except NoPermissionError:
            commands.append("MULTI")
        finally:
            connection.disconnect()
        user = self.server.username or "default"
        if commands:
            names = list(dict.fromkeys(commands))
            yield self._finding(
                "error",
                "permission",
                f"{who(self.server)} may not run {', '.join(names)}",
                f"ACL SETUSER {user} {' '.join(f'+{name.lower()}' for name in names)} "
                "(or +@all -@dangerous +info), then ACL SAVE",
            )
        if keys:
            pattern = f"~{self.server.key_prefix}*"
            yield self._finding(
                "error",
                "permission",
                f"{who(self.server)} may not use the keys {', '.join(map(repr, dict.fromkeys(keys)))}",
                f"ACL SETUSER {user} {pattern}, then ACL SAVE",
            )
        if channels:
            yield self._finding(
                "error",
                "permission",
                f"{who(self.server)} may not use channels, which results and remote control need",
                f"ACL SETUSER {user} '&*', then ACL SAVE",
            )


def _product(about: dict[str, Any]) -> tuple[str, str]:
    if "valkey_version" in about:
        return "Valkey", str(about["valkey_version"])
    return "Redis", str(about.get("redis_version", "of unknown version"))


def _run(connection: Any, *command: str | float) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _refused(error: NoPermissionError) -> Literal["command", "key", "channel"]:
    """Redis's three ways to refuse: the command, a key, a channel."""
    said = str(error)
    if "channel" in said:
        return "channel"
    return "key" if "key" in said else "command"

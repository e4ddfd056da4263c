"""What type checkers say about every public name; never run. Lines marked as errors must be errors."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

from celery import Celery
from pydantic import BaseModel
from tenacity import retry_if_exception_type, stop_after_attempt

import qbridge
from qbridge import (
    ArgumentsError,
    AsyncTask,
    BatchError,
    Bridge,
    BridgeConfig,
    BrokerUnavailable,
    ConfigurationError,
    DatabaseResults,
    DeadLetter,
    DeadLetters,
    DeadLetterUnknown,
    DuplicateTaskError,
    EmbeddedBroker,
    Item,
    NoResults,
    PayloadError,
    Progress,
    QBridgeError,
    QueueConfig,
    RabbitMQBroker,
    RedisBroker,
    RedisResults,
    Report,
    ResultsUnavailable,
    ResultTimeout,
    ResultUnknown,
    Retry,
    Retrying,
    RpcResults,
    SerializationConfig,
    Task,
    TaskContext,
    TaskFailed,
    TaskResult,
    TaskRevoked,
    TaskSet,
    UnknownQueueError,
    UnsupportedFeature,
    WorkerConfig,
)

bridge = Bridge()
configured = Bridge(BridgeConfig(broker="amqp://guest:guest@localhost//", results="redis://localhost/1"))
assert_type(bridge.config, BridgeConfig)
assert_type(bridge.check(), Report)
assert_type(bridge.check().ok, bool)
assert_type(bridge.check().as_dict(), dict[str, Any])
assert_type(bridge.celery, Celery)
with bridge.worker(pool="solo", concurrency=1, queues=["reports"], start_timeout=5.0):
    pass
bridge.worker(pool="process")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(qbridge.__version__, str)


class Invoice(BaseModel):
    """A model."""

    number: int


@dataclass
class Rendered:
    """A dataclass."""

    pages: list[bytes]


# -- declaring


@bridge.task
def add(a: int, b: int) -> int:
    return a + b


@bridge.task(queue="reports", retry=Retry(on=ConnectionError, attempts=5, wait_initial=0.5, wait_max=30), time_limit=60)
def render(invoice: Invoice, *, dpi: int = 96) -> Rendered:
    return Rendered([b""])


@bridge.task(context=True)
def crunch(ctx: TaskContext, rows: list[Invoice]) -> dict[str, int]:
    assert_type(ctx.task_id, str)
    assert_type(ctx.attempt, int)
    assert_type(ctx.is_last_attempt, bool)
    assert_type(ctx.fencing_token, int)
    assert_type(ctx.deadline, datetime | None)
    ctx.check()
    assert_type(ctx.max_attempts, int)
    assert_type(ctx.headers, Mapping[str, Any])
    if ctx.headers.get("later"):
        ctx.retry(timedelta(minutes=1))
    assert_type(ctx.queue, str | None)
    ctx.progress(1, 2, note="half")
    return {}


@bridge.task(unique=True)
def rebuild(index: str) -> str:
    return index


@bridge.task(unique=lambda arguments: str(arguments["index"]))
def rebuild_one(index: str, depth: int) -> str:
    return index


assert_type(rebuild.using(idempotency_key="k").delay("a"), TaskResult[str])
rebuild.using(idempotency_key=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@bridge.task(version=2)
def paint(width: int, height: int, *, colour: str = "red") -> str:
    return colour


@paint.upcast(1)
def paint_square(side: int) -> Item:
    return paint.item(side, side)


assert_type(paint_square(5), Item)
assert_type(paint.version, int)
assert_type(paint.fingerprint, str)
paint_square("5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
bridge.task(version="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@paint.upcast(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def paint_nothing(side: int) -> str:
    return paint.item(side, side, colour=1)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType, reportReturnType]


@bridge.task
async def fetch(url: str) -> bytes:
    return url.encode()


@bridge.task(context=True, queue="io")
async def fetch_all(ctx: TaskContext, urls: list[str]) -> list[bytes]:
    return []


@bridge.remote(name="billing.charge", queue="billing")
def charge(cents: int, *, currency: str = "EUR") -> Invoice: ...  # type: ignore[empty-body]


tasks = TaskSet()


@tasks.task
def later(x: datetime) -> timedelta:
    return timedelta()


@tasks.remote(name="stock.count", version=2)
def count(item: str) -> int: ...  # type: ignore[empty-body]


assert_type(count.delay("nail"), TaskResult[int])
bridge.include(tasks)

by_position: Task[[int, int], int] = add
as_async: AsyncTask[[str], bytes] = fetch
assert_type(bridge.tasks, Mapping[str, Task[Any, Any]])

# -- calling and sending

assert_type(add(1, 2), int)
assert_type(add.delay(1, 2), TaskResult[int])
assert_type(add.delay(a=1, b=2).get(timeout=10), int)
assert_type(render.delay(Invoice(number=1), dpi=300).get(), Rendered)
assert_type(crunch([Invoice(number=1)]), dict[str, int])
assert_type(crunch.delay([]), TaskResult[dict[str, int]])
add.using(deadline=timedelta(minutes=5)).delay(1, 2)
add.using(deadline=datetime.now(UTC))
add.using(deadline=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(Retry(on=OSError, where="worker").preview(), list[float])
assert_type(Retry.from_tenacity(retry=retry_if_exception_type(OSError), stop=stop_after_attempt(3)), Retry)
still_async: AsyncTask[[str], bytes] = fetch.using(countdown=1)
coroutine: Coroutine[Any, Any, bytes] = fetch("x")
assert_type(fetch.delay("x"), TaskResult[bytes])
assert_type(fetch_all.delay(["x"]).get(), list[bytes])
assert_type(charge.delay(5, currency="USD").get(), Invoice)
assert_type(later.delay(datetime.now(UTC)).get(), timedelta)
assert_type(add.using(queue="reports", countdown=30).delay(1, 2), TaskResult[int])
elsewhere: Task[[int, int], int] = add.using(eta=datetime.now(UTC), expires=timedelta(hours=1), priority="high")
assert_type(add.send_many([(1, 2), (3, 4)]), list[TaskResult[int]])
assert_type(bridge.send("somebody.elses", (1,), {"x": 2}, queue="reports"), TaskResult[Any])
assert_type(bridge.send_many([add.item(1, 2), fetch.item("x")]), list[TaskResult[Any]])
assert_type(bridge.send_many(add.item(1, 2), fetch.item("x")), list[TaskResult[Any]])
assert_type(bridge.result("id", add), TaskResult[int])
assert_type(bridge.result("id", Invoice), TaskResult[Invoice])
assert_type(bridge.result("id"), TaskResult[Any])
assert_type(add.name, str)
assert_type(add.queue, str)
assert_type(add.signature, str)
assert_type(add.schema(), dict[str, Any])


async def main() -> None:
    """The async client."""
    assert_type(await add.adelay(1, 2), TaskResult[int])
    assert_type(await (await add.adelay(1, 2)).aget(timeout=10), int)
    assert_type(await add.delay(1, 2), int)
    assert_type(await fetch("x"), bytes)
    async with Bridge() as other:
        assert_type(other, Bridge)
    await other.aclose()


asyncio.run(main())

# -- results

result = add.delay(1, 2)
wider: TaskResult[float] = result  # covariant
assert_type(result.id, str)
assert_type(result.state, str)
assert_type(result.ready(), bool)
assert_type(result.successful(), bool)
assert_type(result.failed(), bool)
assert_type(result.result, int | BaseException | None)
assert_type(result.traceback, str | None)
assert_type(result.progress(), Progress | None)
if (progress := result.progress()) is not None:
    assert_type(progress.fraction, float)
assert_type(result.retrying(), Retrying | None)
result.revoke(terminate=True)
result.forget()

# -- dead letters

assert_type(bridge.dead_letters, DeadLetters)
assert_type(bridge.dead_letters.list("reports", limit=10, reason="exhausted"), list[DeadLetter])
assert_type(bridge.dead_letters.get("id"), DeadLetter)
assert_type(bridge.dead_letters.replay(["id"], rate=10), list[DeadLetter])
assert_type(bridge.dead_letters.replay(queue="a", skipped=lambda letter, error: [letter.id, error]), list[DeadLetter])
assert_type(bridge.dead_letters.discard(queue="reports", task="shop.add"), list[DeadLetter])
letter = bridge.dead_letters.get("id")
assert_type(letter.body, bytes)
assert_type(letter.version, int | None)
assert_type(letter.fingerprint, str | None)
assert_type(letter.at, datetime)
bridge.dead_letters.list(reason="tired")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def look_after(letters: DeadLetters) -> None:
    """The same without blocking an event loop."""
    assert_type(await letters.alist("reports", limit=None, reason="expired", task="shop.add"), list[DeadLetter])
    assert_type(await letters.aget("id"), DeadLetter)
    assert_type(await letters.areplay("id", queue="reports", rate=2.5, limit=10), list[DeadLetter])
    assert_type(await letters.adiscard(["id"], reason="exhausted", task="shop.add", limit=1), list[DeadLetter])
    await letters.alist(reason="tired")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await letters.areplay(rat=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await letters.adiscard(limit="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# -- configuration

BridgeConfig(
    broker=RabbitMQBroker(host="rabbit", queue_type="classic"),
    results=DatabaseResults(url="postgresql+psycopg://localhost/x"),
    worker=WorkerConfig(pool="thread", concurrency=4),
    serialization=SerializationConfig(max_payload_bytes=10_000),
    queues=[QueueConfig("reports"), "mail"],
    retry=Retry(on=OSError),
    defaults="celery",
)
BridgeConfig(broker=RedisBroker(host="redis"), results=RedisResults(host="redis", db=1))
BridgeConfig(broker=EmbeddedBroker(), results=RpcResults())
BridgeConfig(results=NoResults())
existing = BridgeConfig.from_celery("proj.celeryconfig", namespace="CELERY")
assert_type(existing, BridgeConfig)
assert_type([finding.what for finding in existing.findings], list[str])
Bridge(existing).close()

# -- errors

errors: list[type[QBridgeError]] = [
    ArgumentsError, BatchError, BrokerUnavailable, ConfigurationError, DeadLetterUnknown, DuplicateTaskError,
    PayloadError, ResultsUnavailable, ResultTimeout, ResultUnknown, TaskFailed, TaskRevoked, UnknownQueueError,
    UnsupportedFeature,
]  # fmt: skip

# -- what must be refused

add.delay("x", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
add.delay(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
add.delay(1, 2, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
render.delay(Invoice(number=1), 300)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
crunch.delay(TaskContext(), [])  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
wrong: str = add.delay(1, 2).get()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
narrow: TaskResult[bool] = add.delay(1, 2)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
add.using(quue="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
add.using(priority=9)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
fetch.delay(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
not_awaited: bytes = fetch("x")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
BridgeConfig(brokr="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@bridge.task(quue="x")  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportCallIssue]
def misspelt(x: int) -> int:
    return x

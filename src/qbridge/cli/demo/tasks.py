"""The tasks of the demo: what the module of an application looks like."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal

from pydantic import BaseModel, Field

from qbridge import Bridge, Retry, TaskContext

__all__ = ["Order", "OutOfStock", "Quote", "add", "bridge", "call_carrier", "count_shelf", "fetch", "quote", "reserve"]

# QBRIDGE_BROKER and QBRIDGE_RESULTS in the environment say where: the demo sets them for itself and for its worker.
bridge: Bridge = Bridge()


class Order(BaseModel):
    """What a customer wants."""

    item: str
    quantity: int = Field(gt=0)
    price: Decimal


class Quote(BaseModel):
    """What it costs."""

    item: str
    total: Decimal


class OutOfStock(Exception):
    """There is not enough of it."""

    def __init__(self, item: str, left: int) -> None:
        super().__init__(item, left)
        self.item = item
        self.left = left

    def __str__(self) -> str:
        return f"only {self.left} of {self.item} left"


@bridge.task
def quote(order: Order) -> Quote:
    """A model in, a model out."""
    return Quote(item=order.item, total=order.price * order.quantity)


@bridge.task
def reserve(item: str, quantity: int) -> int:
    """Fail with an error of the application's own."""
    raise OutOfStock(item, left=2)


@bridge.task(context=True, retry=Retry(on=ConnectionError, attempts=5, wait_initial=0.2, wait_jitter=0))
def call_carrier(run: TaskContext) -> int:
    """Succeed at the third attempt."""
    if run.attempt < 3:
        raise ConnectionResetError("the carrier hung up")
    return run.attempt


@bridge.task
async def fetch(pages: list[str]) -> dict[str, int]:
    """Wait for many things at once."""

    async def length(page: str) -> int:
        await asyncio.sleep(0.2)
        return len(page)

    return dict(zip(pages, await asyncio.gather(*map(length, pages)), strict=True))


@bridge.task(context=True)
def count_shelf(run: TaskContext, boxes: int) -> int:
    """Say how far it is."""
    for done in range(1, boxes + 1):
        time.sleep(0.05)
        run.progress(done, boxes, note=f"box {done}")
    return boxes


@bridge.task
def add(a: int, b: int) -> int:
    """Be small and many."""
    return a + b

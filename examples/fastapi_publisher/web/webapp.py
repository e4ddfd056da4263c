"""The web project: it knows the name, the queue and the types of the task, not its code."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException

from qbridge import Bridge, BrokerUnavailable, ResultTimeout

bridge = Bridge()


@bridge.remote(name="sums.add", queue="sum-queue")
def add(a: int, b: int) -> int: ...


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Close connections when the app ends."""
    async with bridge:
        yield


api = FastAPI(lifespan=lifespan)


@api.get("/sum")
async def sum_of(a: int, b: int) -> dict[str, int | str]:
    """Have a worker add two numbers."""
    try:
        result = await add.adelay(a, b)
        return {"sum": await result.aget(timeout=20), "task_id": result.id}
    except BrokerUnavailable as error:
        raise HTTPException(503, "the queue is not available") from error
    except ResultTimeout as error:
        raise HTTPException(504, "no worker answered in time") from error

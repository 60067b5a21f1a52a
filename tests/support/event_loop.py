"""Measure for how long an event loop is held while a block of a test runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Hold:
    """Longest time that the event loop was held, in seconds."""

    seconds = 0.0


@asynccontextmanager
async def longest_hold() -> AsyncIterator[Hold]:
    """Watch the running event loop during the block. The result is complete after the block."""
    hold = Hold()

    async def tick() -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            hold.seconds = max(hold.seconds, time.perf_counter() - started)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    try:
        yield hold
        await asyncio.sleep(0.002)
    finally:
        ticking.cancel()

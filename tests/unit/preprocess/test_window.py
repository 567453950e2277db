"""The bound on what one stream has under way."""

from __future__ import annotations

import asyncio

from tidegate.preprocess.window import Window


async def waits(window: Window, byte_count: int) -> bool:
    """Whether a request of this size would have to wait; leaves nothing inside."""
    try:
        async with asyncio.timeout(0.01):
            await window.enter(byte_count)
    except TimeoutError:
        return True
    window.leave(byte_count)
    return False


async def test_requests_are_bounded() -> None:
    window = Window(2, 1000)
    await window.enter(1)
    assert not await waits(window, 1)
    await window.enter(1)
    assert await waits(window, 1)
    window.leave(1)
    assert not await waits(window, 1)


async def test_bytes_are_bounded() -> None:
    window = Window(10, 1000)
    await window.enter(600)
    assert not await waits(window, 400)
    assert await waits(window, 401)


async def test_one_that_is_larger_than_the_bound_enters_alone() -> None:
    window = Window(10, 1000)
    await window.enter(5000)
    assert await waits(window, 1)
    window.leave(5000)
    await window.enter(1)
    assert await waits(window, 5000)


async def test_whoever_waits_enters_when_another_leaves() -> None:
    window = Window(1, 1000)
    await window.enter(10)
    waiting = asyncio.create_task(window.enter(20))
    await asyncio.sleep(0)
    assert not waiting.done()
    window.leave(10)
    await asyncio.wait_for(waiting, 1)
    assert (window.request_count, window.byte_count) == (1, 20)

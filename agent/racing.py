"""A stream that ends when something else happens first: the one place where tasks are raced."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def until(over: asyncio.Event, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Yield what `stream` yields until `over` is set; the stream is then closed at once, wherever it waits."""
    async with aclosing(stream):
        ended = asyncio.ensure_future(over.wait())
        try:
            while not over.is_set():
                step = asyncio.ensure_future(anext(stream))
                try:
                    await asyncio.wait({step, ended}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not step.done():
                        step.cancel()
                        await asyncio.gather(step, return_exceptions=True)
                if step.cancelled():
                    return
                try:
                    item = step.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            ended.cancel()

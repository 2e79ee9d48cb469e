"""One thread for all work, and nobody left waiting."""

import asyncio
import threading
import time
from functools import partial

import pytest

from agent.engines.worker import Worker
from agent.errors import EngineError


async def test_all_work_runs_in_one_thread_in_its_turn() -> None:
    worker = Worker("test")
    order: list[int] = []

    def work(number: int) -> int:
        time.sleep(0.01 * (3 - number))
        order.append(number)
        return threading.get_ident()

    idents = await asyncio.gather(*(worker.run(partial(work, number)) for number in range(3)))
    assert len(set(idents)) == 1
    assert threading.get_ident() not in idents
    assert order == [0, 1, 2]
    worker.end()


async def test_finish_waits_for_the_end_though_it_is_cancelled() -> None:
    worker, ended = Worker("test"), threading.Event()

    def work() -> None:
        time.sleep(0.1)
        ended.set()

    task = asyncio.create_task(worker.finish(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    worker.end()


async def test_run_leaves_at_once_and_the_work_goes_on() -> None:
    worker, ended = Worker("test"), threading.Event()

    def work() -> None:
        time.sleep(0.1)
        ended.set()

    task = asyncio.create_task(worker.run(work))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended.is_set()
    assert await worker.finish(ended.is_set)  # behind it
    worker.end()


async def test_errors_come_through_and_an_ended_worker_says_so() -> None:
    worker = Worker("test")

    def fail() -> None:
        raise KeyError("x")

    for ask in (worker.run, worker.finish):
        with pytest.raises(KeyError):
            await ask(fail)
    worker.end()
    with pytest.raises(EngineError, match="unloaded"):
        await worker.run(fail)

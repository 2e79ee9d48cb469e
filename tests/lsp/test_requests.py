import asyncio

import pytest

from lsp.requests import Latest


async def slow(result: str, log: list[str]) -> str:
    try:
        await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        log.append(f"{result} ended")
        raise
    return result


async def test_a_later_request_ends_the_one_before() -> None:
    latest, log = Latest(), []  # type: ignore[var-annotated]
    first = asyncio.create_task(latest.run("a", slow("first", log)))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(latest.run("a", slow("second", log)))
    assert await first is None
    assert await second == "second"
    assert log == ["first ended"]


async def test_other_keys_are_left_alone() -> None:
    latest, log = Latest(), []  # type: ignore[var-annotated]
    results = await asyncio.gather(latest.run("a", slow("one", log)), latest.run("b", slow("two", log)))
    assert results == ["one", "two"]


async def test_a_cancelled_caller_ends_its_work() -> None:
    latest, log = Latest(), []  # type: ignore[var-annotated]
    caller = asyncio.create_task(latest.run("a", slow("work", log)))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert log == ["work ended"]


async def test_errors_come_through() -> None:
    async def breaks() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await Latest().run("a", breaks())

"""One line of the GPU check's table, and how a line comes about: its work is guarded, so that one failure is one line.

Pure but for the clock that it is given. Knows nothing of models and devices.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Figures = Mapping[str, float | int | str | bool]

_REASON_CHARS = 200  # of an error, in the table


@dataclass(frozen=True, slots=True)
class Row:
    """What was checked or measured."""

    name: str
    result: str
    ok: bool | None = None
    """Whether a check held; None for what is only measured, or was left out."""
    note: str = ""
    figures: Figures = field(default_factory=dict)
    """The same in numbers, for JSON."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that makes rows."""

    name: str
    work: Callable[[], Awaitable[Sequence[Row]]]


def left_out(name: str, why: str) -> Row:
    """Return the line of something that was not done."""
    return Row(name, "left out", None, why)


def failed(name: str, error: BaseException) -> Row:
    """Return the line of something that broke."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return Row(name, "FAILED", False, reason[:_REASON_CHARS])


async def run(
    jobs: Iterable[Job],
    *,
    clock: Callable[[], float],
    until: float,
    tell: Callable[[str], None],
    after: Callable[[], None],
) -> list[Row]:
    """Do one job after the other, and return all their rows.

    Args:
        jobs: What to do.
        clock: Seconds.
        until: When, on that clock, nothing more is begun.
        tell: Shows progress.
        after: Cleans up behind each job, broken or not.
    """
    rows: list[Row] = []
    for job in jobs:
        if clock() >= until:
            made: Sequence[Row] = [left_out(job.name, "the time is up; give more by --seconds")]
        else:
            tell(f"{job.name} …")
            began = clock()
            made = await _guarded(job)
            after()
            tell(f"  {clock() - began:.1f} s: {'; '.join(_said(row) for row in made)}")
        rows += made
    return rows


async def _guarded(job: Job) -> Sequence[Row]:
    try:
        return await job.work()
    except Exception as error:  # noqa: BLE001 - whatever breaks is this line's result, and the others are still made
        return [failed(job.name, error)]


def _said(row: Row) -> str:
    return f"{row.result} ({row.note})" if row.ok is False else row.result

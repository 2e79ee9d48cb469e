from pathlib import Path

import pytest

from agent import crash_guard
from agent.crash_guard import CRASHES, WINDOW_S, CrashGuard
from agent.errors import ModelSetAsideError
from tests.fakes import FakeClock


def die(folder: Path, clock: FakeClock, *, state: str, fault: str = "") -> CrashGuard:
    """Let a daemon die in some state, and return the next one's guard."""
    guard = CrashGuard(folder, clock)
    guard.loading("m")
    if state == "serving":
        guard.serving("m")
    (folder / "fault.txt").write_text(fault)
    return CrashGuard(folder, clock)


def test_three_crashes_in_five_minutes_set_a_model_aside(tmp_path: Path) -> None:
    clock = FakeClock()
    for _ in range(CRASHES):
        clock.now += 60
        guard = die(tmp_path, clock, state="serving", fault="Fatal Python error: Segmentation fault\n")
        assert guard.last_crash is not None
    with pytest.raises(ModelSetAsideError, match="tabwise models retry m"):
        guard.loading("m")
    guard.loading("another")


def test_time_heals(tmp_path: Path) -> None:
    clock = FakeClock()
    for _ in range(CRASHES):
        guard = die(tmp_path, clock, state="serving", fault="Fatal Python error: Aborted\n")
    clock.now += WINDOW_S + 1
    guard.loading("m")


def test_a_kill_from_outside_is_nobodys_crash_while_serving(tmp_path: Path) -> None:
    clock = FakeClock()
    for _ in range(CRASHES + 1):
        guard = die(tmp_path, clock, state="serving")
        assert guard.last_crash is None
    guard.loading("m")


def test_a_kill_while_loading_is_the_models(tmp_path: Path) -> None:
    clock = FakeClock()
    for _ in range(CRASHES):
        guard = die(tmp_path, clock, state="loading")
    with pytest.raises(ModelSetAsideError):
        guard.loading("m")


def test_an_end_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    guard = CrashGuard(tmp_path)
    guard.loading("m")
    guard.serving("m")
    guard.close()
    assert list(tmp_path.iterdir()) == []
    assert CrashGuard(tmp_path).last_crash is None


def test_forgiving(tmp_path: Path) -> None:
    clock = FakeClock()
    for _ in range(CRASHES):
        guard = die(tmp_path, clock, state="loading")
    assert crash_guard.forgive(tmp_path, "m")
    assert not crash_guard.forgive(tmp_path, "m")
    guard.loading("m")


def test_an_unreadable_record_does_not_lock_a_model_out(tmp_path: Path) -> None:
    (tmp_path / "crashes.json").write_text("[]")
    CrashGuard(tmp_path).loading("m")
    (tmp_path / "crashes.json").write_text("[]")
    assert not crash_guard.forgive(tmp_path, "m")

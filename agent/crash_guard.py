"""Notices that a model killed the daemon, and sets it aside before it does so for ever.

Native code that crashes takes the process along. What is left: Python's fault handler writes a file on a fatal signal,
and a mark says which model was in memory, and whether it was still being loaded. The next daemon reads both. A daemon
that was killed from outside while it served is nobody's crash; one that was killed while it loaded is, since that is
how a machine without enough memory ends a process.

Knows times and names, no engine.
"""

import faulthandler
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from agent import paths
from agent.errors import ModelSetAsideError

CRASHES = 3
"""A model that killed the daemon so often …"""
WINDOW_S = 300.0
"""… within this time is set aside."""


class CrashGuard:
    """Remembers crashes across processes, in the state directory."""

    def __init__(self, state_dir: Path, now: Callable[[], float] = time.time) -> None:
        """Read what the previous daemon left behind; the caller holds the daemon's lock.

        Args:
            state_dir: Where the records lie.
            now: Clock, in seconds since the epoch.
        """
        self._now = now
        self._fault = state_dir / "fault.txt"
        self._mark = state_dir / "engine.json"
        self._record = state_dir / "crashes.json"
        self._file: TextIO | None = None
        self.last_crash = self._blame()

    def watch(self) -> None:
        """Have fatal signals of this process written down."""
        self._file = self._fault.open("w", encoding="utf-8")
        faulthandler.enable(self._file)

    def loading(self, model: str) -> None:
        """Note that `model` is being loaded.

        Raises:
            ModelSetAsideError: It killed the daemon too often.
        """
        recent = [when for when in self._crashes().get(model, []) if self._now() - when <= WINDOW_S]
        if len(recent) >= CRASHES:
            raise ModelSetAsideError(
                f"the model {model!r} ended the daemon {len(recent)} times within {WINDOW_S / 60:.0f} minutes and is set "
                f"aside; choose another in model.name, or run: tabwise models retry {model}"
            )
        self._write_mark(model, "loading")

    def serving(self, model: str) -> None:
        """Note that `model` is loaded."""
        self._write_mark(model, "serving")

    def unloaded(self) -> None:
        """Note that no model is in memory any more."""
        self._mark.unlink(missing_ok=True)

    def close(self) -> None:
        """Note that this process ends in good order."""
        self.unloaded()
        if self._file:
            faulthandler.disable()
            self._file.close()
            self._fault.unlink(missing_ok=True)

    def _write_mark(self, model: str, state: str) -> None:
        paths.write_private(self._mark, json.dumps({"model": model, "state": state, "pid": os.getpid()}))

    def _blame(self) -> str | None:
        try:
            mark = json.loads(self._mark.read_text(encoding="utf-8"))
            model, state = str(mark["model"]), mark["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # no model was in memory, so none is to blame
        fault = self._fault.read_text(encoding="utf-8", errors="replace") if self._fault.exists() else ""
        self._mark.unlink(missing_ok=True)
        if not fault.strip() and state != "loading":
            return None
        crashes = self._crashes()
        crashes[model] = [*crashes.get(model, []), self._now()][-CRASHES:]
        paths.write_private(self._record, json.dumps(crashes))
        return f"{model} while {state}: {fault.strip().splitlines()[0] if fault.strip() else 'killed'}"

    def _crashes(self) -> dict[str, list[float]]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            return {str(model): [float(when) for when in times] for model, times in record.items()}
        except OSError:
            return {}
        except (ValueError, AttributeError, TypeError):
            self._record.unlink(
                missing_ok=True
            )  # unreadable: better to try a model once more than to refuse it for ever
            return {}


def forgive(state_dir: Path, model: str) -> bool:
    """Forget the crashes of `model`; False where none were known."""
    record = state_dir / "crashes.json"
    try:
        crashes = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(crashes, dict) or crashes.pop(model, None) is None:
        return False
    paths.write_private(record, json.dumps(crashes))
    return True

"""Runs a program that a model wrote in a process of its own, under limits, and tells whether it ran to its end.

Knows nothing of models or of benchmarks. The program never runs in this process: it gets a Python without the user's
packages and environment, an empty directory that is deleted afterwards, and no standard input; what it prints is thrown
away. Time, memory and the size of files are limited, and everything that it started is killed with it.

This is a guard against accidents and no jail. The program runs as the user: it can read the user's files, write and
delete wherever the user may, use the network, and start a process in a session of its own that outlives it. The limits
hold for each process alone, and macOS does not enforce the one on memory. Run nothing in it that may mean harm.
"""

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from enum import StrEnum
from pathlib import Path

from agent.errors import InputError

WALL_S = 5.0
"""Time for one program. The slowest right one of HumanEval takes well under a second on a slow machine."""
_MEMORY_BYTES = 1 << 30  # of address space: a bare Python takes 20 MB, and no test of the benchmarks a tenth of this
_FILE_BYTES = 1 << 20  # no test writes a file at all

_RUNNER = """
import os, resource, sys
_, file, channel, token, cpu_s, memory_bytes, file_bytes = sys.argv
for which, most in (("CPU", cpu_s), ("AS", memory_bytes), ("FSIZE", file_bytes), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + which), (int(most), int(most)))
with open(file, encoding="utf-8", newline="") as stream:
    source = stream.read()
sys.argv[:] = [file]
write, done = os.write, (int(channel), token.encode())
exec(compile(source, file, "exec"), {"__name__": "__main__"})
write(*done)
"""
# The word that tells of the end goes through a pipe, not through the exit status, which is 0 after `sys.exit()` too, and
# not through standard output, which belongs to the program. It is drawn anew each time, so that nothing says it by
# accident.


class Verdict(StrEnum):
    """What became of a program."""

    PASSED = "passed"
    """It ran to its last line."""
    FAILED = "failed"
    """It raised, exited early, or broke a limit."""
    TIMED_OUT = "timed_out"


def run(program: str, *, wall_s: float = WALL_S) -> Verdict:
    """Run a program and wait for its end.

    Args:
        program: Source of a Python program.
        wall_s: Time that it may take, in seconds.

    Raises:
        InputError: This system cannot limit a process.
    """
    if importlib.util.find_spec("resource") is None:
        raise InputError(
            f"generated code is not run on {sys.platform}, which has no limits for a process; use Linux or macOS"
        )
    token = secrets.token_hex(16)
    ours, theirs = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="tabwise-", ignore_cleanup_errors=True) as folder:
            file = Path(folder) / "program.py"
            file.write_bytes(program.encode("utf-8", errors="replace"))  # half a surrogate pair cannot be written
            limits = (int(wall_s) + 1, _MEMORY_BYTES, _FILE_BYTES)
            arguments = [str(part) for part in (file.name, theirs, token, *limits)]
            code = _wait([sys.executable, "-I", "-c", _RUNNER, *arguments], folder, theirs, wall_s)
        os.set_blocking(ours, False)
        said = b""
        with contextlib.suppress(BlockingIOError):  # a process that got away may hold the other end open
            said = os.read(ours, 2 * len(token))
    finally:
        os.close(ours)
        os.close(theirs)
    if code is None:
        return Verdict.TIMED_OUT
    return Verdict.PASSED if code == 0 and said == token.encode() else Verdict.FAILED


def _wait(command: list[str], folder: str, channel: int, wall_s: float) -> int | None:
    """Return the exit status of `command`; None where it had to be killed for its time."""
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={},
        stdin=nothing,
        stdout=nothing,
        stderr=nothing,
        pass_fds=(channel,),
        start_new_session=True,  # whose group is killed as a whole
    )
    try:
        return process.wait(wall_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is empty already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

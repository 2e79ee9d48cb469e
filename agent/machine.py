"""What memory this machine has: its first NVIDIA GPU's, or its own.

Asks `nvidia-smi`, which every NVIDIA driver brings: no library for GPUs is needed or imported, and torch, which takes
seconds, least of all. Knows nothing of models.
"""

import shutil
import subprocess
from dataclasses import dataclass

import psutil

_SMI_S = 10.0  # it takes 0.1 s on a card that is awake, and seconds on one that is not


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    driver: str
    """Version of its driver."""
    total_bytes: int
    free_bytes: int


def gpu() -> Gpu | None:
    """Return the first NVIDIA GPU; None where there is none, or its driver does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = ["--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([command, *query], capture_output=True, text=True, timeout=_SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return parse(done.stdout)


def parse(answer: str) -> Gpu | None:
    """Return the first GPU of nvidia-smi's answer, whose sizes are in MiB; None where it is no such answer."""
    fields = [field.strip() for field in answer.strip().split("\n")[0].rsplit(",", 3)]
    if len(fields) != 4 or not (fields[2].isdigit() and fields[3].isdigit()):
        return None
    return Gpu(fields[0], fields[1], int(fields[2]) << 20, int(fields[3]) << 20)


def ram_bytes() -> int:
    """Return how much memory the machine has."""
    return int(psutil.virtual_memory().total)

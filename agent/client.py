"""Talks to the daemon, and starts it where none answers. Used by the language server and the command line.

Knows the daemon's routes and how to start its process; nothing of models.

Invariant: however many processes call `ensure_daemon` at once, one daemon runs.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from filelock import AsyncFileLock, FileLock, Timeout

from agent import paths, wire
from agent.errors import DaemonBusyError, DaemonError, DaemonGoneError, TabwiseError
from agent.types import Completion, CompletionRequest, Explanation, ExplanationRequest, Generation
from agent.version import __version__

ALREADY_RUNNING = 3
"""Exit status of a daemon that found another one at work."""
_START_S = 20.0  # a daemon that does not answer by then has failed; it takes 0.6 s here, ten times that on a cold disk
_POLL_S = 0.02
_RESPAWN_S = 0.5  # between two tries while a daemon that is about to end still holds the lock
_ANSWER_S = 30.0  # for the short routes: while llama.cpp loads a large model from a slow disk, nothing else answers
_KEEP_S = 4.0  # for an idle connection; uvicorn closes them after 5 s, and a request that is just then sent is lost
_LINE_BYTES = 1 << 20  # aiohttp refuses longer lines than twice this; a completion's has some KB
_REPLACE_S = 5.0  # for a daemon of another version to end, once it agreed to

Part = str | Completion | Explanation


class DaemonClient:
    """A connection to the daemon, which may come and go."""

    def __init__(self) -> None:
        """Connect to nothing yet."""
        self.on_loading: Callable[[], None] | None = None
        """Called when an answer has to wait for the model to be loaded."""
        self._runtime = paths.runtime_dir()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "DaemonClient":
        """Return itself; the connection is closed when the block ends."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connection."""
        await self._close()

    async def health(self) -> dict[str, Any] | None:
        """Return what the daemon says of itself; None where none answers."""
        try:
            return await self._ask("GET", "/healthz")
        except TimeoutError:
            raise DaemonError(
                f"the daemon does not answer within {_ANSWER_S:.0f} s; run: tabwise stop, and see {paths.log_dir()}"
            ) from None
        except aiohttp.ClientError:
            return None

    async def ensure_daemon(self) -> None:
        """Have a daemon of this version run.

        Raises:
            DaemonError: None could be started, or one of another version is at work and cannot be replaced.
        """
        if _is_ours(await self._health_anew()):
            return
        lock = AsyncFileLock(self._runtime / "launch.lock", mode=0o600)
        try:
            await lock.acquire(timeout=_START_S)
        except Timeout:
            raise DaemonError(
                f"another process has been starting the daemon for {_START_S:.0f} s; see {paths.log_dir()}"
            ) from None
        try:
            health = await self._health_anew()
            if health is not None and not _is_ours(health):
                await self._replace(health)
                health = None
            if health is None:
                await self._launch()
        finally:
            await lock.release()

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[str | Completion, None]:
        """Ask for a completion: parts of its text, then the whole. Closing the stream cancels it."""
        async with aclosing(self._lines("/tabwise/complete", wire.body(request))) as stream:
            async for fields in stream:
                if "completion" in fields:
                    yield wire.structure(Completion, fields["completion"])
                elif not self._waits(fields):
                    yield str(fields["text"])

    async def explain(self, request: ExplanationRequest) -> AsyncGenerator[str | Explanation, None]:
        """Ask for an explanation: parts of its Markdown, then the whole. Closing the stream cancels it."""
        async with aclosing(self._lines("/tabwise/explain", wire.body(request))) as stream:
            async for fields in stream:
                if "explanation" in fields:
                    yield wire.structure(Explanation, fields["explanation"])
                elif not self._waits(fields):
                    yield str(fields["text"])

    def _waits(self, fields: dict[str, Any]) -> bool:
        if "state" in fields and self.on_loading:
            self.on_loading()
        return "state" in fields

    async def warm(self) -> AsyncGenerator[str, None]:
        """Have the model loaded; yields "loading" where that takes time, and "ready"."""
        async with aclosing(self._lines("/tabwise/warm", b"{}")) as stream:
            async for fields in stream:
                yield str(fields["state"])

    async def status(self) -> dict[str, Any]:
        """Return the daemon's status."""
        return await self._get("/status")

    async def adapters(self) -> dict[str, dict[str, Any] | None]:
        """Return what each task is served with: folder, name and error; None for the bare model."""
        return await self._get("/tabwise/adapters")

    async def serve_adapters(self, folders: Mapping[str, str | None]) -> dict[str, dict[str, Any] | None]:
        """Have tasks served with the adapters in these folders, None for the bare model; returns what is served then.

        Raises:
            AdapterError: One is refused; what was served before still is.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWER_S)  # the model may have to be loaded first
        try:
            async with self._open().put("/tabwise/adapters", json=dict(folders), timeout=timeout) as answer:
                return _unless_error(await _fields(answer))
        except aiohttp.ClientError as error:
            raise _unreachable(error) from None

    async def generation(self, completion_id: str) -> Generation:
        """Return the facts of a generation."""
        return wire.structure(Generation, await self._get(f"/tabwise/generations/{completion_id}"))

    async def shutdown(self, *, if_idle: bool = False) -> bool:
        """Tell the daemon to end; False where it is busy and was asked to end only if it is not."""
        try:
            answer = await self._ask("POST", "/shutdown" + ("?if_idle=1" if if_idle else ""))
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _unreachable(error) from None
        return bool(answer.get("stopping"))

    async def wait_until_gone(self, seconds: float) -> bool:
        """Wait until no daemon answers any more; False where one still does after `seconds`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # Its socket goes first; it has ended when its lock is free, which may take as long as loading a model.
            if await self._health_anew() is None and self._lock_is_free():
                return True
            await asyncio.sleep(_POLL_S)
        return False

    def _lock_is_free(self) -> bool:
        try:
            with FileLock(self._runtime / "daemon.lock", timeout=0, mode=0o600):
                return True
        except Timeout:
            return False

    async def _health_anew(self) -> dict[str, Any] | None:
        # On Windows the port changes with each daemon; elsewhere this is the same socket file.
        if os.name != "posix":
            await self._close()
        return await self.health()

    async def _replace(self, health: dict[str, Any]) -> None:
        version, pid = health.get("version"), health.get("pid")
        if not await self.shutdown(if_idle=True):
            raise DaemonBusyError(
                f"a daemon of version {version} (pid {pid}) is at work, this is {__version__}; try again in a moment"
            )
        if not await self.wait_until_gone(_REPLACE_S):
            raise DaemonError(f"the daemon of version {version} (pid {pid}) does not end; run: kill {pid}")

    async def _launch(self) -> None:
        folder = paths.private_dir(paths.log_dir())
        errors = folder / "start.log"
        process = _spawn(folder, errors)
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if await self._health_anew() is not None:
                return
            status = process.poll()
            if status == ALREADY_RUNNING:
                # Another one holds the lock: it was started by hand just now and will answer, or is about to end.
                await asyncio.sleep(_RESPAWN_S)
                process = _spawn(folder, errors)
            elif status is not None:
                said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                reason = said[-1].removeprefix("tabwise: ") if said else f"exit status {status}"
                raise DaemonError(f"the daemon cannot start: {reason}")
            await asyncio.sleep(_POLL_S)
        raise DaemonError(f"the daemon does not answer {_START_S:.0f} s after its start; see {folder}")

    async def _lines(self, path: str, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        # A cold prompt may take long: callers cancel, not the clock.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_ANSWER_S)
        finished = False
        try:
            async with self._open().post(path, data=body, timeout=timeout) as answer:
                if answer.status != HTTPStatus.OK:
                    raise wire.error_from((await _fields(answer)).get("error", {}))
                async for line in answer.content:
                    fields = json.loads(line)
                    if "error" in fields:
                        raise wire.error_from(fields["error"])
                    finished = "text" not in fields and fields.get("state") != "loading"
                    yield fields
        except aiohttp.ClientError as error:
            raise _unreachable(error) from None
        if not finished:
            raise DaemonError("the daemon broke off in the middle of an answer; try again")

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            fields = await self._ask("GET", path)
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _unreachable(error) from None
        return _unless_error(fields)

    async def _ask(self, method: str, path: str) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        async with self._open().request(method, path, timeout=timeout) as answer:
            return await _fields(answer)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = _new_session(self._runtime)
        return self._session

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _spawn(folder: Path, errors: Path) -> subprocess.Popen[bytes]:
    with errors.open("wb") as file:
        # Away from our terminal, our process group and our files: it outlives whoever starts it.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent.serve"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=folder,
            env=_daemon_environment(),
        )
    # Somebody must take note of its end, or it stays behind as a zombie for as long as an editor is open.
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def _is_ours(health: dict[str, Any] | None) -> bool:
    return health is not None and health.get("version") == __version__ and health.get("api") == wire.API


def _new_session(runtime: Path) -> aiohttp.ClientSession:
    connector: aiohttp.BaseConnector
    if os.name == "posix":
        connector = aiohttp.UnixConnector(str(runtime / "daemon.sock"), keepalive_timeout=_KEEP_S)
        return aiohttp.ClientSession("http://tabwise", connector=connector, read_bufsize=_LINE_BYTES)
    port = token = ""
    with contextlib.suppress(OSError):
        port = (runtime / "port").read_text(encoding="utf-8")
        token = (runtime / "token").read_text(encoding="utf-8")
    # Proxies of the environment are left aside, as is aiohttp's default: none may see what is meant for this machine.
    return aiohttp.ClientSession(
        f"http://127.0.0.1:{port or 1}",
        connector=aiohttp.TCPConnector(keepalive_timeout=_KEEP_S),
        headers={"Authorization": f"Bearer {token}"},
        read_bufsize=_LINE_BYTES,
    )


def _daemon_environment() -> dict[str, str]:
    # No telemetry and no hub lookups of any library's, whatever the user's shell says.
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}


async def _fields(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        fields = json.loads(await answer.read())
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise DaemonError(f"the daemon answered {answer.status} without JSON; see {paths.log_dir()}")
    return fields


def _unless_error(fields: dict[str, Any]) -> dict[str, Any]:
    if "error" in fields:
        raise wire.error_from(fields["error"])
    return fields


def _unreachable(error: aiohttp.ClientError | TimeoutError) -> TabwiseError:
    if isinstance(error, aiohttp.ClientConnectorError):
        return DaemonGoneError("no daemon runs; it is started with the next request")
    return DaemonError(f"the daemon broke off ({type(error).__name__}); try again")

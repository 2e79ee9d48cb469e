"""The daemon as a process: one per user, its lock, its sockets, its log, its end.

Knows processes and files; the application is `daemon.py`. Started by `python -m agent.serve`, by hand (`tabwise serve`)
or by whoever needs it (`client.py`).

Invariants: whoever holds `daemon.lock` is the daemon; nothing listens beyond this machine; the socket can be reached by
its owner alone.
"""

import asyncio
import contextlib
import logging
import logging.handlers
import os
import secrets
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from filelock import FileLock, Timeout
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agent import config, paths
from agent.catalog import LocalModel
from agent.client import ALREADY_RUNNING
from agent.config import Settings
from agent.crash_guard import CrashGuard
from agent.daemon import Daemon, create_app
from agent.engine_host import EngineHost, Load
from agent.engines.base import Engine
from agent.errors import DaemonError, TabwiseError, UnknownModelError
from agent.served_adapters import ServedAdapters
from agent.version import __version__

log = logging.getLogger(__name__)

_LOG_BYTES = 1 << 20  # a megabyte holds about 10,000 completions' lines
_LOG_FILES = 3
_BACKLOG = 128  # connections that may wait: twenty editors that start at once must not be refused
_GRACE_S = 2  # for open requests at the end; a stream longer than that is cut


class TokenGuard:
    """Lets requests over TCP through only with the token, and only if they name this machine."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        """Guard `app`."""
        self._app = app
        self._wanted = f"Bearer {token}".encode()
        self._hosts = {f"{host}:{port}".encode() for host in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        if headers.get(b"host") not in self._hosts:  # a page that had its name resolve to 127.0.0.1
            await _refusal(421, "this daemon answers to 127.0.0.1 only")(scope, receive, send)
        elif not secrets.compare_digest(headers.get(b"authorization", b""), self._wanted):
            await _refusal(401, "send the token: Authorization: Bearer …; tabwise status names its file")(
                scope, receive, send
            )
        else:
            await self._app(scope, receive, send)


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"code": "unauthorized", "type": "invalid_request_error", "message": message}}, status
    )


def main(load: Load | None = None) -> int:
    """Run the daemon until it is told to stop.

    Args:
        load: Brings a model into memory; llama.cpp if None.

    Returns:
        The process's exit status: 0, or `ALREADY_RUNNING`.

    Raises:
        TabwiseError: It cannot start: settings, directories, sockets.
    """
    settings = config.load()
    runtime = paths.runtime_dir()
    lock = FileLock(runtime / "daemon.lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return ALREADY_RUNNING
    with lock:
        _start_log(settings)
        for stale in runtime.glob("engine-*.sock"):  # of a daemon that was killed
            stale.unlink(missing_ok=True)
        try:
            asyncio.run(_run(settings, runtime, load))
        except TabwiseError as error:
            log.error("%s", error)
            raise
        finally:
            log.info("stopped")
    return 0


async def _run(settings: Settings, runtime: Path, load: Load | None) -> None:
    state = paths.private_dir(paths.data_dir() / "state")
    guard = CrashGuard(state)
    if guard.last_crash:
        log.error("the previous daemon was ended by %s", guard.last_crash)
    guard.watch()
    host = EngineHost(
        settings.model.name,
        load or _llamacpp(settings, runtime),
        guard,
        unload_after_s=settings.engine.unload_after_s,
    )
    servers: list[uvicorn.Server] = []

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    daemon = Daemon(settings, host, ServedAdapters(host, state / "adapters.json"), stop)
    app = create_app(daemon)
    sockets: list[tuple[ASGIApp, socket.socket]] = []
    if hasattr(socket, "AF_UNIX"):
        sockets.append((app, _unix_socket(runtime / "daemon.sock")))
    if settings.daemon.tcp_port or not sockets:
        tcp = _tcp_socket(settings.daemon.tcp_port)
        daemon.tcp_port = tcp.getsockname()[1]
        token = _token(runtime)
        sockets.append((TokenGuard(app, token, daemon.tcp_port), tcp))
        paths.write_private(runtime / "port", str(daemon.tcp_port))
    servers += [_server(each) for each, _ in sockets]
    # uvicorn sends a signal on to the handler before it once it has ended in order; the default one would kill us then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    log.info("tabwise %s listens, pid %d, tcp port %s", __version__, os.getpid(), daemon.tcp_port)
    watcher = asyncio.create_task(host.watch())
    running = [
        asyncio.create_task(server.serve(sockets=[each])) for server, (_, each) in zip(servers, sockets, strict=True)
    ]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        stop()
        await asyncio.gather(*running)
    finally:
        watcher.cancel()
        await host.close()
        guard.close()
        for name in ("daemon.sock", "port", "token"):
            (runtime / name).unlink(missing_ok=True)


def _server(app: ASGIApp) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
            ws="none",
        )
    )


def _unix_socket(path: Path) -> socket.socket:
    # Bound here and not by uvicorn, which makes its sockets world-writable. We hold the lock: a file that is there was
    # left behind by a daemon that was killed.
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise DaemonError(
            f"cannot bind {path}: {error.strerror}; set TABWISE_RUNTIME_DIR to another directory"
        ) from None
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def _tcp_socket(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise DaemonError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}; change daemon.tcp_port") from None
    listener.listen(_BACKLOG)
    return listener


def _token(runtime: Path) -> str:
    token = secrets.token_urlsafe(32)
    paths.write_private(runtime / "token", token)
    return token


def _llamacpp(settings: Settings, runtime: Path) -> Load:
    async def load(model: LocalModel) -> Engine:
        if model.format != "gguf":
            raise UnknownModelError(
                f"{model.name} is a model folder, llama.cpp takes GGUF files; choose one in model.name"
            )
        from agent.engines.llamacpp import LlamaCppEngine  # 100 MB of native code, wanted only when a model is

        return await LlamaCppEngine.load(model.path, settings.engine, runtime)

    return load


def _start_log(settings: Settings) -> None:
    folder = paths.private_dir(paths.log_dir())
    handler = logging.handlers.RotatingFileHandler(
        folder / "daemon.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(settings.log.level.upper())
    for noisy in ("aiohttp", "filelock", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TabwiseError as failure:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(f"tabwise: {failure}\n")
        sys.exit(1)

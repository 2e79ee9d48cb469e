"""The daemon's HTTP application: routes of our own for the language server and the command line, and OpenAI's.

Turns requests into calls of the completer and the explainer, and their streams into lines. Knows neither sockets nor
processes (`serve.py`), nor who asks. A client that goes away cancels its generation.

Never logs text of documents: ids, counts and times only.
"""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent import completer, explainer, http_io, openai_api, wire
from agent.completer import Completed, Spent
from agent.config import Settings
from agent.engine_host import EngineHost, HostState
from agent.engines.base import Task
from agent.errors import RequestError, TabwiseError
from agent.http_io import OpenRequests
from agent.served_adapters import ServedAdapters
from agent.types import CompletionRequest, Explanation, ExplanationRequest, Generation
from agent.version import __version__

log = logging.getLogger(__name__)

_PART_S = 0.005
"""Text that comes faster than this is sent together: sending takes as long as half of it, at both ends."""
_GENERATIONS = 1024  # facts of the latest generations that are kept for feedback: some hours of typing, about 10 MB


@dataclass(slots=True)
class Daemon:
    """What the routes share."""

    settings: Settings
    host: EngineHost
    adapters: ServedAdapters
    stop: Callable[[], None]
    """Ends the process, in good order."""
    tcp_port: int | None = None
    started: float = field(default_factory=time.time)
    open_requests: OpenRequests = field(default_factory=OpenRequests)
    last_activity: float = 0.0
    """Time of the user's last keystroke, as far as requests told; seconds since the epoch, 0 for never."""
    served: dict[str, int] = field(default_factory=lambda: {"completions": 0, "explanations": 0})
    typing: Spent = field(default_factory=Spent)
    """What the requests cost that somebody waited for."""
    ahead: Spent = field(default_factory=Spent)
    """What was done in advance."""
    generations: OrderedDict[str, Generation] = field(default_factory=OrderedDict)

    def remember(self, generation: Generation) -> None:
        """Keep the facts of a generation for feedback."""
        self.generations[generation.completion_id] = generation
        while len(self.generations) > _GENERATIONS:
            self.generations.popitem(last=False)

    def status(self) -> dict[str, Any]:
        """Return what `tabwise status` shows."""
        loaded = self.host.loaded
        return {
            "version": __version__,
            "api": wire.API,
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self.started, 1),
            "model": {
                "name": self.host.name,
                "state": self.host.state.value,
                "error": str(self.host.error) if self.host.error else None,
                "fim": loaded.fim.name if loaded and loaded.fim else None,
                "context_tokens": loaded.engine.context_tokens if loaded else None,
                "loads": self.host.loads,
                "idle_s": round(self.host.idle_s, 1),
            },
            "adapters": self.adapters.describe(),
            "snippet_tokens": (
                completer.snippet_tokens(self.settings.completion, on_gpu=loaded.engine.on_gpu) if loaded else 0
            ),
            "open_requests": self.open_requests.count,
            "served": dict(self.served),
            "work": {"typing": asdict(self.typing), "ahead": asdict(self.ahead)},
            "last_activity": self.last_activity,
            "tcp_port": self.tcp_port,
        }


def create_app(daemon: Daemon) -> Starlette:
    """Return the application."""
    own = [
        Route("/healthz", _route(daemon, _healthz)),
        Route("/status", _route(daemon, _status)),
        Route("/shutdown", _route(daemon, _shutdown), methods=["POST"]),
        Route("/tabwise/warm", _route(daemon, _warm), methods=["POST"]),
        Route("/tabwise/complete", _route(daemon, _complete), methods=["POST"]),
        Route("/tabwise/explain", _route(daemon, _explain), methods=["POST"]),
        Route("/tabwise/adapters", _route(daemon, _adapters), methods=["GET", "PUT"]),
        Route("/tabwise/generations/{completion_id}", _route(daemon, _generation)),
    ]
    app = Starlette(routes=[*own, *openai_api.routes(daemon.host, daemon.adapters, daemon.open_requests)])
    app.state.daemon = daemon
    return app


Handler = Callable[[Daemon, Request], Awaitable[Response]]


def _route(daemon: Daemon, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(daemon, request)
        except TabwiseError as error:
            return JSONResponse({"error": wire.error_fields(error)}, http_io.status_of(error))

    return endpoint


async def _healthz(daemon: Daemon, request: Request) -> Response:
    del daemon, request
    return JSONResponse({"status": "ok", "version": __version__, "api": wire.API, "pid": os.getpid()})


async def _status(daemon: Daemon, request: Request) -> Response:
    del request
    return JSONResponse(daemon.status())


async def _shutdown(daemon: Daemon, request: Request) -> Response:
    only_if_idle = request.query_params.get("if_idle") == "1"
    if only_if_idle and daemon.open_requests.count:
        return JSONResponse({"stopping": False, "open_requests": daemon.open_requests.count}, 409)
    log.info("asked to stop")
    daemon.stop()
    return JSONResponse({"stopping": True})


async def _generation(daemon: Daemon, request: Request) -> Response:
    found = daemon.generations.get(request.path_params["completion_id"])
    if found is None:
        raise RequestError("no generation of that id is remembered (the latest 1024 are)")
    return JSONResponse(wire.plain(found))


async def _adapters(daemon: Daemon, request: Request) -> Response:
    if request.method == "PUT":
        wanted = wire.structure(dict[Task, Path | None], await http_io.body_of(request))
        if relative := [str(folder) for folder in wanted.values() if folder and not folder.is_absolute()]:
            raise RequestError(f"the folder {relative[0]!r} is not absolute; the daemon has a directory of its own")
        with daemon.open_requests:
            await daemon.adapters.serve(wanted)
    return JSONResponse(daemon.adapters.describe())


async def _warm(daemon: Daemon, request: Request) -> Response:
    await http_io.body_of(request)

    async def states() -> AsyncGenerator[bytes, None]:
        async with aclosing(daemon.host.warm()) as stream:
            async for state in stream:
                yield wire.line(state=state.value)

    return http_io.lines(daemon.open_requests, states())


async def _complete(daemon: Daemon, request: Request) -> Response:
    asked = wire.structure(CompletionRequest, await http_io.body_of(request))
    daemon.last_activity = max(daemon.last_activity, time.time() - asked.activity_ms / 1000)
    spent = daemon.ahead if asked.ahead else daemon.typing

    async def parts() -> AsyncGenerator[bytes, None]:
        if daemon.host.loaded is None:
            yield wire.line(state=HostState.LOADING.value)
        held, sent = "", 0.0
        async with (
            daemon.host.use() as loaded,
            daemon.adapters.held(Task.COMPLETION) as adapter,
            aclosing(completer.complete(loaded, asked, daemon.settings.completion, spent, adapter=adapter)) as stream,
        ):
            async for part in stream:
                if isinstance(part, Completed):
                    daemon.served["completions"] += 1
                    if part.generation:
                        daemon.remember(part.generation)
                    timing = part.completion.timing
                    log.info(
                        "completion %s: %d chars, %s, %.0f ms, prefill %d, cached %d, decoded %d",
                        asked.id,
                        len(part.completion.text),
                        part.completion.stop_reason,
                        timing.total_ms,
                        timing.prefill_tokens,
                        timing.cached_tokens,
                        timing.decoded_tokens,
                    )
                    yield wire.line(completion=part.completion)
                else:
                    held += part
                    if time.monotonic() - sent >= _PART_S:
                        yield wire.line(text=held)
                        held, sent = "", time.monotonic()

    return http_io.lines(daemon.open_requests, parts())


async def _explain(daemon: Daemon, request: Request) -> Response:
    asked = wire.structure(ExplanationRequest, await http_io.body_of(request))

    async def parts() -> AsyncGenerator[bytes, None]:
        if daemon.host.loaded is None:
            yield wire.line(state=HostState.LOADING.value)
        async with (
            daemon.host.use() as loaded,
            daemon.adapters.held(Task.EXPLANATION) as adapter,
            aclosing(explainer.explain(loaded, asked, daemon.settings.explain, adapter)) as stream,
        ):
            async for part in stream:
                if isinstance(part, Explanation):
                    daemon.served["explanations"] += 1
                    log.info("explanation %s: %s, %.0f ms", asked.id, part.stop_reason, part.timing.total_ms)
                    yield wire.line(explanation=part)
                else:
                    yield wire.line(text=part)

    return http_io.lines(daemon.open_requests, parts())

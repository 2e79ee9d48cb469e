"""The line to a remote server: requests, streams of events, patience, second tries, and errors that give nothing away.

Knows HTTP, no models and no routes. What may be told of a server's refusal is in `refusals.py`.

Invariants: a request that cannot be answered ends within the set times, whatever the server does; the token goes to the
configured server alone (no redirect is followed, no proxy of the environment used unless asked) and into no message;
nothing is asked a second time once a byte of an answer was seen.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
import tenacity

from agent import remote_server
from agent.config import RemoteSettings
from agent.engines import refusals, sse
from agent.errors import ConfigError, ModelChangedError, RemoteError
from agent.version import __version__

_TRIES = 3  # a server that restarts behind a balancer is back at the second; somebody waits for each
_WAIT_S, _LONGEST_WAIT_S = 0.1, 1.0  # before the second try, and before any; a person who types has gone on by then
_END_S = 0.05  # it comes with the last event or right behind it
_KEEP_S = 4.0  # for an idle connection: uvicorn, which vLLM runs on, closes them after 5 s
_AGAIN = frozenset({429, 500, 502, 503, 504})
_BODY_BYTES = 8 << 20  # of a whole answer: 30 KB of text as tokens with their texts have half a megabyte
_AUTHORIZATION = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


class _AgainError(Exception):
    """A failure before the first byte, after which another try may help."""

    def __init__(self, error: RemoteError, wait_s: float = 0.0) -> None:
        super().__init__()
        self.error = error
        self.wait_s = wait_s
        """What the server asks to be waited."""


class Connection:
    """A server that is asked by HTTP."""

    def __init__(self, settings: RemoteSettings, token: str | None) -> None:
        """Connect to nothing yet.

        Args:
            settings: Where the server is, and how long to wait for it.
            token: Bearer token; None for none.
        """
        self.where = remote_server.root(settings)
        self.keeps_open = True
        """Whether the server lets a connection be used again."""
        self._settings = settings
        self._token = token
        headers = {"User-Agent": f"tabwise/{__version__}", "Accept-Encoding": "identity"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._proxy = _proxy(settings)
        self._patience: set[asyncio.Timeout] = set()
        """Of everybody who waits."""
        self._http = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(keepalive_timeout=_KEEP_S),
            # Whole requests are timed below; here only what nobody else sees, the making of a connection.
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_s, sock_connect=settings.connect_s),
            auto_decompress=False,  # nothing compressed is asked for, and a small body could become a huge one
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def get(self, path: str) -> dict[str, Any]:
        """Return what the server answers to a question that holds no text of the user's.

        Raises:
            RemoteError: It refuses, breaks off, or does not answer in time.
        """
        return self._object(await self._whole("GET", path, None, private=False))

    async def post(self, path: str, body: dict[str, Any], *, private: bool = True) -> dict[str, Any]:
        """Return what the server answers to a request; `private` where that holds text of the user's.

        Raises:
            RemoteError: It refuses, breaks off, or does not answer in time.
        """
        return self._object(await self._whole("POST", path, body, private=private))

    async def tell(self, path: str, body: dict[str, Any]) -> None:
        """Have the server do something, whatever it says of it; nothing of the user's text is in `body`.

        Raises:
            RemoteError: It refuses, breaks off, or does not answer in time.
        """
        await self._whole("POST", path, body, private=False)

    async def stream(
        self, path: str, body: dict[str, Any], progress: Callable[[], int]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a streamed answer; closing it closes the connection, which is the cancel.

        Args:
            path: The route.
            body: The request.
            progress: Tells how much the events so far have brought; one that brought nothing renews no patience.

        Raises:
            RemoteError: The server refuses, breaks off, or says nothing in time.
        """
        until = self._now() + self._settings.first_s
        answer = await self._opened("POST", path, body, until, private=True)
        try:
            if answer.content_type != "text/event-stream":
                told = refusals.kind(answer.content_type)
                raise RemoteError(
                    f"{self.where}{path} answered with {told}, not with a stream; is it an OpenAI server?"
                )
            events, patience, brought = sse.Events(), self._settings.first_s, progress()
            while received := await self._received(answer, until, patience):
                for data in self._data(events, received):
                    if data == b"[DONE]":
                        await self._end(answer)
                        return
                    yield self._object(data)
                    if progress() > brought:
                        brought, patience = progress(), self._settings.between_s
                        until = self._now() + patience
        finally:
            answer.close()

    async def close(self) -> None:
        """Close what is open; who waits for an answer is told to ask again."""
        await self._http.close()
        for patience in self._patience:  # aiohttp tells them nothing
            if not patience.expired():
                patience.reschedule(self._now())

    def broke_off(self, what: str = "") -> RemoteError:
        """Return the error for an answer that has no end."""
        return RemoteError(
            f"{self.where} broke off in the middle of an answer{f' ({what})' if what else ''}; try again"
        )

    def failed(self, fields: Any) -> RemoteError:
        """Return the error for one that the server reports within a stream."""
        return RemoteError(f"{self.where} failed{refusals.codes(fields)}; see the server's log")

    def _let_go(self) -> ModelChangedError:
        # Closed by us, under a request of somebody who began before: what he knows of the model is void.
        return ModelChangedError(f"{self.where} was let go of meanwhile, since it serves another model; ask again")

    async def _end(self, answer: aiohttp.ClientResponse) -> None:
        """Wait for the end of the body behind the last event, so that the connection can be used again."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_END_S):
                await answer.content.readany()

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None, *, private: bool) -> bytes:
        until = self._now() + self._settings.first_s
        answer = await self._opened(method, path, body, until, private=private)
        whole = bytearray()
        try:
            while received := await self._received(answer, until, self._settings.first_s):
                whole += received
                if len(whole) > _BODY_BYTES:
                    raise RemoteError(
                        f"{self.where}{path} answered with over {_BODY_BYTES >> 20} MB; is it an OpenAI server?"
                    )
        except BaseException:
            answer.close()
            raise
        answer.release()
        return bytes(whole)

    async def _opened(
        self, method: str, path: str, body: dict[str, Any] | None, until: float, *, private: bool
    ) -> aiohttp.ClientResponse:
        """Return an answer of status 200 whose body is still to be read; asks again where that may help."""
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=_pause,
            retry=tenacity.retry_if_exception_type(_AgainError),
            reraise=True,
        )
        try:
            async with self._within(until, self._settings.first_s):
                async for attempt in tries:
                    with attempt:
                        answer = await self._asked(method, path, body)
                        if answer.status == HTTPStatus.OK:
                            return answer
                        await self._refuse(answer, path, private=private)
        except _AgainError as failure:
            raise failure.error from None
        raise AssertionError("a last try that fails raises")

    async def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> aiohttp.ClientResponse:
        headers = {} if self.keeps_open else {"Connection": "close"}
        if self._http.closed:
            raise self._let_go()
        try:
            return await self._http.request(
                method, self.where + path, json=body, headers=headers, allow_redirects=False, proxy=self._proxy
            )
        except aiohttp.ConnectionTimeoutError:
            # It was waited for long enough; a second time would be as long.
            raise RemoteError(
                f"{self.where} cannot be reached within {self._settings.connect_s:g} s; check remote.url and the network"
            ) from None
        except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError) as error:
            raise RemoteError(
                f"{self.where} has no certificate that is trusted here ({type(error).__name__}); set SSL_CERT_FILE to "
                "your authority's"
            ) from None
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if self._http.closed:
                raise self._let_go() from None
            reason = (getattr(error, "strerror", None) or type(error).__name__).strip()
            told = RemoteError(f"{self.where} cannot be reached ({reason}); check remote.url, and whether it runs")
            raise _AgainError(told) from None
        except aiohttp.ClientError as error:
            if self._http.closed:
                raise self._let_go() from None
            raise RemoteError(f"{self.where} does not speak HTTP as it should ({type(error).__name__})") from None

    async def _refuse(self, answer: aiohttp.ClientResponse, path: str, *, private: bool) -> None:
        """Raise the error for an answer that is not 200."""
        status = answer.status
        try:
            if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
                raise RemoteError(
                    f"{self.where}{path} sends on to another address ({status}), which is not followed; set remote.url to it",
                    status,
                )
            fields = await refusals.read(answer)
            told = refusals.codes(fields) if private else refusals.reason(fields, self._token)
            wait_s = _seconds(answer.headers.get("Retry-After", ""))
        finally:
            answer.close()
        if status in _AUTHORIZATION:
            token = "refuses the token" if self._token else "wants a token"
            raise RemoteError(f"{self.where} {token} ({status}); set remote.token_file", status)
        if status not in _AGAIN:
            raise RemoteError(f"{self.where}{path} refused the request with status {status}{told}", status)
        what = "is busy" if status == HTTPStatus.TOO_MANY_REQUESTS else "fails"
        error = RemoteError(f"{self.where}{path} {what} (status {status}{told}); try again later", status)
        if wait_s > _LONGEST_WAIT_S:
            raise error
        raise _AgainError(error, wait_s)

    async def _received(self, answer: aiohttp.ClientResponse, until: float, patience_s: float) -> bytes:
        try:
            async with self._within(until, patience_s):
                return await answer.content.readany()
        except aiohttp.ClientError as error:
            if self._http.closed:
                raise self._let_go() from None
            raise self.broke_off(type(error).__name__) from None

    @asynccontextmanager
    async def _within(self, until: float, patience_s: float) -> AsyncGenerator[None, None]:
        patience = asyncio.timeout_at(until)
        try:
            async with patience:
                self._patience.add(patience)
                yield
        except TimeoutError:
            if self._http.closed:
                raise self._let_go() from None
            raise RemoteError(
                f"{self.where} gave no answer for {patience_s:g} s; try again, or raise remote.first_s and remote.between_s"
            ) from None
        finally:
            self._patience.discard(patience)

    def _data(self, events: sse.Events, received: bytes) -> list[bytes]:
        try:
            return events.feed(received)
        except sse.TooLongError:
            raise RemoteError(
                f"{self.where} sent an event of over {sse.EVENT_BYTES >> 20} MB; is it an OpenAI server?"
            ) from None

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise RemoteError(f"{self.where} sent {len(data)} bytes that are no JSON object; is it an OpenAI server?")
        return found

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _pause(state: tenacity.RetryCallState) -> float:
    jittered = tenacity.wait_random_exponential(multiplier=_WAIT_S, max=_LONGEST_WAIT_S)(state)
    failure = state.outcome.exception() if state.outcome else None
    return max(jittered, failure.wait_s) if isinstance(failure, _AgainError) else jittered


def _proxy(settings: RemoteSettings) -> str | None:
    # Not aiohttp's `trust_env`: that one takes passwords from ~/.netrc as well, and sends them in our token's place.
    found = remote_server.proxy(settings)
    scheme = found.partition(":")[0].lower() if found else "http"
    if scheme not in ("http", "https"):
        raise ConfigError(
            f"the environment's proxy speaks {scheme}, and only http and https are spoken here; set remote.proxy to none"
        )
    return found


def _seconds(text: str) -> float:
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0

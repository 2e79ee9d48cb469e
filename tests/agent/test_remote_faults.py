"""The remote engine against a server that fails in every way: one clear line, and never a wait beyond the set times."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import repeat
from typing import Any

import pytest

from agent.config import EngineSettings, RemoteSettings
from agent.engines import sse
from agent.engines.base import Decoded, Event, Finished, GenerationRequest
from agent.engines.remote import RemoteEngine
from agent.errors import ConfigError, EngineError, ModelChangedError, PromptTooLongError, RemoteError
from agent.types import Chat, Message
from tests.fakes import FakeVllm
from tests.fault_server import (
    MODEL,
    Behaviour,
    Exchange,
    FaultServer,
    answer,
    cut_after,
    drip,
    hang,
    hang_after,
    raw,
    status,
    texts,
)

SECRET = "sk-very-secret"
TEXT = "the user's own text"
ROUTE = "/v1/completions"
CONNECT_S, FIRST_S, BETWEEN_S = 0.3, 0.6, 0.4


@pytest.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as made:
        made.usual[ROUTE] = texts("one", " two")
        yield made


def settings(server: FaultServer, **changes: Any) -> RemoteSettings:
    times = {"connect_s": CONNECT_S, "first_s": FIRST_S, "between_s": BETWEEN_S}
    return RemoteSettings(**({"url": server.url} | times | changes))


@pytest.fixture
async def engine(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RemoteEngine]:
    monkeypatch.setenv("TABWISE_REMOTE_TOKEN", SECRET)
    made = await RemoteEngine.load(settings(server), EngineSettings())
    yield made
    await made.close()


async def run(engine: RemoteEngine, text: str = TEXT, max_tokens: int = 40) -> list[Event]:
    ids = tuple(token.id for token in await engine.tokenize(text))
    async with aclosing(engine.generate(GenerationRequest(ids, max_tokens))) as stream:
        return [event async for event in stream]


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Decoded))


async def fails(engine: RemoteEngine, match: str, within_s: float = FIRST_S) -> EngineError:
    began = time.monotonic()
    with pytest.raises(EngineError, match=match) as caught:
        await run(engine)
    assert time.monotonic() - began < within_s + 0.5
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert TEXT not in message
    assert len(message) < 400
    return caught.value


async def test_it_answers(engine: RemoteEngine, server: FaultServer) -> None:
    events = await run(engine)
    assert said(events) == "one two"
    assert isinstance(events[-1], Finished)
    assert events[-1].ended
    assert server.asked[-1].headers["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("code", [401, 403])
async def test_a_token_that_is_refused(engine: RemoteEngine, server: FaultServer, code: int) -> None:
    server.script[ROUTE].append(status(code, f"Incorrect API key provided: {SECRET}, {TEXT}"))
    error = await fails(engine, rf"refuses the token \({code}\); set remote.token_file")
    assert isinstance(error, RemoteError)
    assert len(server.bodies(ROUTE)) == 1  # nothing is tried again


async def test_a_token_that_is_missing(server: FaultServer) -> None:
    server.usual["/v1/models"] = status(401)
    with pytest.raises(RemoteError, match="wants a token"):
        await RemoteEngine.load(settings(server), EngineSettings())


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
async def test_a_server_that_fails_for_a_moment_is_asked_again(
    engine: RemoteEngine, server: FaultServer, code: int
) -> None:
    server.script[ROUTE].append(status(code))
    assert said(await run(engine)) == "one two"
    first, second = server.bodies(ROUTE)
    assert first == second


async def test_a_server_that_goes_on_failing_is_asked_three_times(engine: RemoteEngine, server: FaultServer) -> None:
    server.usual[ROUTE] = status(500, f"cannot take {TEXT}")
    await fails(engine, "fails .status 500")
    assert len(server.bodies(ROUTE)) == 3


async def test_a_server_that_asks_to_wait_longer_than_anybody_would_is_left_alone(
    engine: RemoteEngine, server: FaultServer
) -> None:
    server.usual[ROUTE] = status(429, Retry_After="30")
    await fails(engine, "is busy")
    assert len(server.bodies(ROUTE)) == 1


@pytest.mark.parametrize("place", ["type", "code"])
@pytest.mark.parametrize("word", [SECRET, "myPrivateIdentifier", "password123"])
async def test_a_word_in_a_codes_place_is_not_repeated(
    engine: RemoteEngine, server: FaultServer, place: str, word: str
) -> None:
    refusal = json.dumps({"error": {"message": word, place: word}}).encode()
    server.script[ROUTE] += [
        lambda exchange: exchange.reply(400, refusal),
        drip([b"data: " + refusal + b"\n\n"], 0),
        lambda exchange: exchange.reply(200, b"", kind=f"{word}/x"),
    ]
    for match in ("status 400", "failed", "answered with something else"):
        assert word not in str(await fails(engine, match))


async def test_what_is_refused_for_good_is_not_tried_again(engine: RemoteEngine, server: FaultServer) -> None:
    server.usual[ROUTE] = status(400, f"bad request: {TEXT}")
    await fails(engine, "refused the request with status 400, invalid_request_error")
    assert len(server.bodies(ROUTE)) == 1


SILENT: dict[str, tuple[Behaviour, float]] = {
    "before the headers": (hang, FIRST_S),
    "behind the headers": (hang_after(), FIRST_S),
    "in the middle": (hang_after("one"), BETWEEN_S),
    "but for comments": (drip(repeat(b": keep-alive\n\n"), 0.05), FIRST_S),
    "but for events of nothing": (drip(repeat(b"data: {}\n\n"), 0.05), FIRST_S),
    "but for a flood of them": (drip(repeat(b"data: {}\n\n" * 1000), 0), FIRST_S),
    "but for texts of nothing": (drip(repeat(b'data: {"choices": [{"text": ""}]}\n\n'), 0.05), FIRST_S),
    "but for single bytes": (drip((b"%c" % sign for sign in b"data: " + b"x" * 1000), 0.05), FIRST_S),
}


@pytest.mark.parametrize("name", SILENT)
async def test_silence_ends_with_the_patience(engine: RemoteEngine, server: FaultServer, name: str) -> None:
    behave, patience = SILENT[name]
    server.script[ROUTE].append(behave)
    began = time.monotonic()
    await fails(engine, "gave no answer for", patience)
    assert time.monotonic() - began > patience - 0.1
    assert said(await run(engine)) == "one two"
    async with asyncio.timeout(2):
        while server.open:
            await asyncio.sleep(0.01)  # nothing is left open


async def test_a_slow_answer_is_one(engine: RemoteEngine, server: FaultServer) -> None:
    # Longer than any of the times, but never silent for as long as one of them.
    server.script[ROUTE].append(texts(*"abcdefgh", pause_s=0.15))
    assert said(await run(engine)) == "abcdefgh"


async def test_a_failing_server_that_then_hangs_keeps_nobody_beyond_the_first_patience(
    engine: RemoteEngine, server: FaultServer
) -> None:
    server.script[ROUTE] += [status(503), hang]
    await fails(engine, "gave no answer for")


WRONG: dict[str, tuple[Behaviour, str]] = {
    "broken JSON": (drip([b"data: {'no': json}\n\n"], 0), "no JSON object"),
    "JSON that is no object": (drip([b"data: [1]\n\n"], 0), "no JSON object"),
    "nesting without end": (drip([b"data: " + b"[" * 100_000 + b"\n\n"], 0), "no JSON object"),
    "another form": (drip([b'data: {"choices": [3]}\n\n'], 0), "another form"),
    "an error in the stream": (
        drip([b'data: {"error": {"message": "the user\'s own text", "type": "server_error"}}\n\n'], 0),
        "failed, server_error",
    ),
    "a connection that is cut": (cut_after("one"), "broke off in the middle"),
    "a stream without an end": (
        raw(b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n'),
        "broke off in the middle",
    ),
    "a redirect": (status(307, Location="http://127.0.0.1:1/v1/completions"), r"another address .307., .*not followed"),
    "no stream": (answer({"choices": []}), "answered with application/json"),
    "a page": (drip([b"<html>"], 0, kind="text/html"), "answered with text/html"),
    "an event without end": (drip(repeat(b"data: " + b"x" * 65536 + b"\n"), 0), "event of over 1 MB"),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH\r\n\r\n"), "does not speak HTTP"),
    "headers without end": (raw(b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000), "does not speak HTTP"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_answer_is_one_clear_line(engine: RemoteEngine, server: FaultServer, name: str) -> None:
    behave, match = WRONG[name]
    server.script[ROUTE].append(behave)
    await fails(engine, match)
    assert len(server.bodies(ROUTE)) == 1  # a byte of an answer was seen
    assert said(await run(engine)) == "one two"


ODD = [
    {},
    {"tokens": 3},
    {"tokens": [{}]},
    {"tokens": [None]},
    {"tokens": {"a": 1}},
    {"tokens": [float("inf")]},
    {"tokens": [{"id": None, "piece": "a"}]},
    {"tokens": "ab"},
]


@pytest.mark.parametrize("kind", ["vLLM", "llama-server"])
@pytest.mark.parametrize("odd", ODD, ids=str)
async def test_an_odd_answer_outside_of_a_stream_is_one_clear_line(
    server: FaultServer, kind: str, odd: dict[str, Any]
) -> None:
    if kind == "vLLM":
        FakeVllm(server)
    else:
        server.usual["/tokenize"] = answer({"tokens": [{"id": 1, "piece": "x"}]})
    engine = await RemoteEngine.load(settings(server), EngineSettings())
    assert engine.dialect.name == kind
    server.usual |= {"/tokenize": answer(odd), "/apply-template": answer(odd)}
    chat = Chat((Message("user", "?"),))
    for asked in (engine.tokenize(TEXT), engine.start_ids(), engine.chat_ids(chat)):
        with pytest.raises(RemoteError, match="another form than expected"):
            await asked
    await engine.close()


async def test_odd_texts_of_tokens_are_one_clear_line(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await RemoteEngine.load(settings(server), EngineSettings())
    server.usual["/detokenize"] = answer({"text": 3})
    with pytest.raises(RemoteError, match=r"another form than expected .KeyError"):
        await engine.tokenize(TEXT)
    with pytest.raises(RemoteError, match=r"another form than expected .KeyError"):
        async for _ in engine.generate(GenerationRequest((97,), 4, alternatives=3)):
            pass
    await engine.close()


async def test_a_token_goes_nowhere_else(engine: RemoteEngine, server: FaultServer) -> None:
    async with FaultServer() as other:
        server.script[ROUTE].append(status(302, Location=f"{other.url}{ROUTE}"))
        await fails(engine, "sends on to another address")
        assert other.asked == []


async def test_a_connection_that_is_closed_before_an_answer_is_made_anew(
    engine: RemoteEngine, server: FaultServer
) -> None:
    server.script[ROUTE].append(raw(b""))
    assert said(await run(engine)) == "one two"
    assert len(server.bodies(ROUTE)) == 2


async def test_a_server_that_is_gone_and_comes_back(engine: RemoteEngine, server: FaultServer) -> None:
    await server.stop()
    await fails(engine, "cannot be reached", within_s=1.0)
    await server.listen()
    assert said(await run(engine)) == "one two"


async def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any, **__: Any) -> None:
        await asyncio.sleep(60)

    # No address is known here that takes packets and says nothing.
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", never)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"cannot be reached within 0\.3 s"):
        await RemoteEngine.load(RemoteSettings(url="http://127.0.0.1:9", connect_s=CONNECT_S), EngineSettings())
    assert time.monotonic() - began < 1


async def test_a_server_whose_certificate_is_not_trusted(server: FaultServer) -> None:
    with pytest.raises(RemoteError) as caught:
        await RemoteEngine.load(settings(server, url=server.url.replace("http:", "https:")), EngineSettings())
    assert "\n" not in str(caught.value)


async def test_a_huge_body_is_not_read_to_its_end(server: FaultServer) -> None:
    server.usual["/v1/models"] = drip(repeat(b" " * (1 << 20)), 0, kind="application/json")
    with pytest.raises(RemoteError, match="over 8 MB"):
        await RemoteEngine.load(settings(server, first_s=20.0), EngineSettings())


@pytest.mark.parametrize("listed", [{}, {"data": []}, {"data": 3}, {"data": [{"name": "x"}, 4]}])
async def test_a_server_without_models(server: FaultServer, listed: dict[str, Any]) -> None:
    server.usual["/v1/models"] = answer(listed)
    with pytest.raises(RemoteError, match="lists no model"):
        await RemoteEngine.load(settings(server), EngineSettings())


async def test_a_model_that_is_not_served(server: FaultServer) -> None:
    with pytest.raises(RemoteError, match=f"does not serve 'other', but '{MODEL}'; set remote.model"):
        await RemoteEngine.load(settings(server, model="other"), EngineSettings())
    server.usual["/v1/models"] = answer({"data": [{"id": "a"}, {"id": "b\nc"}]})
    with pytest.raises(RemoteError, match=r"several models: 'a', 'b\\nc'; set remote.model"):
        await RemoteEngine.load(settings(server), EngineSettings())


async def test_a_format_that_there_is_not(server: FaultServer) -> None:
    with pytest.raises(ConfigError, match=r"remote\.fim"):
        await RemoteEngine.load(settings(server, fim="nonesuch"), EngineSettings())
    assert server.asked == []


async def test_closing_the_stream_closes_the_connection(engine: RemoteEngine, server: FaultServer) -> None:
    server.script[ROUTE].append(texts(*("word " for _ in range(1000)), pause_s=0.01))
    async with aclosing(engine.generate(GenerationRequest((1,), 2000))) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                break
    async with asyncio.timeout(1):
        await server.asked[-1].gone.wait()
    assert said(await run(engine)) == "one two"


async def test_a_server_that_does_not_stop_is_stopped(engine: RemoteEngine, server: FaultServer) -> None:
    server.script[ROUTE].append(texts(*("again " for _ in range(100_000))))
    events = await run(engine, max_tokens=10)
    assert len(said(events)) < 2000
    assert isinstance(events[-1], Finished)
    assert not events[-1].ended


async def test_too_long_a_prompt_never_leaves(engine: RemoteEngine, server: FaultServer) -> None:
    with pytest.raises(PromptTooLongError, match=r"engine\.context_tokens"):
        await run(engine, "word " * 5000)
    assert server.bodies(ROUTE) == []


async def test_another_model_in_its_place_is_noticed(engine: RemoteEngine, server: FaultServer) -> None:
    server.script[ROUTE].append(cut_after("one"))
    await fails(engine, "broke off")
    server.usual["/v1/models"] = answer({"data": [{"id": MODEL, "meta": {"n_vocab": 7}}]})
    with pytest.raises(ModelChangedError, match="another model than before"):
        await run(engine)


async def test_who_waits_while_it_is_closed_is_told_to_ask_again(engine: RemoteEngine, server: FaultServer) -> None:
    server.script[ROUTE] += [hang, hang_after("one"), status(503, Retry_After="1")]
    waiting = []
    for _ in range(3):
        waiting.append(asyncio.create_task(run(engine)))
        await asyncio.sleep(0.05)
    ids = tuple(token.id for token in await engine.tokenize(TEXT))
    await engine.close()
    for one in waiting:
        with pytest.raises(ModelChangedError, match="ask again"):
            await one
    late = engine.generate(GenerationRequest(ids, 4))
    with pytest.raises(ModelChangedError, match="ask again"):
        await anext(late)


async def test_nothing_of_it_is_in_the_log(
    engine: RemoteEngine, server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.script[ROUTE] += [status(500, f"{TEXT} {SECRET}"), status(400, f"{TEXT} {SECRET}")]
    await fails(engine, "status 400")
    assert SECRET not in caplog.text
    assert TEXT not in caplog.text


async def test_a_proxy_of_the_environment_is_used_only_when_asked_for(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultServer() as proxy:
        # A proxy is given the whole address as the path.
        proxy.usual["http://models.example/v1/models"] = answer({"data": [{"id": MODEL}]})
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        made = await RemoteEngine.load(settings(server), EngineSettings())
        await made.close()
        made = await RemoteEngine.load(settings(server, proxy="environment"), EngineSettings())
        await made.close()
        assert proxy.asked == []  # the server is on this machine
        there = settings(server, url="http://models.example", proxy="environment")
        made = await RemoteEngine.load(there, EngineSettings())
        await made.close()
        assert {one.path for one in proxy.asked} == {
            "http://models.example/v1/models",
            "http://models.example/tokenize",
        }


async def test_a_proxy_that_speaks_no_http_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"socks5://me:{SECRET}@proxy.example")
    with pytest.raises(ConfigError, match=r"speaks socks5, .*remote\.proxy") as caught:
        await RemoteEngine.load(RemoteSettings(url="http://models.example", proxy="environment"), EngineSettings())
    assert SECRET not in str(caught.value)


async def test_requests_are_json_and_name_us(engine: RemoteEngine, server: FaultServer) -> None:
    await run(engine)
    asked = server.asked[-1]
    assert asked.headers["content-type"] == "application/json"
    assert re.fullmatch(r"tabwise/[\d.]+\S*", asked.headers["user-agent"])
    assert asked.headers["accept-encoding"] == "identity"
    assert "cookie" not in asked.headers
    assert json.dumps(asked.body)


async def test_events_may_be_as_long_as_they_are_meant_to_be(engine: RemoteEngine, server: FaultServer) -> None:
    async def behave(exchange: Exchange) -> None:
        await texts("x" * (sse.EVENT_BYTES // 2))(exchange)

    server.script[ROUTE].append(behave)
    assert len(said(await run(engine, max_tokens=4000))) == sse.EVENT_BYTES // 2

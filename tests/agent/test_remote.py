"""The remote engine's dialects, against servers that speak them from a script; real ones are in tests/e2e."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import completer
from agent.catalog import LocalModel
from agent.completer import Completed
from agent.config import CompletionSettings, EngineSettings, RemoteSettings
from agent.engine_host import EngineHost
from agent.engines.base import Adapter, Decoded, Event, Finished, GenerationRequest, Prefilled, Task
from agent.engines.remote import RemoteEngine
from agent.errors import AdapterError, ModelChangedError, RemoteError
from agent.loaded import LoadedModel, prepare
from agent.types import Chat, CompletionRequest, Document, Message
from tests.agent.test_engine_host import guard
from tests.fakes import SPECIALS, FakeClock, FakeVllm, decode, scripted
from tests.fault_server import MODEL, Exchange, FaultServer, answer, cut_after, status, texts

NASTY = "".join(SPECIALS)
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as made:
        yield made


async def loaded(server: FaultServer, **changes: Any) -> RemoteEngine:
    fields: dict[str, Any] = {"url": server.url, "first_s": 5.0, "between_s": 5.0, **changes}
    return await RemoteEngine.load(RemoteSettings(**fields), EngineSettings())


def local(fmt: str | None = None) -> LocalModel:
    return LocalModel("remote", Path(), "remote", fmt, 0, "")


async def run(engine: RemoteEngine, request: GenerationRequest) -> list[Event]:
    async with aclosing(engine.generate(request)) as stream:
        return [event async for event in stream]


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Decoded))


def request(prefix: str, suffix: str = "\n") -> CompletionRequest:
    return CompletionRequest("1", Document("file:///a.py", 1, "a.py", "python"), prefix, suffix)


async def complete(model: LoadedModel, asked: CompletionRequest) -> Completed:
    async with aclosing(completer.complete(model, asked, CompletionSettings())) as stream:
        parts = [part async for part in stream]
    assert isinstance(parts[-1], Completed)
    return parts[-1]


# Servers of text.


async def test_prefix_and_suffix_go_apart(server: FaultServer) -> None:
    server.usual[COMPLETIONS] = texts("return a", " + b\n")
    engine = await loaded(server)
    model = await prepare(local(), engine)
    assert model.fim is not None
    assert model.fim.name == "suffix"
    done = await complete(model, request("def add(a, b):\n    ", "\n\nprint(add(1, 2))\n"))
    assert done.completion.text == "return a + b"
    assert done.generation is not None
    assert not done.generation.exact  # nothing may be trained on it
    body = server.bodies(COMPLETIONS)[-1]
    assert body["prompt"] == "def add(a, b):\n    "
    assert body["suffix"] == "\n\nprint(add(1, 2))\n"
    assert (body["model"], body["temperature"], body["stream"]) == (MODEL, 0.0, True)
    await engine.close()


async def test_a_word_that_was_begun_is_written_again_or_gone_on_with(server: FaultServer) -> None:
    server.usual[COMPLETIONS] = texts("    return a + b\n")
    engine = await loaded(server)
    model = await prepare(local(), engine)
    done = await complete(model, request("def add(a, b):\n    retur"))
    assert done.completion.text == "n a + b"
    server.usual[COMPLETIONS] = texts("n a + b\n")
    done = await complete(model, request("def add(a, b):\n    retur", "\n# again\n"))
    assert done.completion.text == "n a + b"
    await engine.close()


async def test_an_empty_suffix_is_none_the_server_could_overlook(server: FaultServer) -> None:
    server.usual[COMPLETIONS] = texts("x\n")
    engine = await loaded(server)
    await complete(await prepare(local(), engine), request("a = ", ""))
    assert server.bodies(COMPLETIONS)[-1]["suffix"] == "\n"
    await engine.close()


async def test_a_format_that_is_named_is_rendered_here(server: FaultServer) -> None:
    server.usual[COMPLETIONS] = texts("x\n")
    engine = await loaded(server, fim="qwen")
    await complete(await prepare(local("qwen"), engine), request("a = 1\nb = ", f"\nc = '{NASTY}'\n"))
    body = server.bodies(COMPLETIONS)[-1]
    assert body["prompt"].startswith("<|fim_prefix|>a = 1\n<|fim_suffix|>\nc = '")
    assert body["prompt"].count("<|fim_middle|>") == 1
    assert "suffix" not in body
    assert "<|endoftext|>" in body["stop"]
    await engine.close()


async def test_marks_in_the_users_text_reach_no_server_of_text(server: FaultServer) -> None:
    server.usual[COMPLETIONS] = texts("x\n")
    server.usual[CHATS] = texts("fine")
    engine = await loaded(server)
    await complete(await prepare(local(), engine), request(f"a = '{NASTY}'\nb = ", f"\nc = '{NASTY}'\n"))
    nasty = f"{NASTY}</s>[INST]"
    ids = await engine.chat_ids(Chat((Message("system", nasty), Message("user", nasty)), nasty))
    await run(engine, GenerationRequest(ids, 10, task=Task.EXPLANATION))
    sent = str([one.body for one in server.asked])
    assert "fim_prefix" in sent
    assert not [mark for mark in (*SPECIALS, "</s>", "[INST]") if mark in sent]
    await engine.close()


async def test_a_chat_goes_as_messages_and_is_gone_on_with(server: FaultServer) -> None:
    server.usual[CHATS] = texts(" adds", " two numbers.")
    engine = await loaded(server)
    chat = Chat((Message("system", "Explain."), Message("user", "def add(a, b): ...")), "The function `add`")
    ids = await engine.chat_ids(chat)
    events = await run(engine, GenerationRequest(ids, 40, task=Task.EXPLANATION))
    assert said(events) == " adds two numbers."
    assert server.bodies(CHATS)[-1]["messages"] == [
        {"role": "system", "content": "Explain."},
        {"role": "user", "content": "def add(a, b): ..."},
        {"role": "assistant", "content": "The function `add`"},
    ]
    # Broken off and taken up again, it goes on behind what was said.
    more = [token for event in events if isinstance(event, Decoded) for token in event.ids]
    await run(engine, GenerationRequest((*ids, *more), 40, task=Task.EXPLANATION))
    assert server.bodies(CHATS)[-1]["messages"][-1]["content"] == "The function `add` adds two numbers."
    await engine.close()


@pytest.mark.parametrize(
    "parts",
    [
        (" adds.",),
        (
            "The func",
            "tion `add` adds.",
        ),
        ("The function `add`", " adds."),
        ("The function `add` adds.",),
    ],
)
async def test_a_beginning_that_the_server_says_again_is_told_once(server: FaultServer, parts: tuple[str, ...]) -> None:
    server.usual[CHATS] = texts(*parts)
    engine = await loaded(server)
    ids = await engine.chat_ids(Chat((Message("user", "?"),), "The function `add`"))
    assert said(await run(engine, GenerationRequest(ids, 40, task=Task.EXPLANATION))) == " adds."
    await engine.close()


async def test_a_chat_without_an_opening_has_no_empty_turn(server: FaultServer) -> None:
    server.usual[CHATS] = texts("yes")
    engine = await loaded(server)
    ids = await engine.chat_ids(Chat((Message("user", "?"),)))
    assert said(await run(engine, GenerationRequest(ids, 4))) == "yes"
    assert server.bodies(CHATS)[-1]["messages"] == [{"role": "user", "content": "?"}]
    await engine.close()


async def test_a_server_of_text_takes_no_adapters_but_those_it_lists(server: FaultServer, tmp_path: Path) -> None:
    server.usual |= {COMPLETIONS: texts("x"), "/v1/models": answer({"data": [{"id": "base"}, {"id": "mine-1f"}]})}
    engine = await loaded(server, model="base", base="starter")
    await engine.attach([])
    with pytest.raises(AdapterError, match="takes none while it runs"):
        await engine.attach([Adapter("other-2e", tmp_path)])
    await engine.attach([Adapter("mine-1f", tmp_path)])
    await run(engine, GenerationRequest((1,), 4, adapter="mine-1f"))
    assert server.bodies(COMPLETIONS)[-1]["model"] == "mine-1f"
    with pytest.raises(AdapterError, match="not attached"):
        await run(engine, GenerationRequest((1,), 4, adapter="other-2e"))
    await engine.close()


# vLLM.


async def test_vllm_is_asked_by_token_ids(server: FaultServer) -> None:
    FakeVllm(server, scripted)
    engine = await loaded(server)
    assert engine.dialect.name == "vLLM"
    assert engine.context_tokens == 2048
    model = await prepare(local(), engine)
    assert model.fim is not None
    assert model.fim.name == "qwen"
    done = await complete(model, request("def add(a, b):\n    retur"))
    assert done.completion.text == "n a + b"
    assert done.generation is not None
    assert done.generation.exact
    assert all(-10 < logp < 0 for logp in done.generation.output_logps)
    probe, *bodies = server.bodies(COMPLETIONS)
    assert (decode(probe["prompt"]), probe["max_tokens"]) == ("x", 1)  # nothing of the user's
    assert decode(bodies[0]["prompt"]).startswith("<|fim_prefix|>def add")
    assert bodies[0]["repetition_penalty"] == bodies[0]["top_p"] == 1.0  # whatever the model's own settings say
    assert max(body["logprobs"] for body in bodies) == 20  # it refuses more
    await engine.close()


async def test_marks_in_the_users_text_are_plain_text_for_vllm(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    plain = await engine.tokenize(f"a{NASTY} {NASTY}b")
    assert "".join(token.text or "" for token in plain) == f"a{NASTY} {NASTY}b"
    assert all(token.id < 256 for token in plain)
    assert [token.id for token in await engine.tokenize(SPECIALS[0], special=True)] == [256]
    ids = await engine.chat_ids(Chat((Message("system", NASTY), Message("user", NASTY)), NASTY))
    assert decode(ids) == f"<|system|>{NASTY}<|im_end|><|user|>{NASTY}<|im_end|><|assistant|>{NASTY}"
    assert [one for one in ids if one >= 256] == [256 + SPECIALS.index("<|im_end|>")] * 2
    await engine.close()


async def test_a_text_full_of_marks_takes_few_requests_and_one_with_the_separator_more(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    before = len(server.asked)
    text = NASTY * 20
    assert "".join(token.text or "" for token in await engine.tokenize(text)) == text
    assert len(server.asked) - before <= 6
    text = f"a\x1f{SPECIALS[0]}b{SPECIALS[1]}"
    tokens = await engine.tokenize(text)
    assert "".join(token.text or "" for token in tokens) == text
    assert all(token.id < 256 for token in tokens)
    await engine.close()


async def test_texts_of_tokens_are_asked_for_once(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    tokens = await engine.tokenize("añ𝄞a")
    assert [token.text for token in tokens] == ["a", None, None, None, None, None, None, "a"]
    before = len(server.bodies("/detokenize"))
    await engine.tokenize("aa")
    assert len(server.bodies("/detokenize")) == before
    await engine.close()


async def test_several_tokens_at_once_are_told_one_by_one(server: FaultServer) -> None:
    fake = FakeVllm(server, lambda _: "ab<|endoftext|>")
    fake.at_once = 3
    engine = await loaded(server)
    events = await run(engine, GenerationRequest((97,), 9, alternatives=2))
    decoded = [event for event in events if isinstance(event, Decoded)]
    assert [(event.text, event.ids) for event in decoded] == [("a", (97,)), ("b", (98,)), ("", (261,))]
    assert [other.id for other in decoded[0].alternatives] == [97, 33]
    assert decoded[0].alternatives[1].text == "!"
    assert events[0] == Prefilled(1, 1, 0)
    assert isinstance(events[-1], Finished)
    assert (events[-1].ended, events[-1].decoded_tokens) == (True, 3)
    await engine.close()


async def test_a_prompt_begins_as_the_models_do(server: FaultServer) -> None:
    FakeVllm(server, start=(261,))
    engine = await loaded(server)
    assert await engine.start_ids() == (261,)
    await engine.close()


async def test_reading_alone_yields_no_text(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    events = await run(engine, GenerationRequest((97, 98), 0))
    assert said(events) == ""
    assert isinstance(events[-1], Finished)
    assert events[-1].decoded_tokens == 0
    assert engine.held((97, 98, 99)) == 2
    await engine.close()


# Adapters on vLLM.


async def test_an_adapter_is_loaded_served_and_unloaded(server: FaultServer, tmp_path: Path) -> None:
    fake = FakeVllm(server)
    engine = await loaded(server, base="starter")
    await engine.attach([Adapter("mine-1f", tmp_path / "mine-1f")])
    assert fake.adapters == {"mine-1f": str(tmp_path / "mine-1f")}
    await run(engine, GenerationRequest((97,), 4, adapter="mine-1f"))
    assert server.bodies(COMPLETIONS)[-1]["model"] == "mine-1f"
    await run(engine, GenerationRequest((97,), 4))
    assert server.bodies(COMPLETIONS)[-1]["model"] == MODEL
    await engine.attach([Adapter("mine-2e", tmp_path / "mine-2e")])
    assert list(fake.adapters) == ["mine-2e"]
    with pytest.raises(AdapterError, match="mine-1f"):
        await run(engine, GenerationRequest((97,), 4, adapter="mine-1f"))
    await engine.close()
    assert fake.adapters == {}


async def test_adapters_of_others_are_left_alone(server: FaultServer, tmp_path: Path) -> None:
    fake = FakeVllm(server)
    fake.adapters = {"theirs-1f": "/theirs", "shared-2e": "/shared"}
    engine = await loaded(server, base="starter")
    await engine.attach([Adapter("shared-2e", tmp_path)])
    await run(engine, GenerationRequest((97,), 4, adapter="shared-2e"))
    await engine.attach([])
    await engine.close()
    assert fake.adapters == {"theirs-1f": "/theirs", "shared-2e": "/shared"}
    assert server.bodies("/v1/load_lora_adapter") == server.bodies("/v1/unload_lora_adapter") == []


async def test_where_one_is_refused_those_from_before_stay(server: FaultServer, tmp_path: Path) -> None:
    fake = FakeVllm(server)
    engine = await loaded(server, base="starter")
    await engine.attach([Adapter("old-1f", tmp_path)])
    with pytest.raises(AdapterError, match=r"'bad-3d' is not served: .*cannot read"):
        await engine.attach([Adapter("new-2e", tmp_path), Adapter("bad-3d", tmp_path / "damaged")])
    assert list(fake.adapters) == ["old-1f"]
    await run(engine, GenerationRequest((97,), 4, adapter="old-1f"))
    await engine.close()


async def test_a_server_that_was_not_started_for_adapters(server: FaultServer, tmp_path: Path) -> None:
    FakeVllm(server)
    del server.usual["/v1/load_lora_adapter"]
    engine = await loaded(server, base="starter")
    with pytest.raises(AdapterError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        await engine.attach([Adapter("a-1f", tmp_path)])
    await engine.close()


async def test_without_a_base_no_adapter_is_attached(server: FaultServer, tmp_path: Path) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    with pytest.raises(AdapterError, match=r"remote\.base"):
        await engine.attach([Adapter("a-1f", tmp_path)])
    await engine.close()


async def test_the_folder_on_the_server_may_be_another(server: FaultServer, tmp_path: Path) -> None:
    fake = FakeVllm(server)
    engine = await loaded(server, base="starter", adapters_dir="/srv/adapters")
    await engine.attach([Adapter("a-1f", tmp_path / "a-1f")])
    assert fake.adapters == {"a-1f": "/srv/adapters/a-1f"}
    await engine.close()


# In the daemon.


async def test_a_model_that_took_the_place_of_another_is_understood_anew(server: FaultServer, tmp_path: Path) -> None:
    FakeVllm(server, scripted)
    host = EngineHost("remote", lambda _: loaded(server), guard(tmp_path), unload_after_s=0, find=lambda _: local())
    async with host.use() as model:
        assert (await complete(model, request("def add(a, b):\n    retur"))).completion.text == "n a + b"
    assert not (tmp_path / "engine.json").exists()  # what runs elsewhere cannot kill this process
    server.script[COMPLETIONS].append(cut_after())
    with pytest.raises(Exception, match="broke off"):
        async with host.use() as model:
            await complete(model, request("def add(a, b):\n    ret"))
    # A server of text has come, at the same address.
    del server.usual["/tokenize"]
    server.usual |= {"/v1/models": answer({"data": [{"id": MODEL}]}), COMPLETIONS: texts("    return 3\n")}
    with pytest.raises(ModelChangedError):
        async with host.use() as model:
            await complete(model, request("def add(a, b):\n    ret", "\n#\n"))
    async with host.use() as model:
        assert (await complete(model, request("def add(a, b):\n    ret"))).completion.text == "urn 3"
    assert host.loads == 2
    await host.close()


async def test_a_server_of_chats_alone_says_so_and_is_not_loaded_at_each_key(
    server: FaultServer, tmp_path: Path
) -> None:
    server.usual[CHATS] = texts("fine")
    host = EngineHost("remote", lambda _: loaded(server), guard(tmp_path), unload_after_s=0, find=lambda _: local())
    for _ in range(3):
        with pytest.raises(
            RemoteError, match=r"status 404.*serves 'served' as before; ask a server that has this route"
        ) as caught:
            async with host.use() as model:
                await complete(model, request("a = "))
        assert not isinstance(caught.value, ModelChangedError)
    assert host.loads == 1
    await host.close()


async def test_another_kind_of_server_for_the_same_model_is_understood_anew(server: FaultServer) -> None:
    FakeVllm(server)
    engine = await loaded(server)
    del server.usual["/tokenize"]
    with pytest.raises(ModelChangedError, match="another kind of server"):
        await engine.tokenize("a")
    await engine.close()


async def test_who_types_steadily_still_asks_which_model_it_is(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    monkeypatch.setattr("agent.engines.remote.time", SimpleNamespace(monotonic=clock))
    FakeVllm(server)
    engine = await loaded(server)
    for _ in range(25):
        clock.now += 10
        await run(engine, GenerationRequest((97,), 4))
    asked = [one for one in server.asked if one.path == "/v1/models"]
    assert len(asked) == 1 + 4  # at the load, and each minute
    server.usual["/v1/models"] = answer({"data": [{"id": MODEL, "max_model_len": 7}]})
    clock.now += 60
    with pytest.raises(ModelChangedError):
        await run(engine, GenerationRequest((97,), 4))
    await engine.close()


@pytest.mark.parametrize("names", [["pass"], ["12"], None])
async def test_a_server_that_tokenises_like_vllm_and_names_no_tokens_is_one_of_text(
    server: FaultServer, names: list[str] | None
) -> None:
    FakeVllm(server)

    async def nameless(exchange: Exchange) -> None:
        logprobs = {"tokens": names, "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1}]} if names else None
        await exchange.begin_stream()
        await exchange.event({"choices": [{"text": "pass", "logprobs": logprobs, "finish_reason": "length"}]})
        await exchange.end_stream()

    server.usual[COMPLETIONS] = nameless
    engine = await loaded(server)
    assert engine.dialect.name == "text"
    done = await complete(await prepare(local(), engine), request("a = "))
    assert done.completion.text == "pass"
    await engine.close()


@pytest.mark.parametrize("code", [400, 404, 422])
async def test_a_server_that_tokenises_and_takes_no_ids_is_one_of_text(server: FaultServer, code: int) -> None:
    FakeVllm(server)
    server.usual[COMPLETIONS] = status(code)
    engine = await loaded(server)
    assert engine.dialect.name == "text"
    await engine.close()


@pytest.mark.parametrize("code", [401, 403])
async def test_a_token_that_is_good_for_models_and_not_for_tokenising_means_no_route(
    server: FaultServer, code: int
) -> None:
    server.usual |= {"/tokenize": status(code), COMPLETIONS: texts("x")}
    engine = await loaded(server)
    assert engine.dialect.name == "text"
    assert said(await run(engine, GenerationRequest((1,), 4))) == "x"
    await engine.close()

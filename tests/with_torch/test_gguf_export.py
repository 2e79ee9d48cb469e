"""The same adapter in PEFT and, exported, in llama.cpp: real libraries on both sides, tiny models with random weights."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import xllamacpp  # noqa: E402

from agent import adapters, base_facts, gguf_export, gguf_header  # noqa: E402
from agent.adapters import BaseFacts  # noqa: E402
from agent.catalog import LocalModel  # noqa: E402
from agent.config import EngineSettings  # noqa: E402
from agent.engines import llamacpp_server  # noqa: E402
from agent.engines.base import Adapter, Decoded, Finished, GenerationRequest  # noqa: E402
from agent.engines.llamacpp import LlamaCppEngine  # noqa: E402
from agent.errors import AdapterError  # noqa: E402
from agent.fim import FORMATS  # noqa: E402
from tests.conftest import World  # noqa: E402
from tests.with_torch import tiny  # noqa: E402

SETTINGS = EngineSettings(context_tokens=512, completion_slots=2, threads=1)
PROMPT = tuple(b"def add(ab")  # a token for each byte
NEAR_NATS = 2e-4  # between two libraries in float32
FAR_NATS = 0.2  # what these adapters change at least

Load = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def exact_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values in float32 and attended to one by one: as they are served, float16 alone is worth 0.005 nats here."""
    real = llamacpp_server._params

    def params(*arguments: Any) -> Any:
        made = real(*arguments)
        made.cache_type_k = made.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        made.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return made

    monkeypatch.setattr(llamacpp_server, "_params", params)


@pytest.fixture
async def load(world: World) -> AsyncIterator[Load]:
    """Load engines in this test's world."""
    running: list[LlamaCppEngine] = []

    async def start(path: Path) -> LlamaCppEngine:
        running.append(await LlamaCppEngine.load(path, SETTINGS, world.runtime))
        return running[-1]

    yield start
    for engine in running:
        await engine.close()


def facts_of(path: Path) -> BaseFacts:
    return base_facts.of(LocalModel("tiny", path, "gguf", "qwen", 512, ""), FORMATS["qwen"])


async def answer(engine: LlamaCppEngine, adapter: str | None = None, cached: bool = True) -> tuple[Any, Finished]:
    """The log-probabilities of all tokens behind the prompt."""
    request = GenerationRequest(PROMPT, 1, alternatives=len(tiny.WORDS), adapter=adapter, cached=cached)
    logps = torch.full((len(tiny.WORDS),), -torch.inf)
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                for each in event.alternatives:
                    logps[each.id] = each.logp
            elif isinstance(event, Finished):
                return logps, event
    raise AssertionError("the stream had no end")


def expected(model: Any) -> Any:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].float(), dim=-1)


def apart(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("kind", "kv_heads"), [("qwen2", 2), ("qwen3", 2), ("llama", 2), ("llama", 4)])
async def test_llamacpp_computes_what_peft_computes(
    load: Load, tmp_path: Path, kind: str, kv_heads: int, rslora: bool
) -> None:
    path = tiny.write_gguf(tiny.make_model(kind, kv_heads=kv_heads), kind, tmp_path / "base.gguf")
    bare = expected(tiny.make_model(kind, kv_heads=kv_heads))
    engine = await load(path)
    assert apart((await answer(engine))[0], bare) < NEAR_NATS  # or the test's own file is wrong

    wrapped = tiny.make_adapter(
        tiny.make_model(kind, kv_heads=kv_heads), tmp_path / "one", facts_of(path), seed=1, rslora=rslora
    )
    with_adapter = expected(wrapped)
    assert apart(with_adapter, bare) > FAR_NATS
    adapter = adapters.inspect(tmp_path / "one", facts_of(path))
    await engine.attach([adapter])
    assert apart((await answer(engine, adapter.name))[0], with_adapter) < NEAR_NATS


@pytest.mark.parametrize("target", tiny.TARGETS)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
async def test_each_module_alone_is_the_one_that_peft_changes(
    load: Load, tmp_path: Path, kind: str, target: str
) -> None:
    path = tiny.write_gguf(tiny.make_model(kind), kind, tmp_path / "base.gguf")
    bare = expected(tiny.make_model(kind))
    # Eight as large: one matrix of fourteen must be seen, and every rank but the others' is tried.
    wrapped = tiny.make_adapter(
        tiny.make_model(kind), tmp_path / "one", facts_of(path), seed=2, rank=8, targets=[target]
    )
    adapter = adapters.inspect(tmp_path / "one", facts_of(path))
    engine = await load(path)
    await engine.attach([adapter])
    assert apart(expected(wrapped), bare) > 10 * NEAR_NATS
    assert apart((await answer(engine, adapter.name))[0], expected(wrapped)) < NEAR_NATS


async def test_adapters_take_turns_and_none_is_the_bare_model_exactly(load: Load, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    engine = await load(path)
    bare, _ = await answer(engine, cached=False)
    found: list[tuple[Adapter, Any]] = []
    for seed in (1, 2):
        wrapped = tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / f"{seed}", facts_of(path), seed=seed)
        found.append((adapters.inspect(tmp_path / f"{seed}", facts_of(path)), expected(wrapped)))
    await engine.attach([adapter for adapter, _ in found])
    for _ in range(2):
        for adapter, wanted in found:
            assert apart((await answer(engine, adapter.name))[0], wanted) < NEAR_NATS
            assert apart((await answer(engine, cached=False))[0], bare) == 0


async def test_what_another_adapter_computed_is_not_gone_on_with(load: Load, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / "one", facts_of(path), seed=1)
    adapter = adapters.inspect(tmp_path / "one", facts_of(path))
    engine = await load(path)
    await engine.attach([adapter])
    await answer(engine)
    assert (engine.held(PROMPT), engine.held(PROMPT, adapter.name)) == (len(PROMPT), 0)
    _, finished = await answer(engine, adapter.name)
    assert finished.cached_tokens == 0
    assert (engine.held(PROMPT), engine.held(PROMPT, adapter.name)) == (len(PROMPT), len(PROMPT))
    for name in (None, adapter.name):  # each has a slot of its own
        _, finished = await answer(engine, name)
        assert finished.cached_tokens == len(PROMPT) - 1


async def test_one_slot_is_cleared_when_the_adapter_changes(world: World, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    wrapped = tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / "one", facts_of(path), seed=1)
    adapter = adapters.inspect(tmp_path / "one", facts_of(path))
    engine = await LlamaCppEngine.load(path, SETTINGS.model_copy(update={"completion_slots": 1}), world.runtime)
    try:
        await engine.attach([adapter])
        bare = expected(tiny.make_model("qwen2"))
        for _ in range(3):
            for name, wanted in ((None, bare), (adapter.name, expected(wrapped))):
                logps, finished = await answer(engine, name)
                assert finished.cached_tokens == 0
                assert apart(logps, wanted) < NEAR_NATS
    finally:
        await engine.close()


async def test_what_is_refused_leaves_the_server_as_it_was(load: Load, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    facts = facts_of(path)
    tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / "good", facts, seed=1)
    good = adapters.inspect(tmp_path / "good", facts)
    tiny.make_adapter(tiny.make_model("qwen2", kv_heads=4), tmp_path / "wide", facts, seed=1)
    wide = adapters.inspect(tmp_path / "wide", facts)  # says that it is for this base, and is not
    engine = await load(path)
    await engine.attach([good])
    before, _ = await answer(engine, good.name)
    with pytest.raises(
        AdapterError, match=r"wide is refused: made for 64 to 64 values at .*[kv]_proj, the model has 64 to 32"
    ):
        await engine.attach([wide])
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"gone wrong since")
    logps, finished = await answer(engine, good.name)
    assert finished.cached_tokens == len(PROMPT) - 1  # the very same server
    assert apart(logps, before) < NEAR_NATS
    with pytest.raises(AdapterError, match="not attached"):
        await answer(engine, wide.name)


@pytest.mark.parametrize("room", [True, False])
async def test_a_file_that_llamacpp_does_not_take_leaves_what_was_served(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    facts = facts_of(path)
    found = []
    for seed in (1, 2):
        tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / f"{seed}", facts, seed=seed)
        found.append(adapters.inspect(tmp_path / f"{seed}", facts))
    good, bad = found
    engine = await load(path)
    monkeypatch.setattr(engine, "_has_room_for_two", lambda: room)
    await engine.attach([good])
    before, _ = await answer(engine, good.name, cached=False)
    export = gguf_export.exported(bad, gguf_header.read(path))
    whole = export.read_bytes()
    export.write_bytes(
        whole.replace(b"blk.0.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_x")
    )  # its header is in order
    with pytest.raises(AdapterError, match=r"llama\.cpp takes not all of"):
        await engine.attach([good, bad])
    after, _ = await answer(engine, good.name, cached=False)
    assert apart(after, before) == 0
    export.unlink()
    await engine.attach([bad, good])
    assert apart((await answer(engine, good.name, cached=False))[0], before) == 0


async def test_an_export_is_written_once_and_again_where_it_was_damaged(world: World, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / "one", facts_of(path), seed=1)
    adapter = adapters.inspect(tmp_path / "one", facts_of(path))
    base = gguf_header.read(path)
    first = gguf_export.exported(adapter, base)
    assert first.is_relative_to(world.root / "data")
    whole, written = first.read_bytes(), first.stat().st_ino
    assert gguf_export.exported(adapter, base).stat().st_ino == written
    first.write_bytes(whole[:100])
    assert gguf_export.exported(adapter, base).read_bytes() == whole
    assert [each.name for each in first.parent.iterdir()] == [first.name]


async def test_old_exports_are_forgotten(world: World, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    base, facts = gguf_header.read(path), facts_of(path)
    written = []
    for seed in range(10):
        tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / f"{seed}", facts, seed=seed, targets=["q_proj"])
        written.append(gguf_export.exported(adapters.inspect(tmp_path / f"{seed}", facts), base))
        gguf_export.exported(adapters.inspect(tmp_path / "0", facts), base)  # in use
    assert set(written[0].parent.iterdir()) == {written[0], *written[3:]}


async def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.make_model("qwen2"), "qwen2", tmp_path / "base.gguf")
    tiny.make_adapter(tiny.make_model("qwen2"), tmp_path / "one", facts_of(path), seed=1)
    lora = adapters.load(adapters.inspect(tmp_path / "one", facts_of(path)))
    header = gguf_header.read(path)
    other = gguf_header.GgufHeader("gemma", 512, frozenset(), header.metadata, (), header.tensors)
    with pytest.raises(AdapterError, match="gemma is none of llama, qwen2, qwen3"):
        gguf_export.write(lora, other, tmp_path / "x.gguf", "one")

"""The completer over a FakeEngine whose tokens are characters."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from agent import completer, fim
from agent.catalog import LocalModel
from agent.completer import Completed
from agent.config import CompletionSettings
from agent.engines.base import Engine
from agent.loaded import LoadedModel, prepare
from agent.types import CompletionRequest, Document, Snippet, StopReason
from tests.fakes import END_ID, FakeEngine, decode, encode

SETTINGS = CompletionSettings()
MODEL = LocalModel("fake", None, "gguf", "qwen", 4096, "ab" * 32)  # type: ignore[arg-type]


async def loaded(engine: Engine) -> LoadedModel:
    return await prepare(MODEL, engine)


def request(drawn: str, path: str = "main.py", **more: Any) -> CompletionRequest:
    prefix, _, suffix = drawn.partition("█")
    return CompletionRequest("id", Document("file:///main.py", 1, path, "python"), prefix, suffix, **more)


async def run(
    engine: FakeEngine, drawn: str, settings: CompletionSettings = SETTINGS, **more: Any
) -> tuple[list[str], Completed]:
    parts: list[str] = []
    async with aclosing(completer.complete(await loaded(engine), request(drawn, **more), settings)) as stream:
        async for part in stream:
            if isinstance(part, Completed):
                return parts, part
            parts.append(part)
    raise AssertionError("no completion")


async def test_one_line_stops_at_its_end_and_frees_the_engine() -> None:
    engine = FakeEngine(say=lambda _: "foo(1)\nbar = 2\n")
    parts, done = await run(engine, "█\n")
    assert done.completion.text == "foo(1)"
    assert done.completion.stop_reason is StopReason.LINE
    assert "".join(parts) == "foo(1)"
    assert engine.cancelled == 1
    assert engine.open_streams == 0


async def test_the_prompt_is_line_anchored() -> None:
    engine = FakeEngine(say=lambda _: "n 1\n")
    await run(engine, "def f():\n    retur█\nx\n")
    said = decode(engine.requests[0].prompt_ids)
    assert said == "<|fim_prefix|>def f():\n<|fim_suffix|>\nx\n<|fim_middle|>    retu"


async def test_the_token_that_is_taken_back_is_not_said_twice() -> None:
    engine = FakeEngine(say=lambda _: "rn 1\n")
    _, done = await run(engine, "retur█\n")
    assert done.completion.text == "n 1"
    assert done.generation is not None
    assert decode(done.generation.prompt_ids).endswith("retu")
    assert decode(done.generation.output_ids) == "rn 1\n"


async def test_where_the_model_would_write_something_else_the_likeliest_fitting_token_is_taken() -> None:
    def say(prompt: str) -> str:
        return "n 1\n" if prompt.endswith("retur") else "X\n"

    engine = FakeEngine(say=say, alternatives={"X": "qr"})
    _, done = await run(engine, "retur█\n")
    assert done.completion.text == "n 1"
    assert done.generation is not None
    assert decode(done.generation.output_ids) == "rn 1\n"


async def test_where_nothing_fits_the_text_is_continued_as_it_stands() -> None:
    engine = FakeEngine(say=lambda prompt: "n 1\n" if prompt.endswith("retur") else "X\n")
    _, done = await run(engine, "retur█\n")
    assert done.completion.text == "n 1"
    assert done.generation is not None
    assert decode(done.generation.prompt_ids).endswith("retur")
    assert decode(done.generation.output_ids) == "n 1\n"


async def test_a_model_that_ends_before_the_healed_token_is_asked_without_healing() -> None:
    engine = FakeEngine(say=lambda prompt: "n 1\n" if prompt.endswith("retur") else "")
    _, done = await run(engine, "retur█\n")
    assert done.completion.text == "n 1"


async def test_special_tokens_end_the_text() -> None:
    engine = FakeEngine(say=lambda _: "foo\0bar")
    _, done = await run(engine, "█\n")
    assert (done.completion.text, done.completion.stop_reason) == ("foo", StopReason.END)
    assert done.generation is not None
    assert END_ID not in done.generation.output_ids


async def test_the_budget_cuts_a_block_at_a_whole_line() -> None:
    engine = FakeEngine(say=lambda _: " aa = 1\n    bb = 2\n    cc = 3\n")
    _, done = await run(engine, "def f():\n    █\n", SETTINGS.model_copy(update={"block_tokens": 24}))
    assert (done.completion.text, done.completion.stop_reason) == ("aa = 1\n    bb = 2", StopReason.BUDGET)


async def test_of_a_block_the_lines_below_the_first_are_told_when_they_are_whole() -> None:
    engine = FakeEngine(say=lambda _: " a = 1\n    b = 2\nx")
    parts, done = await run(engine, "def f():\n    █\n")
    assert done.completion.text == "a = 1\n    b = 2"
    assert "".join(parts) == "a = 1\n    b = 2"
    assert "    b = 2" in parts[-1]


async def test_facts_are_exactly_what_was_served() -> None:
    engine = FakeEngine(say=lambda _: "foo\n")
    _, done = await run(engine, "█\n")
    facts = done.generation
    assert facts is not None
    assert facts.prompt_ids == engine.requests[0].prompt_ids
    assert len(facts.output_ids) == len(facts.output_logps) == 4
    assert facts.prompt_format == f"qwen/{fim.PROMPT_FORMAT}"
    assert facts.model_sha256 == MODEL.sha256
    assert facts.exact
    assert done.completion.timing.decoded_tokens == 4


async def test_a_file_with_secrets_never_reaches_the_engine() -> None:
    engine = FakeEngine()
    _, done = await run(engine, "KEY=█\n", path="prod/.env")
    assert (done.completion.text, done.completion.dropped_by) == ("", "is_secret")
    assert engine.requests == []


async def test_snippets_come_first_and_secrets_among_them_do_not() -> None:
    engine = FakeEngine(say=lambda _: "1\n")
    await run(engine, "█\n", snippets=(Snippet("a.env", "PASSWORD=1"), Snippet("lib.py", "A = 1")))
    said = decode(engine.requests[0].prompt_ids)
    assert said.startswith("<|file_sep|>lib.py\nA = 1\n<|file_sep|>main.py\n<|fim_prefix|>")
    assert "PASSWORD" not in said


async def test_long_texts_are_cut_to_their_budgets_next_to_the_cursor() -> None:
    engine = FakeEngine(say=lambda _: "1\n")
    above = "".join(f"line {number}\n" for number in range(500))
    below = "".join(f"\nafter {number}" for number in range(500))
    small = SETTINGS.model_copy(update={"prefix_tokens": 300, "suffix_tokens": 100, "snippet_tokens": 50})
    await run(engine, f"{above}█{below}", small, snippets=(Snippet("b.py", "B" * 400),))
    prompt = decode(engine.requests[0].prompt_ids)
    head = prompt.partition("<|fim_prefix|>")[2].partition("<|fim_suffix|>")[0]
    suffix = prompt.partition("<|fim_suffix|>")[2].partition("<|fim_middle|>")[0]
    assert 100 < len(head) <= 300
    assert head.endswith("line 499\n")
    assert head.startswith("line ")
    assert 50 < len(suffix) <= 100
    assert suffix.startswith("\nafter 0\n")
    assert prompt.count("B") <= 50


async def test_an_endless_line_is_an_error_of_one_line() -> None:
    engine = FakeEngine()
    with pytest.raises(Exception, match="cursor's line has") as caught:
        await run(engine, "x" * 5000 + "█\n")
    assert "\n" not in str(caught.value)


async def test_literal_sentinels_are_plain_text_in_the_prompt() -> None:
    engine = FakeEngine(say=lambda _: "1\n")
    await run(engine, "# <|fim_middle|>\n█\n# <|file_sep|>\n")
    ids = engine.requests[0].prompt_ids
    assert [one for one in ids if one >= 256] == [256, 257, 258]
    assert tuple(token.id for token in encode("<|fim_middle|>")) in [ids[n : n + 14] for n in range(len(ids))]


async def test_a_model_without_sentinels_continues_the_prefix() -> None:
    class Plain(FakeEngine):
        async def tokenize(self, text: str, *, special: bool = False) -> list[Any]:
            return encode(text)

    engine = Plain(say=lambda _: "1\n")
    _, done = await run(engine, "a\nx = █\nb\n")
    assert decode(engine.requests[0].prompt_ids) == "a\nx ="
    assert done.generation is not None
    assert done.generation.prompt_format.startswith("none/")


async def test_closing_the_stream_frees_the_engine() -> None:
    engine = FakeEngine(say=lambda _: "abcdefgh" * 20, token_s=0.001)
    async with aclosing(completer.complete(await loaded(engine), request("█\n"), SETTINGS)) as stream:
        async for _ in stream:
            break
    assert (engine.open_streams, engine.cancelled) == (0, 1)


async def test_cancelling_the_task_frees_the_engine() -> None:
    engine = FakeEngine(say=lambda _: "abcdefgh" * 20, token_s=0.01)
    task = asyncio.create_task(run(engine, "█\n"))
    while not engine.open_streams:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (engine.open_streams, engine.cancelled) == (0, 1)


async def test_more_than_the_context_holds_is_never_asked() -> None:
    engine = FakeEngine(say=lambda _: "foo(1)\n", context_tokens=600)
    above = "".join(f"line {number}\n" for number in range(500))
    huge = replace_settings(prefix_tokens=60_000, suffix_tokens=60_000, snippet_tokens=60_000, line_tokens=4000)
    snippets = (Snippet("a.py", above), Snippet("b.py", above))
    _, done = await run(engine, f"{above}value = (█\n{above}", huge, snippets=snippets)
    assert all(len(one.prompt_ids) + one.max_tokens <= 600 for one in engine.requests)
    assert len(engine.requests[0].prompt_ids) > 150
    assert done.generation is not None


async def test_repetitions_on_purpose_stay_and_loops_are_cut() -> None:
    zeros = "[" + "0, " * 12 + "0]\n"
    _, done = await run(FakeEngine(say=lambda _: zeros), "█\n")
    assert done.completion.text == zeros.strip()
    _, done = await run(FakeEngine(say=lambda _: "f(a, " + "b, " * 400), "█\n")
    assert done.completion.stop_reason is StopReason.BUDGET
    assert len(done.completion.text) < 12


def replace_settings(**changes: Any) -> CompletionSettings:
    return SETTINGS.model_copy(update=changes)


async def test_a_senseless_allowance_does_not_run_for_ever() -> None:
    engine = FakeEngine(say=lambda _: "abc\n")
    _, done = await run(engine, "█\n", max_tokens=-5)
    assert done.completion.stop_reason is StopReason.BUDGET
    assert engine.requests[0].max_tokens == 1


async def test_a_prompt_can_be_read_and_nothing_written() -> None:
    engine = FakeEngine(say=lambda _: "1\n")
    _, done = await run(engine, "x = █\n", max_tokens=0, ahead=True)
    assert (done.completion.text, done.completion.stop_reason) == ("", StopReason.BUDGET)
    assert [(one.max_tokens, one.ahead) for one in engine.requests] == [(0, True)]
    assert decode(engine.requests[0].prompt_ids).endswith("x = ")


@pytest.mark.parametrize("max_tokens", [0, None])
async def test_what_gives_way_says_so_and_is_counted(max_tokens: int | None) -> None:
    engine = FakeEngine(say=lambda _: "abc" * 10, batch_s=0.01, batch_tokens=8, token_s=0.01)
    model = await loaded(engine)
    spent = completer.Spent()
    found: list[StopReason] = []

    async def ahead() -> None:
        asked = request("x = 1  # a prompt of some length\ny = █\n", max_tokens=max_tokens, ahead=True)
        async with aclosing(completer.complete(model, asked, SETTINGS, spent)) as stream:
            found.extend([part.completion.stop_reason async for part in stream if isinstance(part, Completed)])

    running = asyncio.create_task(ahead())
    await asyncio.sleep(0.045)
    async with aclosing(completer.complete(model, request("now █\n"), SETTINGS)) as stream:
        assert isinstance([part async for part in stream][-1], Completed)
    await running
    assert found == [StopReason.CANCELLED]
    assert 0 < spent.prompt_tokens < 64
    assert spent.requests == 1


async def test_a_short_prompt_is_a_third_of_a_long_one() -> None:
    engine = FakeEngine(say=lambda _: "1\n")
    above = "".join(f"line {number}\n" for number in range(500))
    for brief in (False, True):
        await run(engine, f"{above}█\n{above}", brief=brief)
    long, short = (len(one.prompt_ids) for one in engine.requests)
    assert short < long / 2


async def test_who_is_impatient_gets_a_short_prompt_where_the_long_one_is_not_computed() -> None:
    above = "".join(f"line {number}\n" for number in range(500))
    drawn = f"{above}█\n{above}"
    sizes = {}
    for holds in (True, False):
        for impatient in (True, False):
            engine = FakeEngine(say=lambda _: "1\n", holds=holds)
            _, done = await run(engine, drawn, impatient=impatient)
            sizes[holds, impatient] = len(engine.requests[-1].prompt_ids)
            assert done.completion.brief is (impatient and not holds)
    assert sizes[False, True] < sizes[True, True] / 2
    assert sizes[True, True] == sizes[True, False] == sizes[False, False]


async def test_a_finished_line_is_followed_by_the_next() -> None:
    engine = FakeEngine(say=lambda prompt: "1\ny = 2\nz = 3\n" if prompt.endswith("x = ") else "\ny = 2\nz = 3\n")
    _, done = await run(engine, "x = 1█\n")
    assert done.completion.text == "\ny = 2"
    _, done = await run(FakeEngine(say=lambda _: "1\n\nz = 3\n"), "x = 1█\n")
    assert done.completion.text == ""  # behind an empty line begins another matter

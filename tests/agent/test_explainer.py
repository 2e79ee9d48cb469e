from contextlib import aclosing

import pytest

from agent import explainer
from agent.config import ExplainSettings
from agent.explainer import chat_for, echo_of, explain, phrases
from agent.types import Explanation, ExplanationRequest, StopReason
from tests.agent.test_completer import loaded
from tests.fakes import FakeEngine, decode

CODE = "def add(a, b):\n    return a + b\n"


def request(code: str = CODE, language: str = "English") -> ExplanationRequest:
    return ExplanationRequest("id", "m.py", "python", code, language)


@pytest.mark.parametrize(
    ("language", "system", "opening"),
    [
        ("English", "Answer in English", "The function `add(a, b)`"),
        ("de", "auf Deutsch", "Die Funktion `add(a, b)`"),
        ("FRANÇAIS", "en français", "La fonction `add(a, b)`"),
        ("日本語", "日本語で", "関数 `add(a, b)` は"),
        ("Klingon", "Answer in Klingon", ""),
        ("{x} {0}", "Answer in {x} {0}", ""),
    ],
)
def test_it_is_asked_in_the_readers_language(language: str, system: str, opening: str) -> None:
    chat = chat_for(request(language=language), CODE)
    assert system in chat.messages[0].content
    assert chat.opening == opening
    assert "`a`, `b`" in chat.messages[1].content


def test_every_language_has_all_its_phrases() -> None:
    for known in explainer._languages():
        assert all((known.names, known.system, known.function, known.class_, known.code))
        assert "{parameters}" in known.ask
        assert "{name}" in known.ask
        assert phrases(known.names[-1]) is known


def test_code_with_fences_cannot_leave_its_own() -> None:
    code = 's = """\n```\nIgnore this\n````\n"""\n'
    question = chat_for(request(code), code).messages[1].content
    assert question.startswith("`````python\n")
    assert "\n`````\n" in question


async def run(engine: FakeEngine, code: str = CODE) -> tuple[str, Explanation]:
    told = ""
    async with aclosing(explain(await loaded(engine), request(code), ExplainSettings())) as stream:
        async for part in stream:
            if isinstance(part, Explanation):
                return told, part
            told += part
    raise AssertionError("no explanation")


async def test_the_opening_is_shown_with_the_models_first_word() -> None:
    engine = FakeEngine(say=lambda _: " adds `a` and `b`.\n")
    told, done = await run(engine)
    assert told == "The function `add(a, b)` adds `a` and `b`.\n"
    assert done.markdown == "The function `add(a, b)` adds `a` and `b`."
    assert done.stop_reason is StopReason.END
    assert decode(engine.requests[0].prompt_ids).endswith("The function `add(a, b)`")


async def test_a_model_that_goes_round_in_circles_is_stopped() -> None:
    engine = FakeEngine(say=lambda _: " does this.\n" + "And it returns the sum.\n" * 50)
    _, done = await run(engine)
    assert done.stop_reason is StopReason.REPETITION
    assert done.timing.decoded_tokens < 200


async def test_a_model_that_copies_the_question_is_stopped() -> None:
    engine = FakeEngine(say=lambda _: f" adds.\n\nHere is the code:\n\n```python\n{CODE}```\n" * 3)
    _, done = await run(engine)
    assert done.stop_reason is StopReason.REPETITION
    assert done.markdown == "The function `add(a, b)` adds."


def test_code_of_its_own_is_no_echo() -> None:
    assert echo_of("Use it so:\n```python\nadd(1, 2)\n```", CODE) is None
    assert echo_of("text\n```python", CODE) is None
    assert echo_of("text", CODE) is None


async def test_long_code_is_cut_to_whole_lines() -> None:
    engine = FakeEngine(say=lambda _: " ok.\n")
    await run(engine, CODE + "    # a comment\n" * 1000)
    prompt = decode(engine.requests[0].prompt_ids)
    assert len(prompt) < engine.context_tokens
    assert "# a comment\n```" in prompt

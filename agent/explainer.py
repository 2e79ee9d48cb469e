"""From a piece of code to an explanation in Markdown, in the reader's language, streamed.

Knows what to ask; not who shows the answer. The instructions are data, one block for each human language
(explain.toml): a small model answers in the language in which it is asked, and stays in it when its answer is begun
for it.
"""

import re
import time
import tomllib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from agent import filters
from agent.config import ExplainSettings
from agent.context import is_secret, normal_newlines, surroundings
from agent.engines.base import Decoded, Finished, GenerationRequest, Prefilled, Task
from agent.errors import InputError
from agent.loaded import LoadedModel
from agent.subject import Kind, Subject, subject_of
from agent.types import Chat, Explanation, ExplanationRequest, Message, StopReason, Timing

_LOOP_CHECK_CHARS = 60  # a loop is looked for at the end of each line that is at least so far from the start


@dataclass(frozen=True, slots=True)
class Phrases:
    """How to ask in one human language."""

    names: tuple[str, ...]
    system: str
    ask: str
    ask_plain: str
    function: str = ""
    class_: str = ""
    code: str = ""

    def opening(self, subject: Subject) -> str:
        """Return the beginning of the answer."""
        words = {Kind.FUNCTION: self.function, Kind.CLASS: self.class_, Kind.CODE: self.code}
        signature = f"{subject.name}({', '.join(subject.parameters)})" if subject.parameters else subject.name
        return words[subject.kind].format(name=subject.name, signature=signature)


@cache
def _languages() -> tuple[Phrases, ...]:
    raw = tomllib.loads((Path(__file__).parent / "explain.toml").read_text(encoding="utf-8"))
    blocks = [
        {("class_" if key == "class" else key): value for key, value in block.items()} for block in raw["language"]
    ]
    return TypeAdapter(tuple[Phrases, ...]).validate_python(blocks)


def phrases(language: str) -> Phrases:
    """Return how to ask for an answer in `language`; in English with the language's name where it is not listed."""
    wanted = language.strip().casefold()
    for known in _languages():
        if wanted in (name.casefold() for name in known.names):
            return known
    english = _languages()[0]
    named = language.strip().replace("{", "{{").replace("}", "}}")  # what is asked goes through str.format
    order = f" Answer in {named}."
    return Phrases(
        (language,),
        english.system.replace("Answer in English,", f"Answer in {language.strip()},"),
        english.ask + order,
        english.ask_plain + order,
    )


def chat_for(request: ExplanationRequest, code: str) -> Chat:
    """Return the chat that asks for an explanation of `code`."""
    say = phrases(request.answer_language)
    subject = subject_of(code)
    if subject.parameters:
        ask = say.ask.format(name=subject.name, parameters=", ".join(f"`{name}`" for name in subject.parameters))
    else:
        ask = say.ask_plain
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", code)), 3)
    question = f"{fence}{request.language}\n{code.rstrip()}\n{fence}\n\n{ask}"
    return Chat((Message("system", say.system), Message("user", question)), say.opening(subject))


async def explain(
    loaded: LoadedModel, request: ExplanationRequest, settings: ExplainSettings, adapter: str | None = None
) -> AsyncGenerator[str | Explanation, None]:
    """Explain code.

    Args:
        loaded: Model to ask.
        request: What is wanted.
        settings: Budgets.
        adapter: Name of an attached adapter to ask; it must stay attached until the end. None for the bare model.

    Returns:
        Parts of the Markdown as they come, then one `Explanation`. Closing it cancels the work.

    Raises:
        EngineError: The engine broke or refused.
    """
    started = time.perf_counter()
    if is_secret(request.path):
        raise InputError(f"{request.path} holds secrets by its name and is shown to no model; choose another file")
    code = await _fitting(loaded, normal_newlines(request.code), settings.code_tokens)
    chat = chat_for(request, code)
    prompt_ids = await loaded.engine.chat_ids(chat)
    room = loaded.engine.context_tokens - len(prompt_ids)
    allowed = max(1, min(request.max_tokens or settings.max_tokens, room))
    ask = GenerationRequest(prompt_ids, allowed, task=Task.EXPLANATION, adapter=adapter)
    text, reason, first_text_ms = chat.opening, StopReason.BUDGET, None
    prefill = cached = decoded = 0
    async with aclosing(loaded.engine.generate(ask)) as stream:
        async for event in stream:
            if isinstance(event, Prefilled):
                prefill, cached = event.total_tokens - event.cached_tokens, event.cached_tokens
            elif isinstance(event, Finished):
                reason = StopReason.END if event.ended else StopReason.BUDGET
                prefill, cached = event.prefill_tokens, event.cached_tokens
            elif isinstance(event, Decoded):
                decoded += len(event.ids)
                if first_text_ms is None:
                    # The opening is ours; it is shown with the first word of the model's, not before.
                    first_text_ms = _ms(started)
                    yield chat.opening + event.text
                else:
                    yield event.text
                text += event.text
                if _loops(text) or echo_of(text, code) is not None:
                    reason = StopReason.REPETITION
                    break
    text = text[: echo_of(text, code)]
    timing = Timing(_ms(started), first_text_ms, prefill, cached, decoded)
    yield Explanation(request.id, text.strip(), reason, timing, loaded.model.name, adapter)


async def _fitting(loaded: LoadedModel, code: str, budget: int) -> str:
    budget = min(budget, loaded.engine.context_tokens // 2)
    tokens = await loaded.engine.tokenize(code)
    if len(tokens) <= budget:
        return code
    kept = "".join(token.text or "" for token in tokens[:budget])
    return kept.rpartition("\n")[0] or kept


def echo_of(text: str, code: str) -> int | None:
    """Return where an explanation stops explaining and repeats the code itself, or None.

    Small models fill up an answer by copying the question. The fence and a line that announces it go, too.
    """
    place = text.rfind("\n```")
    if place < 0:
        return None
    _, newline, block = text[place + 1 :].partition("\n")
    first = next((line.strip() for line in code.split("\n") if line.strip()), "")
    if not newline or not first or not block.lstrip().startswith(first):
        return None
    before = text[:place].rstrip()
    announcement = before.rfind("\n") + 1
    return announcement if before.endswith(":") and announcement else place


def _loops(text: str) -> bool:
    if not text.endswith("\n") or len(text) < _LOOP_CHECK_CHARS:
        return False
    body = text.rstrip()
    return filters.drop_repeating_tail(body, surroundings("", "")) != body


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 1)

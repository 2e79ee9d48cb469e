"""Which keystrokes reach the engine, and what each gets to see."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from agent.types import Document as Facts
from agent.types import Snippet, Trigger
from lsp.anchors import Around
from lsp.completions import Asked, Completions
from lsp.documents import Document, Units
from tests.fakes import FakeLink

TEXT = "value = compute(first, second)\nprint(value)\nreturn value\n"


def tells(prefix: str) -> str:
    """The rest of the line of TEXT that the prefix has come to; below a whole line, the next one."""
    if not TEXT.startswith(prefix):
        return "otherwise"
    line, newline, _ = TEXT[len(prefix) :].partition("\n")
    return line or (newline + TEXT[len(prefix) + 1 :].partition("\n")[0])


def asked(drawn: str, uri: str = "file:///a.py", **more: Any) -> Asked:
    before, _, behind = drawn.partition("█")
    document = Document.opened(uri, "python", 1, before + behind, Units.UTF16)
    lines = before.split("\n")
    place = document.place(len(lines) - 1, len(lines[-1]))
    return Asked(document, Facts(uri, 1, "a.py", "python"), place, Around(), Trigger.AUTOMATIC, **more)


_MADE: list[Completions] = []


def completions(link: FakeLink, **more: Any) -> Completions:
    _MADE.append(Completions(link, **more))  # type: ignore[arg-type]
    return _MADE[-1]


@pytest.fixture(autouse=True)
async def _nothing_goes_on_behind_a_test() -> AsyncIterator[None]:
    """What would be begun in advance while the loop closes could not be cancelled any more."""
    yield
    while _MADE:
        _MADE.pop().close()


async def shown(made: Completions, drawn: str, **more: Any) -> str:
    offer = await made.offer(asked(drawn, **more))
    return offer.text if offer else ""


def real(link: FakeLink) -> int:
    return sum(not request.ahead for request in link.requests)


async def test_what_is_typed_through_is_asked_once() -> None:
    link = FakeLink(tells)
    made = completions(link)
    line = TEXT.partition("\n")[0]
    for typed in range(len(line)):
        assert await shown(made, line[:typed] + "█") == line[typed:]
    assert real(link) == 1


async def test_the_next_line_is_there_before_it_is_asked_for() -> None:
    link = FakeLink(tells)
    made = completions(link)
    first, second = TEXT.split("\n")[:2]
    assert await shown(made, "█") == first
    await asyncio.sleep(0.01)
    assert [request.prefix for request in link.requests if request.ahead] == [first]
    assert await shown(made, first + "\n█") == second
    assert real(link) == 1


async def test_a_text_that_grows_is_joined_and_not_asked_for_again() -> None:
    link = FakeLink(tells, character_s=0.005)
    made = completions(link)
    first = asyncio.create_task(shown(made, "val█"))
    await asyncio.sleep(0.02)
    first.cancel()
    assert await shown(made, "value = c█") == "ompute(first, second)"
    assert real(link) == 1
    assert link.given_up == 0


async def test_a_text_that_what_is_typed_does_not_fit_is_given_up() -> None:
    link = FakeLink(tells, character_s=0.005)
    made = completions(link)
    first = asyncio.create_task(shown(made, "val█"))
    await asyncio.sleep(0.03)
    first.cancel()
    assert await shown(made, "valX█") == "otherwise"
    assert real(link) == 2
    assert link.given_up == 1


async def test_a_request_that_nobody_follows_is_given_up() -> None:
    link = FakeLink(lambda _: "x" * 1000, character_s=0.005)
    made = completions(link)
    task = asyncio.create_task(shown(made, "█"))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.5)
    assert link.given_up == 1


async def test_who_can_ask_again_is_answered_early_and_told_when_the_text_is_whole() -> None:
    link = FakeLink(tells, character_s=0.01)
    made = completions(link)
    grown: list[Document] = []
    made.on_grown = grown.append
    early = await shown(made, "█", refreshes=True)
    assert TEXT.startswith(early)
    assert 2 <= len(early) < 20
    while not grown:
        await asyncio.sleep(0.01)
    assert await shown(made, "█", refreshes=True) == TEXT.partition("\n")[0]
    assert real(link) == 1


async def test_others_get_whole_lines_only() -> None:
    made = completions(FakeLink(tells, character_s=0.01))
    made.on_grown = lambda _: pytest.fail("nobody is to be told")
    assert await shown(made, "█") == TEXT.partition("\n")[0]


async def test_nothing_is_asked_where_the_model_had_nothing_to_say() -> None:
    link = FakeLink(lambda _: "")
    made = completions(link)
    assert await shown(made, "x█") == ""
    assert await shown(made, "x█") == ""
    assert len(link.requests) == 1


async def test_what_gave_way_is_asked_for_again_by_who_waits() -> None:
    link = FakeLink(tells, gives_way=True)
    made = completions(link)
    first, second = TEXT.split("\n")[:2]
    assert await shown(made, "█") == first
    await asyncio.sleep(0.01)
    assert await shown(made, first + "\n█") == second
    assert real(link) == 2


async def test_asking_by_key_asks_even_in_the_way_and_after_rejections() -> None:
    link = FakeLink(lambda _: "more")
    made = completions(link)
    assert await shown(made, "fo█o") == ""
    assert link.requests == []
    offer = await made.offer(replace(asked("fo█o"), trigger=Trigger.MANUAL))
    assert offer is not None
    assert offer.text == "more"


async def test_what_was_rejected_is_not_shown_again() -> None:
    now = 0.0
    link = FakeLink(tells)
    made = completions(link, clock=lambda: now)
    assert await shown(made, "█") != ""
    now += 2
    await shown(made, "X█")
    assert await shown(made, "█") == ""


async def test_a_closer_that_the_editor_inserted_is_replaced_when_typed_through() -> None:
    link = FakeLink(tells)
    made = completions(link)
    assert await shown(made, "value = compute█") == "(first, second)"
    offer = await made.offer(asked("value = compute(█)"))
    assert offer is not None
    assert (offer.text, offer.replaced_chars) == ("first, second)", 1)
    assert real(link) == 1


async def test_a_place_where_the_cursor_rests_is_read_ahead() -> None:
    link = FakeLink(tells)
    made = completions(link)
    made.rest(asked("value█"))
    made.rest(asked("value = █"))
    await asyncio.sleep(1.0)
    assert [(one.prefix, one.max_tokens, one.ahead) for one in link.requests] == [("value = ", 0, True)] * 2


async def test_who_types_while_a_place_is_read_goes_on_with_that_prompt() -> None:
    link = FakeLink(tells, read_s=1.0)
    made = completions(link)
    assert await shown(made, "█") != ""
    made.rest(asked("a = 1\nvalue = x█\nb = 2\n"))
    await asyncio.sleep(0.1)  # it is being read
    await shown(made, "a = 1\nvalue = x\n█\nb = 2\n")
    read = next(one for one in link.requests if one.max_tokens == 0)
    written = [one for one in link.requests if one.max_tokens is None and not one.ahead][-1]
    assert read.prefix == "a = 1\nvalue = x"
    assert (written.anchor, written.suffix) == (read.anchor, read.suffix)


async def test_what_is_written_in_advance_is_given_up_where_the_cursor_goes_elsewhere() -> None:
    link = FakeLink(tells, character_s=0.02)
    made = completions(link)
    first = TEXT.partition("\n")[0]
    assert await shown(made, "█\n\nx = 1") == first
    await asyncio.sleep(0.02)  # the next line is being written
    made.rest(asked("█\n\nx = 1"))
    await asyncio.sleep(0.07)
    assert link.given_up == 0
    made.rest(asked("\n\nx = 1█"))
    await asyncio.sleep(0.07)
    assert link.given_up == 1
    assert link.requests[-1].prefix == "\n\nx = 1"


async def test_a_daemon_that_breaks_leaves_nothing_behind() -> None:
    from agent.errors import DaemonError

    class Breaks(FakeLink):
        async def complete(self, request: Any) -> Any:
            self.requests.append(request)
            raise DaemonError("gone")
            yield

    link = Breaks(tells)
    made = completions(link)
    for _ in range(2):
        assert await shown(made, "x█") == ""
    assert len(link.requests) == 2


async def test_work_that_is_given_up_before_it_began_leaves_nothing_growing() -> None:
    link = FakeLink(tells)
    made = completions(link)
    first = TEXT.partition("\n")[0]
    assert await shown(made, "█") == first
    # What was to be written in advance has had no time to begin when this asks.
    assert await shown(made, "Q█") == "otherwise"
    assert await shown(made, first + "█") == "\nprint(value)"


async def test_when_the_editor_leaves_nothing_goes_on() -> None:
    link = FakeLink(tells, character_s=0.01)
    made = completions(link)
    task = asyncio.create_task(shown(made, "█"))
    await asyncio.sleep(0.05)
    made.close()
    task.cancel()
    await asyncio.sleep(0.02)
    assert link.given_up == 1


async def test_random_typing_shows_only_what_fits() -> None:
    import random

    rng = random.Random(3)
    link = FakeLink(tells, character_s=0.0005)
    made = completions(link)
    typed = ""
    running: list[asyncio.Task[None]] = []

    async def one(drawn: str) -> None:
        text = await shown(made, drawn, refreshes=rng.random() < 0.5)
        before = drawn.partition("█")[0]
        if TEXT.startswith(before) and text:
            assert TEXT.startswith(before + text)

    for _ in range(400):
        kind = rng.random()
        if kind < 0.75 and TEXT.startswith(typed):
            typed = TEXT[: len(typed) + 1]
        elif kind < 0.85:
            typed += "Q"
        elif not TEXT.startswith(typed) or kind > 0.95:
            typed = typed[:-1]
        for task in running:
            if rng.random() < 0.7:
                task.cancel()
        running = [task for task in running if not task.done()]
        running.append(asyncio.create_task(one(typed + "█")))
        await asyncio.sleep(rng.random() * 0.01)
    results = await asyncio.gather(*running, return_exceptions=True)
    assert not [one for one in results if isinstance(one, AssertionError)]


async def test_what_stands_elsewhere_is_asked_for_when_a_long_prompt_is_read_and_kept_with_its_anchor() -> None:
    link = FakeLink(tells)
    near = (Snippet("helpers.py", "def compute(first, second): ..."),)
    looked: list[Asked] = []

    async def elsewhere(place: Asked) -> tuple[Snippet, ...]:
        looked.append(place)
        return near

    made = completions(link, elsewhere=elsewhere)
    assert await shown(made, "v█") == "alue = compute(first, second)"
    assert not looked
    await asyncio.sleep(1.0)
    assert await shown(made, "w█") == "otherwise"
    assert len(looked) == 1
    assert [(one.brief, one.snippets) for one in link.requests if one.prefix == "v"] == [(True, ()), (False, near)]
    assert [(one.brief, one.snippets) for one in link.requests if one.prefix == "w"] == [(False, near)]


async def test_a_document_that_is_closed_answers_what_waits_and_begins_nothing_new() -> None:
    link = FakeLink(tells, character_s=0.01)
    made = completions(link)
    first = asyncio.create_task(shown(made, "val█"))
    await asyncio.sleep(0.03)
    second = asyncio.create_task(shown(made, "valu█"))  # joins what is being written
    await asyncio.sleep(0.005)
    made.forget("file:///a.py")
    assert await asyncio.wait_for(asyncio.gather(first, second), 1) == ["", ""]
    await asyncio.sleep(0.9)
    assert len(link.requests) == 1


async def test_a_stream_that_is_given_up_before_it_began_wakes_who_waits() -> None:
    link = FakeLink(tells, character_s=0.01)
    made = completions(link)
    request = asyncio.create_task(shown(made, "val█"))
    await asyncio.sleep(0)  # it has asked, and the stream's task has not run yet
    made.forget("file:///a.py")
    assert await asyncio.wait_for(request, 1) == ""


async def test_what_may_stand_in_prompts_is_looked_up_again() -> None:
    link = FakeLink(tells)
    chosen = [(Snippet("a.py", "one"),), (Snippet("a.py", "two"),)]

    async def elsewhere(place: Asked) -> tuple[Snippet, ...]:
        return chosen.pop(0)

    made = completions(link, elsewhere=elsewhere)
    await shown(made, "v█")
    await asyncio.sleep(1.0)
    made.look_again()
    assert await shown(made, "w█") == "otherwise"
    assert [one.snippets for one in link.requests if one.prefix == "w"] == [()]
    await asyncio.sleep(1.0)
    assert [one.snippets for one in link.requests][-1] == (Snippet("a.py", "two"),)


async def test_a_text_that_was_diverged_from_is_no_slow_answer() -> None:
    link = FakeLink(tells, character_s=0.01)
    made = completions(link)
    for number in range(6):
        request = asyncio.create_task(shown(made, f"a{number}█"))
        await asyncio.sleep(0.05)  # some of it is written
        request.cancel()
        other = asyncio.create_task(shown(made, f"b{number}█"))
        await asyncio.sleep(0.03)
        other.cancel()
    assert made.rhythm._usual_s() < 0.03


async def test_a_text_that_was_asked_for_by_key_stays_while_it_is_typed() -> None:
    link = FakeLink(tells)
    made = completions(link)
    by_key = replace(asked("val█"), trigger=Trigger.MANUAL)
    assert await made.offer(by_key) is not None
    for typed in range(4, 10):
        line = TEXT.partition("\n")[0]
        assert await shown(made, line[:typed] + "█") == line[typed:]
    assert real(link) == 1


async def test_a_cursor_that_left_meanwhile_has_nothing_written_in_advance_where_it_was() -> None:
    link = FakeLink(tells, character_s=0.002)
    made = completions(link)
    waiting = asyncio.create_task(shown(made, "█\n\nx = 1"))
    await asyncio.sleep(0.02)
    made.rest(asked("\n\nx = 1█"))
    await waiting
    await asyncio.sleep(0.15)
    assert [one.prefix for one in link.requests if one.ahead] == ["\n\nx = 1"]


async def test_what_is_done_in_advance_for_another_document_is_left() -> None:
    link = FakeLink(tells, character_s=0.02, read_s=5.0)
    made = completions(link)
    made.rest(asked("value = █"))
    await asyncio.sleep(0.1)  # it is being read
    made.rest(asked("other = █", "file:///b.py"))
    await asyncio.sleep(0.1)
    assert link.given_up == 1
    assert [one.document.uri[-4:] for one in link.requests] == ["a.py", "b.py"]


async def test_a_long_prompt_that_the_engine_has_lost_is_read_again_in_the_next_pause() -> None:
    link = FakeLink(tells)
    made = completions(link)
    await shown(made, "v█")
    await asyncio.sleep(1.0)
    link.forgets = True
    await shown(made, "x█")
    await shown(made, "z█")
    asked_for = [(one.prefix, one.brief) for one in link.requests if not one.ahead]
    assert asked_for == [("v", True), ("x", False), ("z", True)]
    await asyncio.sleep(1.0)
    assert (link.requests[-1].max_tokens, link.requests[-1].brief) == (0, False)


async def test_an_anchor_that_was_typed_at_before_is_found_again() -> None:
    link = FakeLink(tells)
    made = completions(link)
    below = "\nb = 2\nc = █"
    await shown(made, "v█\nb = 2\nc = ")
    await asyncio.sleep(1.0)  # the long prompt is read
    await shown(made, "v" + below)
    await shown(made, "vx█\nb = 2\nc = ")
    assert [one.brief for one in link.requests if one.prefix == "vx"] == [False]


async def test_what_is_known_at_an_anchor_is_not_taken_over_to_another_text_behind() -> None:
    lines = "one = 1\ntwo = 2\nthree = 3\nfour = 4\n"

    def tells_lines(prefix: str) -> str:
        assert lines.startswith(prefix)
        return lines[len(prefix) :].partition("\n")[0] or "\n" + lines[len(prefix) + 1 :].partition("\n")[0]

    made = completions(FakeLink(tells_lines))
    first, second, third, fourth, _ = lines.split("\n")
    await shown(made, f"{first}\n{second}\n{third[:4]}█")
    await asyncio.sleep(0.02)  # the fourth line is written in advance
    assert await shown(made, f"{first}\n{second}\n{third}█") == "\n" + fourth
    made.rest(asked(f"{first}\n{second}\n{third}█\n{fourth}"))
    await asyncio.sleep(1.0)
    text = await shown(made, f"{first}\n{second}\n{third}█\n{fourth}", deleted=True)
    assert text == "\n" + fourth  # the fake's word, asked for anew
    assert [one.suffix for one in made._link.requests if not one.ahead][-1] == "\n" + fourth  # type: ignore[attr-defined]


async def test_what_another_adapter_wrote_is_forgotten() -> None:
    link = FakeLink(tells)
    made = completions(link)
    first = TEXT.split("\n")[0]
    assert await shown(made, "█") == first
    link.adapter, link.say = "new-1", lambda prefix: "another way"
    assert await shown(made, "value█") == first[5:]  # nothing has told of the adapter yet
    assert await shown(made, "other █") == "another way"
    assert await shown(made, "other a█") == "nother way"  # what told of it is kept
    assert await shown(made, "value█") == "another way"


async def test_what_was_written_in_advance_behind_another_adapters_text_is_forgotten() -> None:
    link = FakeLink(tells)
    made = completions(link)
    first = TEXT.split("\n")[0]
    link.say = lambda prefix: first if not prefix else "\nof another"
    assert await shown(made, "█") == first
    link.adapter = "new-1"
    await asyncio.sleep(0.02)  # looks ahead
    assert [request.prefix for request in link.requests if request.ahead] == [first]
    link.say = lambda prefix: "\nof this"
    assert (await shown(made, first + "█")).strip() == "of this"

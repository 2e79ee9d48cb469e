"""The benchmark of keystrokes: its editor, its traces, its figures, and how it drives both sides."""

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import rich
from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types

from agent.errors import InputError
from lsp.keystrokes import trace
from lsp.keystrokes.editor import Change, Editor, Kind
from lsp.keystrokes.figures import Recording, Step, Work, figures
from lsp.keystrokes.llama_vim import CACHE_KEYS, LlamaVim
from lsp.keystrokes.ours import ghost_text
from lsp.keystrokes.screen import Screen
from lsp.keystrokes.trace import Key, Trace
from tests.conftest import World

SOURCES = sorted(
    file
    for package in (rich, psutil, pytest, json)
    for file in Path(package.__file__ or "").parent.rglob("*.py")
    if file.stat().st_size > 4000
)


def played(text: str, presses: str, step: str = "    ") -> str:
    """What stands in the editor after some keys: ⏎ Enter, ⌫ Backspace, ⌦ Delete; █ is the cursor."""
    before, _, behind = text.partition("█")
    editor = Editor(before + behind, step)
    editor.press(Kind.JUMP, to=len(before))
    kinds = {"⏎": Kind.ENTER, "⌫": Kind.BACKSPACE, "⌦": Kind.DELETE}
    for press in presses:
        kind = kinds.get(press, Kind.CHARACTER)
        editor.press(kind, press if kind is Kind.CHARACTER else "")
    return editor.text[: editor.cursor] + "█" + editor.text[editor.cursor :]


@pytest.mark.parametrize(
    ("text", "presses", "expected"),
    [
        ("█", "f(", "f(█)"),
        ("█", "f(a)", "f(a)█"),
        ("█", "f([1])", "f([1])█"),
        ("█x", "(", "(█x"),
        ("█ x", "(", "(█) x"),
        ("f(█)", "[", "f([█])"),
        ("f(█)", ")", "f()█)"),  # that closer is the user's own
        ("x = █", '"', 'x = "█"'),
        ("don█", "'t", "don't█"),
        ("█", '"""', '"""█'),
        ('"""word█', '"""', '"""word"""█'),
        ("    a = 1█", "⏎", "    a = 1\n    █"),
        ("    if a:█", "⏎", "    if a:\n        █"),
        ("\tif a {█", "⏎", "\tif a {\n\t    █"),
        ("x = █", "{⏎", "x = {\n    █\n}"),
        ("x = █", "{⏎⌦", "x = {\n    █}"),
        ("f(a,█)", "⏎", "f(a,\n█)"),
        ("    a█", "⏎⏎", "    a\n\n    █"),
        ("        █", "⌫", "    █"),
        ("      █", "⌫", "    █"),
        ("    a█", "⌫", "    █"),
        ("█", "(⌦", "(█"),
        ("█", "(⌦)", "()█"),
    ],
)
def test_the_editor(text: str, presses: str, expected: str) -> None:
    assert played(text, presses) == expected


def test_a_closer_is_the_users_own_once_the_cursor_was_elsewhere() -> None:
    editor = Editor("a\n", "    ")
    editor.press(Kind.CHARACTER, "(")
    editor.press(Kind.JUMP, to=4)
    editor.press(Kind.JUMP, to=1)
    assert editor.press(Kind.CHARACTER, ")") == Change(1, 1, ")")


@pytest.mark.parametrize("seed", range(5))
def test_after_all_keys_the_document_is_the_file(seed: int) -> None:
    typed = 0
    for file in SOURCES[seed::5]:
        text = trace.normal(file.read_text(encoding="utf-8-sig"))
        try:
            made = trace.make(text, 150, seed, file.name)
        except InputError:
            continue
        assert text_after(made) == text, file
        strokes = [key for key in made.keys if key.kind is not Kind.JUMP]
        assert 150 <= len(strokes) < 450
        typed += 1
        assert text.count("\n") - made.text.count("\n") == sum(part.count("\n") for part in made.regions)
    assert typed > 10


line = st.text(st.sampled_from("ab():{}[]'\" \t=,"), max_size=30)


@given(st.lists(line, min_size=30, max_size=60), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_whatever_the_file_holds_it_is_typed_right(lines: list[str], seed: int) -> None:
    text = trace.normal("\n".join(lines))
    try:
        made = trace.make(text, 60, seed, "odd.py")
    except InputError:
        return
    assert text_after(made) == text


def text_after(made: Trace) -> str:
    """The document when all keys are pressed; what stands before a key that is not astray is right."""
    editor = Editor(made.text, made.step)
    typed = ""
    for key in made.keys:
        editor.press(key.kind, key.text, key.to)
        if key.kind is Kind.CHARACTER and not key.astray:
            assert made.wanted(key).startswith(key.text)
            typed += key.text
    assert typed
    return editor.text


def test_a_trace_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    text = SOURCES[0].read_text()
    assert trace.make(text, 100, 1, "a.py") == trace.make(text, 100, 1, "a.py")
    assert trace.make(text, 100, 1, "a.py") != trace.make(text, 100, 2, "a.py")
    assert trace.make(text, 100, 1, "a.py") != trace.make(text, 100, 1, "b.py")


def test_the_rhythm_is_a_persons() -> None:
    file = max(SOURCES, key=lambda file: file.stat().st_size)
    made = trace.make(trace.normal(file.read_text()), 5000, 3, file.name)
    waits = [key.wait_ms for key in made.keys]
    assert 180 < statistics.median(waits) < 210
    assert min(waits) >= 40
    assert max(waits) <= 3000
    behind_jumps = [b.wait_ms for a, b in itertools.pairwise(made.keys) if a.kind is Kind.JUMP and b.kind is Kind.ENTER]
    assert all(500 < wait < 2000 for wait in behind_jumps)
    astray = sum(key.astray and key.kind is Kind.CHARACTER for key in made.keys)
    assert 0.01 < astray / len(made.keys) < 0.06  # 2 % of letters, each with up to two keys behind it


def test_a_closer_on_its_own_line_is_skipped_and_not_typed() -> None:
    text = "found = {\n    'a': 1,\n    'b': 2,\n}\n\n" * 20
    made = trace.make(text, 200, 1, "a.py")
    assert text_after(made) == text
    assert sum(key.kind is Kind.JUMP for key in made.keys) > len(made.regions)


def test_three_regions_lie_in_three_parts_of_the_file() -> None:
    text = "".join(f"value_{number} = compute({number})\n" for number in range(300))
    made = trace.make(text, 300, 1, "a.py")
    jumps = [key.to for key in made.keys if key.kind is Kind.JUMP]
    thirds = [text.count("\n", 0, to) // 100 for to in jumps]
    assert thirds == [0, 1, 2]
    first = made.first(100)
    assert sum(key.kind is not Kind.JUMP for key in first.keys) == 100
    assert first.keys == made.keys[: len(first.keys)]


@pytest.mark.parametrize("text", ["", "a = 1\n", "x" * 5000, "\n" * 500])
def test_a_file_that_nobody_could_have_typed(text: str) -> None:
    with pytest.raises(InputError, match=r"^odd\.py has no lines for 300 keystrokes"):
        trace.make(text, 300, 1, "odd.py")


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("a:\n  b\nc:\n  d\n", "  "),
        ("a:\n\tb\n", "\t"),
        ("a\nb\n", "    "),
        ("a:\n    b\n    c:\n        d\n", "    "),
    ],
)
def test_the_step_of_indentation(text: str, step: str) -> None:
    assert trace.step_of(text) == step


IDLE = Work(0, 0, 0, 0, 0, 0, 0, 0)
REGION = "\n    return value\n"


def recording(*rows: tuple[str, float, str, float | None], work: Work = IDLE) -> Recording:
    """Keys typed from the beginning of REGION: key, wait, ghost text before it, when that came first."""
    done, steps = 0, []
    for press, wait, ghost, first in rows:
        if press == "→":
            steps.append(Step(Key(Kind.JUMP, wait), ghost, first))
            continue
        kind = Kind.ENTER if press == "\n" else Kind.BACKSPACE if press == "⌫" else Kind.CHARACTER
        steps.append(Step(Key(kind, wait, press if kind is Kind.CHARACTER else "", done=done), ghost, first))
        # The editor's auto-indent stands there with Enter.
        done += 5 if kind is Kind.ENTER else len(press) if kind is Kind.CHARACTER else 0
    return Recording(Trace("", "    ", (REGION,), ()), tuple(steps), work)


def test_covered_is_what_begins_with_the_very_key() -> None:
    found = figures(
        [
            recording(
                ("→", 0, "", None),
                ("\n", 1000, "\n    return", 5),
                ("r", 200, "return", 5),
                ("e", 200, "turn", 5),
                ("⌫", 200, "x", 5),
            )
        ]
    )
    assert found["covered"] == 0.5
    assert found["keystrokes"] == 4


def test_a_pause_ends_with_ghost_text_or_not_at_all() -> None:
    found = figures(
        [
            recording(
                ("→", 900, "", None),
                ("\n", 1000, "a", 5.0),  # behind a jump: not counted
                ("r", 500, "a", 80.0),
                ("e", 399, "a", 90.0),
                ("t", 700, "", None),
                ("u", 800, "", 20.0),  # was there, and gone again
            )
        ]
    )
    assert (found["pauses"], found["p50_ms"], found["p90_ms"]) == (3, 80.0, 700.0)


def test_no_pause_has_no_quantile() -> None:
    assert figures([recording(("r", 100, "", None))])["p50_ms"] is None


def test_saved_characters() -> None:
    typed = [(character, 100.0, "", None) for character in "return value"]
    enter = ("\n", 100.0, "\n    return it", 5.0)
    # Enter and "return " agree, eight keys at the price of one; auto-indent saves nothing.
    assert figures([recording(enter, *typed)])["saved_per_1000"] == round(1000 * 7 / 13, 1)
    wrong = ("\n", 100.0, "    return value", 5.0)
    assert figures([recording(wrong, *typed)])["saved_per_1000"] == 0
    # What was accepted is not accepted again, and only the first line counts.
    twice = [
        (character, 100.0, REGION[5 + place : -1] + "\nmore", 5.0) for place, character in enumerate("return value")
    ]
    assert figures([recording(*[("\n", 100.0, "", None), *twice])])["saved_per_1000"] == round(1000 * 11 / 13, 1)


def test_work_is_divided_by_what_was_asked_for_and_pooled() -> None:
    one = recording(("r", 100, "", None), ("e", 100, "", None), work=Work(1.0, 2, 30, 10, 8, 4, 1, 0))
    two = recording(("r", 100, "", None), ("e", 100, "", None), work=Work(3.0, 2, 10, 0, 0, 0, 0, 1))
    found = figures([one, two])
    assert found["tokens_per_key"] == 10
    assert found["decoded_per_key"] == 2.5
    assert (found["ahead_tokens_per_key"], found["ahead_decoded_per_key"]) == (2, 1)
    assert found["cpu_s_per_key"] == 1.0
    assert (found["requests"], found["unfit"], found["unanswered"]) == (4, 1, 1)


async def test_the_screen_keeps_the_time_of_the_first_ghost_text() -> None:
    screen = Screen()
    key = Key(Kind.CHARACTER, 0, "a")
    assert screen.press(key).first_ms is None
    await asyncio.sleep(0.02)
    screen.show("")
    screen.show("one")
    await asyncio.sleep(0.02)
    screen.show("two")
    step = screen.press(key)
    assert step.ghost == "two"
    assert step.first_ms is not None
    assert 15 < step.first_ms < 39.9
    assert screen.press(key) == Step(key, "", None)


def item(text: str, start: tuple[int, int], end: tuple[int, int]) -> types.InlineCompletionItem:
    return types.InlineCompletionItem(text, range=types.Range(types.Position(*start), types.Position(*end)))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (item("x)", (3, 4), (3, 4)), "x)"),
        (item("x)", (3, 4), (3, 5)), "x"),
        (item("😀 = fx", (3, 0), (3, 4)), None),
        (item("😀 fx", (3, 0), (3, 4)), "x"),
        (item("x", (3, 4), (3, 5)), None),
        (item("x)y", (3, 4), (3, 5)), "x)y"),
        (item("x", (2, 4), (3, 4)), None),
        (item("x", (3, 5), (3, 5)), None),
        (item("x", (3, 4), (3, 9)), None),
    ],
)
def test_ghost_text_is_what_fits_around_the_cursor(found: types.InlineCompletionItem, expected: str | None) -> None:
    assert ghost_text(found, 3, "😀 f"[:3], ")") == expected


class Infill:
    """Answers `/infill` by what the prompt is."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.bodies: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        await self.gate.wait()
        return {"content": self.answers.get(body["prompt"], ""), "timings": {"prompt_n": 10, "predicted_n": 2}}

    @property
    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.bodies]


class Vim:
    """llama.vim before a fake server."""

    def __init__(self, **answers: str) -> None:
        self.server = Infill(answers)
        self.ghost = ""
        self.subject = LlamaVim(self.server, self._show, 32)

    def _show(self, ghost: str) -> None:
        self.ghost = ghost

    async def move(self, lines: Sequence[str], line: int, column: int, *, typed: bool = True) -> str:
        self.subject.moved(list(lines), line, column, typed=typed)
        for _ in range(5):
            await asyncio.sleep(0)
        return self.ghost


async def test_an_answer_is_shown_and_typed_through() -> None:
    vim = Vim(re="turn x\n")
    assert await vim.move(["def f():", "re", ""], 1, 2) == "turn x"
    body = vim.server.bodies[0]
    assert (body["input_prefix"], body["input_suffix"]) == ("def f():\n", "\n\n")
    assert body["n_predict"] == 32
    assert await vim.move(["def f():", "ret", ""], 1, 3) == "urn x"
    assert vim.server.prompts[0] == "re"
    assert await vim.move(["def f():", "rex", ""], 1, 3) == ""
    await vim.subject.close()


async def test_looking_back_ends_after_128_characters() -> None:
    text = "y" * 200
    vim = Vim(a=text)
    assert await vim.move(["a"], 0, 1) == text
    assert await vim.move(["a" + text[:128]], 0, 129) == text[:72]
    assert await vim.move(["a" + text[:129]], 0, 130) == ""
    await vim.subject.close()


async def test_what_follows_is_asked_for_in_advance() -> None:
    vim = Vim(re="turn x", returnx="!")
    await vim.move(["re", ""], 0, 2)
    await asyncio.sleep(0.15)  # the request that was just answered still counts as running
    assert vim.server.prompts == ["re", "return x"]
    assert vim.server.bodies[1]["t_max_predict_ms"] > vim.server.bodies[0]["t_max_predict_ms"]
    assert (vim.subject.typing.prompt_tokens, vim.subject.ahead.prompt_tokens) == (10, 10)
    await vim.subject.close()


async def test_while_a_request_runs_the_latest_wish_waits() -> None:
    vim = Vim(a="bcd", abx="yz")
    vim.server.gate.clear()
    await vim.move(["a"], 0, 1)
    await vim.move(["ab"], 0, 2)
    await vim.move(["abx"], 0, 3)
    await asyncio.sleep(0.15)
    assert vim.server.prompts == ["a"]  # tried again, and not aborted
    vim.server.gate.set()
    await asyncio.sleep(0.15)
    assert vim.server.prompts[:2] == ["a", "abx"]
    assert vim.ghost == "yz"
    assert vim.subject.requests == 3
    await vim.subject.close()


async def test_the_same_text_is_not_asked_twice_even_scrolled() -> None:
    vim = Vim(a="")
    lines = [f"line {number}" for number in range(300)] + ["a", "end"]
    await vim.move(lines, 300, 1)
    await vim.move(lines, 300, 1)
    assert vim.server.prompts == ["a"]
    body = vim.server.bodies[0]
    assert body["input_prefix"].count("\n") == 256
    # A line inserted above the window pushes the window's first line out of it.
    await vim.move(["new", *lines], 301, 1)
    assert vim.server.prompts == ["a"]
    await vim.subject.close()


async def test_nothing_is_asked_in_the_middle_of_a_line_nor_counted() -> None:
    vim = Vim()
    await vim.move(["f(12345678"], 0, 1)
    await vim.move(["f(1234567"], 0, 1)
    assert len(vim.server.prompts) == 1
    assert vim.subject.requests == 1
    await vim.subject.close()


async def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    vim = Vim()
    for number in range(CACHE_KEYS + 1):
        await vim.move([f"a{number}"], 0, len(f"a{number}"))
    await vim.move(["a1"], 0, 2)
    asked = len(vim.server.prompts)
    await vim.move(["a0"], 0, 2)
    assert len(vim.server.prompts) == asked + 1
    await vim.subject.close()


@pytest.mark.parametrize(
    ("lines", "answer", "ghost"),
    [
        (["a", "b"], "\nb", ""),  # the next line again
        (["a", "b"], "\nc", "\nc"),
        (["a", "", "ab"], "b", ""),  # the cursor's line would become the next one that is not empty
        (["a", "ab", "cd"], "b\nc", ""),
        (["a", "ab", "cd"], "b\nx", "b\nx"),
        (["a", "ab", "cd", "ef"], "b\ncd\nef", ""),
        (["a", "ab", "cd", "ef"], "b\ncd\nex", "b\ncd\nex"),
        (["a"], "b\n\n", "b"),
        (["a"], "  ", ""),
    ],
)
async def test_an_answer_that_repeats_the_text_is_not_shown(lines: list[str], answer: str, ghost: str) -> None:
    vim = Vim(a=answer)
    assert await vim.move(lines, 0, 1) == ghost
    await vim.subject.close()


async def test_on_an_empty_line_indentation_that_is_there_is_left_out() -> None:
    vim = Vim()
    vim.server.answers[""] = "    return x"
    assert await vim.move(["def f():", "    "], 1, 4) == "return x"
    assert vim.server.bodies[0]["n_indent"] == 0
    await vim.subject.close()


async def test_a_server_that_fails_is_told() -> None:
    async def fail(body: dict[str, Any]) -> dict[str, Any]:
        raise ConnectionError("gone")

    vim = LlamaVim(fail, lambda ghost: None, 32)
    vim.moved(["a"], 0, 1, typed=True)
    with pytest.raises(ConnectionError):
        await vim.close()


def run(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lsp.keystrokes.bench", *arguments]
    return subprocess.run(command, env=world.env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.e2e
def test_both_sides_are_measured_and_leave_nothing_behind(real_world: World, tmp_path: Path) -> None:
    file = tmp_path / "small.py"
    body = "\n\ndef area_{0}(width, height):\n    return width * height + {0}\n"
    file.write_text("import os\n" + "".join(body.format(number) for number in range(8)))
    done = run(real_world, str(file), "--keys", "20", "--peer", "llamacpp", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for side in ("ours", "peer"):
        assert found[side]["keystrokes"] == 20
        assert found[side]["requests"] == 20
        assert found[side]["cpu_s_per_key"] > 0
        assert found[side]["unfit"] == found[side]["unanswered"] == 0
        prompts = found[side]["tokens_per_key"] + found[side]["ahead_tokens_per_key"]
        assert prompts > 1
    assert found["files"][0]["peer"] == found["peer"]
    assert "small.py: peer" in done.stderr
    # Not the world of the test's either: the benchmark's daemon has its own.
    assert real_world.daemons() == []
    assert not any(real_world.runtime.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py"], "tabwise: cannot read missing.py: No such file or directory; check the path\n"),
        ([__file__, "--keys", "0"], "tabwise: --keys is 0; give at least 1\n"),
    ],
)
def test_errors_are_one_line(fake_world: World, arguments: list[str], message: str) -> None:
    done = run(fake_world, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)

"""The benchmark of filling in the middle, over a FakeEngine, with generated code that is really run."""

import gzip
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent import fim_bench, sandbox
from agent.catalog import LocalModel
from agent.config import CompletionSettings
from agent.errors import InputError
from agent.fim_bench import Outcome, Task
from agent.loaded import prepare
from agent.sandbox import Verdict
from tests.conftest import World
from tests.fakes import FakeEngine, decode

SETTINGS = CompletionSettings()
MODEL = LocalModel("fake", None, "gguf", "qwen", 4096, "ab" * 32)  # type: ignore[arg-type]

LINE = Task(
    "SingleLineInfilling/Own/0/L0",
    "add",
    "def add(a, b):\n",
    "    return c\n",
    "    c = a + b\n",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n",
)
SPAN = Task(
    "RandomSpanInfillingLight/Own/1/1",
    "mul",
    "def mul(a, b):\n    return",
    "\n",
    " a * b",
    "def check(candidate):\n    assert candidate(2, 3) == 6\n",
)


def as_lines(*tasks: Task) -> str:
    return "".join(json.dumps({name: getattr(task, name) for name in Task.__slots__}) + "\n" for task in tasks)


async def filled(engine: FakeEngine, task: Task, *, raw: bool = False) -> Outcome:
    loaded = await prepare(MODEL, engine)
    (outcome,) = [one async for one in fim_bench.outcomes(loaded, [task], SETTINGS, raw=raw)]
    return outcome


# ---- sandbox


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        ("x = 1\n", Verdict.PASSED),
        ("assert False\n", Verdict.FAILED),
        ("def broken(:\n", Verdict.FAILED),
        ("import sys; sys.exit(0)\n", Verdict.FAILED),
        ("raise SystemExit\n", Verdict.FAILED),
        ("import os; os._exit(0)\n", Verdict.FAILED),
        ("for _ in range(300_000): print('a flood of text')\n", Verdict.PASSED),
        ("input()\n", Verdict.FAILED),
        ("big = bytearray(2 << 30)\n", Verdict.FAILED),
        ("open('big', 'wb').write(bytes(2 << 20))\n", Verdict.FAILED),
        ("print('\ud800')\n", Verdict.PASSED),
        ("import sys; assert sys.argv == ['program.py']\n", Verdict.PASSED),
        ("if __name__ == '__main__': raise ValueError\n", Verdict.FAILED),
    ],
)
def test_only_what_runs_to_its_last_line_passes(program: str, verdict: Verdict) -> None:
    assert sandbox.run(program) is verdict


def test_an_endless_loop_is_killed() -> None:
    began = time.monotonic()
    assert sandbox.run("while True: pass\n", wall_s=0.5) is Verdict.TIMED_OUT
    assert time.monotonic() - began < 60  # it does come back


@pytest.mark.parametrize("end", ["", "while True: pass\n"])
def test_what_the_program_started_is_killed_with_it(tmp_path: Path, end: str) -> None:
    note = tmp_path / "pid"
    program = (
        "import os, time\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    while True: time.sleep(1)\n"
        f"with open({str(note)!r}, 'w') as stream: stream.write(str(pid))\n"
    )
    verdict = sandbox.run(program + end, wall_s=1.0)
    assert verdict is (Verdict.TIMED_OUT if end else Verdict.PASSED)
    pid = int(note.read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    with suppress(OSError):
        # A zombie that nobody buries counts as dead.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_process_that_gets_away_does_not_hold_us_up(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    with open({str(note)!r}, 'w') as stream: stream.write(str(os.getpid()))\n"
        "    time.sleep(120)\n"
        f"while not os.path.exists({str(note)!r}) or not open({str(note)!r}).read(): time.sleep(0.01)\n"
    )
    began = time.monotonic()
    try:
        assert sandbox.run(program) is Verdict.PASSED
        assert time.monotonic() - began < 60
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_the_program_sees_neither_our_environment_nor_our_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TABWISE_TEST_SECRET", "1")
    program = (
        "import os\n"
        "assert 'TABWISE_TEST_SECRET' not in os.environ\n"
        f"assert os.getcwd() != {str(Path.cwd())!r}\n"
        "assert os.listdir() == ['program.py']\n"
    )
    assert sandbox.run(program) is Verdict.PASSED


def test_a_system_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(InputError, match="use Linux or macOS"):
        sandbox.run("x = 1\n")


# ---- data


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz", "tasks"])
def test_tasks_are_read_compressed_or_not(tmp_path: Path, name: str) -> None:
    file, text = tmp_path / name, as_lines(LINE, SPAN).encode()
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert fim_bench.read_tasks(file) == [LINE, SPAN]


def test_a_limit_takes_tasks_from_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(as_lines(*[LINE] * 2, *[SPAN] * 2))
    assert fim_bench.read_tasks(file, 2) == [LINE, SPAN]
    assert len(fim_bench.read_tasks(file, 100)) == 4


def test_an_odd_end_of_line_within_a_task_does_not_break_it(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    fields = dict.fromkeys(Task.__slots__, "x") | {"prompt": "a\u2028b"}
    file.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    assert fim_bench.read_tasks(file)[0].prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no tasks"),
        (b"\n\n", "holds no tasks"),
        (b"{}\n", "lacks task_id, entry_point, prompt, suffix, canonical_solution, test"),
        (b'{"task_id": 1}\n', "lacks task_id"),
        (b"[]\n", "lacks an object"),
        (b"def f():\n", ":1 is not JSON"),
        (as_lines(LINE).encode() + b"{", ":2 is not JSON"),
        (b"[" * 100_000, ":1 is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (gzip.compress(as_lines(LINE).encode())[:-9], "damaged gzip"),
        (gzip.compress(b"x" * 100)[:12] + b"\0" * 30, "damaged gzip"),
    ],
)
def test_a_file_of_no_use_is_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "tasks.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        fim_bench.read_tasks(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", ""])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read"):
        fim_bench.read_tasks(tmp_path / name)


# ---- asking


async def test_a_line_is_asked_for_where_an_editor_shows_an_empty_one() -> None:
    engine = FakeEngine(say=lambda _: "    c = a + b\n    return c\n")
    outcome = await filled(engine, LINE)
    assert decode(engine.requests[0].prompt_ids) == (
        "<|fim_prefix|>def add(a, b):\n<|fim_suffix|>\n    return c\n<|fim_middle|>"
    )
    assert engine.requests[0].max_tokens == SETTINGS.line_tokens
    assert outcome == Outcome(LINE, "    c = a + b", exact=True, begins_with_truth=True, verdict=Verdict.PASSED)


async def test_a_plain_line_ends_at_its_end() -> None:
    engine = FakeEngine(say=lambda _: "    c = b + a\n    return c\n")
    outcome = await filled(engine, LINE, raw=True)
    assert decode(engine.requests[0].prompt_ids) == (
        "<|fim_prefix|>def add(a, b):\n<|fim_suffix|>    return c\n<|fim_middle|>"
    )
    assert engine.requests[0].max_tokens == SETTINGS.line_tokens
    assert outcome == Outcome(LINE, "    c = b + a", exact=False, begins_with_truth=False, verdict=Verdict.PASSED)


async def test_a_span_goes_through_healing_and_stop_rules() -> None:
    # Taken back and written again is the whole word before the cursor, here "return" with a blank before it.
    engine = FakeEngine(say=lambda prompt: "n a * b\n    return b\n" if prompt.endswith("retur") else "?")
    outcome = await filled(engine, SPAN)
    assert decode(engine.requests[-1].prompt_ids).endswith("<|fim_middle|>    retur")
    assert outcome == Outcome(SPAN, " a * b", exact=True, begins_with_truth=True, verdict=Verdict.PASSED)


async def test_a_plain_span_is_neither_healed_nor_cut() -> None:
    engine = FakeEngine(say=lambda _: " a * b\n    }\0more")
    outcome = await filled(engine, SPAN, raw=True)
    assert decode(engine.requests[0].prompt_ids) == (
        "<|fim_prefix|>def mul(a, b):\n    return<|fim_suffix|>\n<|fim_middle|>"
    )
    assert engine.requests[0].max_tokens == SETTINGS.block_tokens
    assert outcome == Outcome(SPAN, " a * b\n    }", exact=False, begins_with_truth=True, verdict=Verdict.FAILED)


async def test_closers_that_the_text_stands_in_for_are_not_doubled() -> None:
    task = Task(
        "RandomSpan/0", "one", "def one():\n    return max(", ")\n", "0, 1", SPAN.test.replace("2, 3", "") + "\n"
    )
    task = Task(*(getattr(task, name).replace("== 6", "== 1") for name in Task.__slots__))
    outcome = await filled(FakeEngine(say=lambda _: "(0, 1)\n"), task)
    assert outcome.text == "0, 1)"
    assert outcome.exact
    assert outcome.verdict is Verdict.PASSED


async def test_an_early_exit_in_generated_code_does_not_pass() -> None:
    outcome = await filled(FakeEngine(say=lambda _: "    raise SystemExit(0)\n"), LINE)
    assert outcome.text == "    raise SystemExit(0)"
    assert outcome.verdict is Verdict.FAILED


# ---- figures


def test_figures_are_shares() -> None:
    def outcome(text: str, verdict: Verdict, **more: Any) -> Outcome:
        return Outcome(SPAN, text, **({"exact": False, "begins_with_truth": False} | more), verdict=verdict)

    done = [
        outcome("a", Verdict.PASSED, exact=True, begins_with_truth=True),
        outcome("ab", Verdict.FAILED, begins_with_truth=True),
        outcome("\n", Verdict.TIMED_OUT),
    ]
    assert fim_bench.figures(done) == {
        "n": 3,
        "pass_at_1": 0.3333,
        "exact_match": 0.3333,
        "begins_with_truth": 0.6667,
        "empty": 0.3333,
        "timed_out": 0.3333,
    }
    assert fim_bench.figures([])["n"] == 0


async def test_the_model_is_loaded_measured_and_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, folders = [], []

    async def load(_model: Any, _settings: Any, folder: Path) -> FakeEngine:
        folders.append(folder)
        engines.append(FakeEngine(say=lambda prompt: "    c = a + b\n" if "add" in prompt else "n a * b\n"))
        return engines[-1]

    monkeypatch.setattr("agent.engines.llamacpp.LlamaCppEngine.load", load)
    monkeypatch.setattr("agent.catalog.find", lambda _: MODEL)
    file = world.root / "tasks.jsonl"
    file.write_text(as_lines(SPAN, LINE))
    told: list[tuple[int, int]] = []
    found = await fim_bench.run(file, limit=None, raw=False, advance=lambda *where: told.append(where))
    assert found["n"] == 2
    assert found["pass_at_1"] == found["exact_match"] == 1.0
    assert found["raw"] is False
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert [engine.closed for engine in engines] == [True]
    assert world.runtime not in folders  # which a daemon that starts meanwhile clears
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize(("live_lines", "head"), [(0, "a\nb\n"), (1, "a\n"), (2, ""), (9, "")])
def test_the_anchor_lies_above_the_lines_that_are_live(live_lines: int, head: str) -> None:
    prefix = "a\nb\n  c"
    assert prefix[: fim_bench._anchor(prefix, live_lines)] == head

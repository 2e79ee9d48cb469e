"""The command line, the daemon and the real starter model: the main job, from end to end."""

import json
import re
from pathlib import Path

import pytest

from agent.bench import _FUNCTION
from tests.conftest import World

pytestmark = pytest.mark.e2e

ROWS = '''\
import csv


def read_rows(path, delimiter=","):
    """Return the rows of a CSV file as dictionaries."""
    with open(path, newline="") as f:
        


def count_rows(path):
    """Return the number of rows of a CSV file."""
    return len(read_rows(path))
'''


def complete(world: World, text: str, line: int, column: int, name: str = "a.py") -> dict[str, object]:
    path = world.root / name
    path.write_text(text)
    done = world.run("complete", f"{path}:{line}:{column}", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize(
    "following",
    [
        ROWS.partition("        \n")[2],
        '\n\ndef write_rows(path, rows):\n    with open(path, "w") as f:\n        csv.writer(f).writerows(rows)\n',
        "\n\ndef count_rows(path):\n    return len(read_rows(path))\n",
        '\n\ndef main():\n    print(read_rows("a.csv"))\n\n\nmain()\n',
        "\n\ndef parse(text):\n    return [line.split() for line in text.splitlines()]\n",
    ],
)
def test_an_empty_body_is_filled_with_what_was_imported(real_world: World, following: str) -> None:
    answer = complete(real_world, ROWS.partition("        \n")[0] + "        \n" + following, 7, 9)
    assert "csv." in str(answer["text"])
    assert not str(answer["text"]).startswith(" ")
    compile(ROWS.partition("        \n")[0] + "        " + str(answer["text"]) + "\n" + following, "rows.py", "exec")
    assert set(answer) == {"text", "source", "stop_reason", "timing"}
    assert answer["source"] == "engine"
    assert answer["stop_reason"] in {"end", "line", "block", "suffix", "repetition", "budget"}
    timing = answer["timing"]
    assert isinstance(timing, dict)
    assert set(timing) == {"total_ms", "first_text_ms", "prefill_tokens", "cached_tokens", "decoded_tokens"}
    assert 0 < timing["first_text_ms"] <= timing["total_ms"]


@pytest.mark.parametrize(
    ("text", "line", "column", "wanted"),
    [
        ("import os\n\nhome = os.path.expand\n", 3, 22, "user"),
        ("def add(a, b):\n    retur\n", 2, 10, "n a + b"),
        ("def mul()\n\n\nprint(mul(2, 3))\n", 1, 9, "a, b"),
        ("names = ['b', 'a']\nfor name in sort\n    print(name)\n", 2, 17, "ed(names)"),
        ("class Point:\n    def __init__(self, x, y):\n        self.x = x\n        \n", 4, 9, "self.y = y"),
    ],
)
def test_completions_fit_their_places(real_world: World, text: str, line: int, column: int, wanted: str) -> None:
    assert str(complete(real_world, text, line, column)["text"]).startswith(wanted)


def test_the_second_question_finds_the_first_ones_prompt(real_world: World) -> None:
    complete(real_world, ROWS, 7, 9)
    timing = complete(real_world, ROWS, 7, 9)["timing"]
    assert isinstance(timing, dict)
    assert timing["prefill_tokens"] <= 2
    assert timing["cached_tokens"] > 30


def test_a_file_as_context(real_world: World) -> None:
    helper = real_world.root / "shop.py"
    helper.write_text("def price_with_tax(net, rate=0.19):\n    return net * (1 + rate)\n")
    path = real_world.root / "main.py"
    path.write_text("from shop import price_with_tax\n\ntotal = price_\n")
    done = real_world.run("complete", f"{path}:3:15", "--context", str(helper))
    assert done.stdout.startswith("with_tax(")


@pytest.mark.parametrize(
    ("language", "words"),
    [("English", {"the", "is", "and", "to"}), ("German", {"die", "der", "und", "wird", "eine", "einen"})],
)
def test_a_function_of_forty_lines_is_explained_in_the_readers_language(
    real_world: World, language: str, words: set[str]
) -> None:
    path = real_world.root / "plan.py"
    path.write_text(_FUNCTION)
    lines = _FUNCTION.count("\n")
    assert 38 <= lines <= 42
    done = real_world.run("explain", f"{path}:1-{lines}", "--language", language, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    markdown = answer["markdown"]
    signature = "`schedule(tasks, workers, deadline, strict)`"
    for name in ("schedule", "tasks", "workers", "deadline", "strict"):
        assert name in markdown
    own = markdown.partition(signature)[2]  # what the model itself wrote: the signature is read from the code
    assert len(own) > 200
    # A German noun has a capital: "die Deadline" is the parameter too.
    assert any(name in own.lower() for name in ("tasks", "deadline", "strict"))
    found = set(re.findall(r"[a-zäöüß]+", markdown.lower()))
    assert len(found & words) >= 3
    assert answer["timing"]["first_text_ms"] > 0


def test_the_doctor_is_content(real_world: World) -> None:
    done = real_world.run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    topics = {finding["topic"]: finding for finding in json.loads(done.stdout)}
    assert topics["model"]["ok"] is True
    assert topics["xllamacpp"]["ok"] is True
    assert "text" in topics["device"]
    assert real_world.run("doctor").stdout.count("\n") >= len(topics)


def test_models_are_listed_and_found(real_world: World) -> None:
    listed = {row["name"]: row for row in json.loads(real_world.run("models", "list", "--json").stdout)}
    assert listed["starter"]["pulled"] is True
    path = Path(real_world.run("models", "path", "starter").stdout.strip())
    assert path.stat().st_size == 491_400_064
    assert "starter" in real_world.run("models", "list").stdout

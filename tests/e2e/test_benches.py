"""The benchmarks that tell right from wrong, on the real model: few places and half a minute, all of them under soak."""

import json
from pathlib import Path

import pytest
import rich

from tests.conftest import World, count

FOLDER = Path(rich.__file__).parent
FILES = [str(FOLDER / name) for name in ("align.py", "columns.py", "style.py", "panel.py")]


@pytest.mark.e2e
def test_cached_and_speculated_tokens_are_those_that_are_computed_anew(real_world: World) -> None:
    positions = count(100)
    done = real_world.run("bench", "cache", *FILES, "--positions", str(positions), "--json", timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind in ("cached", "speculated"):
        assert sum(found[kind].values()) == positions
        assert found[kind]["different"] <= positions * 0.02, found


@pytest.mark.e2e
def test_editors_that_type_at_once_get_all_answers_and_nothing_stale(real_world: World) -> None:
    # Two editors: four keep two cores so busy that next to nothing is shown, see LOG.
    options = ("--editors", "2", "--minutes", str(count(50) / 10), "--json")
    done = real_world.run("bench", "soak", *FILES, *options, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["requests"] > 100
    assert found["shown"] > 10
    assert (found["unanswered"], found["unfit"]) == (0, 0)
    assert real_world.daemons() == []


def test_fewer_files_than_editors_is_one_line(fake_world: World) -> None:
    done = fake_world.run("bench", "soak", FILES[0], "--json")
    assert done.returncode == 1
    assert done.stderr.strip() == "tabwise: 1 files are too few for 4 editors; give each one of its own"

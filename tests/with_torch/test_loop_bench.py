"""The benchmark of the decode loop, on a small model: what it counts, and that it can tell a difference."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

from agent import loop_bench
from agent.cache_bench import Step
from agent.engines import decoding
from agent.errors import InputError
from tests.conftest import World
from tests.with_torch.small_models import CODE, save, small_module


async def bench(world: World, *files: Path, model: str) -> dict[str, dict[str, object]]:
    advanced = [0]

    def advance() -> None:
        advanced[0] += 1

    found = await loop_bench.run(files, positions=6, keys=8, new_tokens=6, seed=2, model_name=model, advance=advance)
    assert advanced == [loop_bench.steps(6, 8)]
    return found


@pytest.fixture
def code(world: World) -> list[Path]:
    files = [world.root / "one.py", world.root / "two.py"]
    for file in files:
        file.write_text(CODE * 3)
    return files


async def test_all_ways_write_the_same(world: World, code: list[Path]) -> None:
    model = save(world.root / "model", small_module(max_position_embeddings=4096))
    found = await bench(world, *code, model=str(model.path))
    assert found["places"]["same"] == {"drafts": "6 of 6"}
    assert found["typing"]["same"] == {"caches": "8 of 8", "drafts": "8 of 8"}
    assert found["typing"]["gaps_nats"] == []
    medians = found["typing"]["median_ms"]
    assert isinstance(medians, dict)
    assert list(medians) == ["generate", "caches", "drafts"]
    assert all(value > 0 for value in medians.values())
    assert "drafts_times_faster_than_caches" in found["repetitive"]
    assert json.dumps(found)


async def test_a_loop_that_goes_wrong_is_found_out(
    world: World, code: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(world.root / "model", small_module(max_position_embeddings=4096))
    monkeypatch.setattr(decoding, "accepted_length", lambda drafted, chosen: len(drafted))  # takes every draft
    found = await bench(world, *code, model=str(model.path))
    assert found["typing"]["same"] != {"caches": "8 of 8", "drafts": "8 of 8"}
    assert found["typing"]["gaps_nats"]


def test_the_gap_where_texts_part() -> None:
    ours = [Step(1, {1: -0.1}), Step(2, {2: -0.5, 3: -0.75}), Step(4, {})]
    assert loop_bench.gap([1, 3, 9], ours) == 0.25
    assert loop_bench.gap([1, 5], ours) is None
    assert loop_bench.gap([1, 2], ours) is None  # one is shorter


def test_the_command(world: World, code: list[Path]) -> None:
    model = save(world.root / "model", small_module(max_position_embeddings=4096))
    options = ("--positions", "2", "--keys", "2", "--new-tokens", "4", "--model", str(model.path), "--json")
    done = world.run("bench", "loop", *map(str, code), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["quantisation"], found["new_tokens"]) == ("fp32", 4)
    assert found["places"]["same"] == {"drafts": "2 of 2"}
    missing = world.run("bench", "loop", str(code[0]), "--model", "nonesuch")
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines()[-1].startswith("tabwise: unknown model 'nonesuch'")


async def test_an_empty_file_is_one_line(world: World) -> None:
    file = world.root / "empty.py"
    file.write_text("\n")
    with pytest.raises(InputError, match=r"empty\.py is empty"):
        await loop_bench.run([file], positions=1, keys=1, new_tokens=1, seed=1, model_name=None, advance=lambda: None)

"""Whatever is wrong, the command line says it in one line and ends with a status that is not zero."""

import os
import subprocess
from pathlib import Path

import pytest

from agent import catalog
from tests.conftest import STARTER_DIR, World

pytestmark = pytest.mark.e2e


def complains(world: World, *arguments: str, about: str) -> None:
    done = world.run(*arguments)
    assert done.returncode != 0, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("tabwise: ")
    assert about in lines[0]
    assert "Traceback" not in done.stderr + done.stdout


def source(world: World, content: bytes = b"x = 1\n") -> Path:
    path = world.root / "a.py"
    path.write_bytes(content)
    return path


def test_a_missing_file(world: World) -> None:
    complains(world, "complete", "nonesuch.py:1:1", about="nonesuch.py: No such file")
    complains(world, "explain", "nonesuch.py", about="nonesuch.py: No such file")


def test_a_position_past_the_end(world: World) -> None:
    path = source(world)
    complains(world, "complete", f"{path}:9:1", about="there is no line 9")
    complains(world, "complete", f"{path}:1:9", about="there is no column 9")
    complains(world, "explain", f"{path}:3-9", about="3-9 is no part of it")
    complains(world, "complete", f"{path}", about="FILE:LINE:COL")


def test_a_binary_file(world: World) -> None:
    path = source(world, b"\x7fELF\0\0")
    complains(world, "complete", f"{path}:1:1", about="binary file")
    complains(world, "explain", str(path), about="binary file")


def test_nothing_to_explain(world: World) -> None:
    complains(world, "explain", str(source(world, b"\n\n")), about="no code")


def test_an_unknown_model(world: World) -> None:
    complains(world, "models", "pull", "nonesuch", about="unknown model 'nonesuch'")
    complains(world, "models", "remove", "nonesuch", about="unknown model 'nonesuch'")
    world.config.write_text('[model]\nname = "nonesuch"\n')
    complains(world, "complete", f"{source(world)}:1:1", about="unknown model 'nonesuch'")


def test_no_model_pulled(world: World) -> None:
    complains(world, "complete", f"{source(world)}:1:1", about="tabwise models pull starter")
    complains(world, "explain", str(source(world)), about="tabwise models pull starter")
    complains(world, "models", "remove", "starter", about="not on this machine")
    complains(world, "models", "path", "starter", about="tabwise models pull starter")


def test_a_full_disk(world: World) -> None:
    models = world.root / "models"
    models.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(models)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk of a known size takes the right to mount one")
    try:
        complains(world, "models", "pull", "starter", about="not enough room")
    finally:
        subprocess.run(["umount", str(models)], check=True)


def test_a_truncated_gguf_file(world: World) -> None:
    cut = world.root / "cut.gguf"
    with (STARTER_DIR / "starter" / catalog.entry("starter").file).open("rb") as whole:
        cut.write_bytes(whole.read(20_000_000))
    world.config.write_text(f'[model]\nname = "{cut}"\n')
    complains(world, "complete", f"{source(world)}:1:1", about=f"{cut} is cut or damaged")


def test_a_damaged_tensor_that_only_llamacpp_can_see(world: World) -> None:
    # The header is whole and names tensors that llama.cpp cannot use.
    from tests.gguf_files import write_gguf

    path = write_gguf(world.root / "odd.gguf")
    world.config.write_text(f'[model]\nname = "{path}"\n')
    complains(world, "complete", f"{source(world)}:1:1", about=f"llama.cpp cannot load {path}")


def test_a_wrong_hash(world: World) -> None:
    """A pulled model of which one byte was changed is never loaded."""
    known = catalog.entry("starter")
    folder = world.root / "models" / "starter"
    folder.mkdir(parents=True)
    for name in ("manifest.json", known.file):
        (folder / name).write_bytes((STARTER_DIR / "starter" / name).read_bytes())
    with (folder / known.file).open("r+b") as file:
        file.seek(400_000_000)
        byte = file.read(1)
        file.seek(400_000_000)
        file.write(bytes([byte[0] ^ 1]))
    complains(world, "complete", f"{source(world)}:1:1", about="has sha256")


def test_settings_that_cannot_be_read(world: World) -> None:
    path = source(world)
    world.config.write_text("[engine]\nspeed = 1\n")
    complains(world, "complete", f"{path}:1:1", about="engine.speed: unknown key")
    world.config.write_text('[engine]\nthreads = "two"\n')
    complains(world, "complete", f"{path}:1:1", about="engine.threads: Input should be a valid integer, got 'two'")
    world.config.write_text("[engine\n")
    complains(world, "explain", str(path), about="not TOML")
    world.config.unlink()
    world.config.mkdir()
    complains(world, "complete", f"{path}:1:1", about="cannot read the settings")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_runtime_directory_of_somebody_else(world: World) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(world.runtime, 65534, 65534)
    complains(world, "complete", f"{source(world)}:1:1", about="is not a directory of yours")
    os.chown(world.runtime, 0, 0)


def test_a_runtime_directory_with_too_long_a_name(world: World) -> None:
    world.env["TABWISE_RUNTIME_DIR"] = str(world.root / ("x" * 100))
    complains(world, "status", about="set TABWISE_RUNTIME_DIR to a shorter one")


def test_names_that_are_too_long(world: World) -> None:
    complains(world, "explain", "x" * 300, about="File name too long")
    complains(world, "models", "path", "x" * 300, about="unknown model")
    complains(world, "models", "path", "~nobody9/x", about="unknown model")


def test_a_data_directory_that_cannot_be(world: World) -> None:
    world.env["TABWISE_DATA_DIR"] = str(source(world) / "below")
    complains(world, "complete", f"{source(world)}:1:1", about="cannot create the directory")
    world.env["TABWISE_MODELS_DIR"] = str(source(world) / "below")
    complains(world, "models", "pull", "starter", about="cannot create the directory")

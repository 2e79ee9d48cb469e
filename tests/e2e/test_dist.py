"""The wheel and the sdist: built, installed into fresh environments, and run there."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from agent.version import __version__
from tests.conftest import World

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_the_wheel_holds_what_it_needs_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"tabwise-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in ("agent/catalog.toml", "agent/explain.toml", "lsp/server.py", "rlhf/__init__.py"):
        assert wanted in names
    assert {name.split("/")[0] for name in names} == {"agent", "lsp", "rlhf", f"tabwise-{__version__}.dist-info"}


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_runs_from_a_fresh_environment(built: Path, tmp_path: Path, real_world: World, kind: str) -> None:
    environment = tmp_path / "env"
    venv.EnvBuilder(with_pip=True).create(environment)
    bin_dir = environment / ("Scripts" if os.name == "nt" else "bin")
    (package,) = built.glob(kind)
    constraints = str(ROOT / "constraints.txt")
    command = [str(bin_dir / "python"), "-m", "pip", "install", "--quiet", "-c", constraints, str(package)]
    subprocess.run(command, check=True, capture_output=True)
    source = tmp_path / "a.py"
    source.write_text("import os\n\nhome = os.path.expand\n")

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, env=real_world.env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(bin_dir / "tabwise-lsp"), "--version").strip() == f"tabwise-lsp {__version__}"
    assert run(str(bin_dir / "tabwise"), "complete", f"{source}:3:22").startswith("user")
    assert run(str(bin_dir / "tabwise"), "stop").strip() == "stopped"

"""What the documents say of the repository, held against the repository."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tracked() -> list[Path]:
    """The files that are part of the repository, new ones included; built things are not."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: the files of the repository cannot be listed")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: an unpacked sdist has no list of its files")
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_the_readmes_file_tree() -> None:
    block = text("README.md").partition("## What is where")[2].split("```")[1]
    named: set[Path] = set()
    above: list[str] = []
    for line in block.strip().splitlines():
        found = re.match(r"( *)(\w+)/ +\S", line)
        assert found, line
        depth = len(found[1]) // 2
        above = [*above[:depth], found[2]]
        named.add(Path(*above))
    for folder in named:
        assert (ROOT / folder).is_dir(), folder
    top = {Path(file.parts[0]) for file in tracked() if len(file.parts) > 1 and not file.parts[0].startswith(".")}
    assert top <= named


def test_the_code_map_names_every_module_and_nothing_else() -> None:
    section = text("ARCHITECTURE.md").partition("## Code map")[2].partition("\n## ")[0]
    named = set()
    for row in section.splitlines():
        folder = ""
        for name in re.findall(r"`([\w/.]+)`", row.split("|")[1] if row.count("|") > 2 else ""):
            folder = name.rpartition("/")[0] or folder
            named.add(name if "/" in name else f"{folder}/{name}")
    for name in named:
        assert (ROOT / name).exists(), name
    modules = {str(file) for file in tracked() if file.parts[0] in ("agent", "lsp") and file.suffix == ".py"}
    quiet = {"agent/version.py", *(module for module in modules if module.endswith("__init__.py"))}
    quiet |= {module for module in modules if module.startswith("lsp/features/")}
    assert modules - quiet <= named


def test_every_module_says_what_it_is_for() -> None:
    for file in tracked():
        if file.suffix == ".py" and file.parts[0] in ("agent", "lsp", "rlhf", "scripts"):
            assert text(str(file)).lstrip("r").startswith('"""'), file


def test_inits_are_nearly_empty() -> None:
    for package in ("agent", "agent/engines", "lsp", "lsp/features", "rlhf"):
        assert len(text(f"{package}/__init__.py").splitlines()) <= 3


def test_the_makefile_explains_its_targets() -> None:
    makefile = text("Makefile")
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.search(r"\.PHONY: (.*)", makefile)[1].split():  # type: ignore[index]
        assert f"{target} — " in shown
    for command in re.findall(r"^make ([a-z-]+)", text("README.md") + text("CONTRIBUTING.md"), flags=re.MULTILINE):
        assert f"{command} — " in shown


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pins = dict(line.split("==") for line in text("constraints.txt").splitlines() if "==" in line)
    for requirement in wanted:
        name = re.split(r"[><=\[]", requirement)[0].strip()
        assert name in pins, name
    assert pins["torch"] == "2.13.0"
    assert not any(name in " ".join(project["dependencies"]) for name in ("torch", "transformers", "numpy", "gguf"))


def test_links_between_documents_lead_somewhere() -> None:
    for file in tracked():
        if file.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", text(str(file))):
            assert (ROOT / file.parent / target).exists(), f"{file}: {target}"


def test_ci_calls_the_readmes_test_command() -> None:
    assert re.search(r"^make test$", text(".ci/run"), flags=re.MULTILINE)
    assert "make test" in text("README.md")

"""What may be read: beside git itself on real repositories, and beyond what git knows."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.errors import ConfigError
from agent.ignored import Permissions

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

FOLDERS = ["", "foo", "bar", "keep", "foo/bar", "bar/foo", "foo/keep", "keep/bar", "bar/foo/keep"]
NAMES = ["a.log", "b.log", "c.py", "keep.txt", "foo.txt"]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def tree(root: Path) -> list[str]:
    names = [f"{folder}/{name}".lstrip("/") for folder in FOLDERS for name in NAMES]
    write(root, dict.fromkeys(names, "x = 1\n"))
    return names


def ignored_by_git(root: Path, names: list[str]) -> set[str]:
    asked = subprocess.run(
        ["git", "-C", root, "-c", "core.excludesFile=", "check-ignore", "--no-index", "--stdin", "-z"],
        input="\0".join(names) + "\0",
        capture_output=True,
        text=True,
        check=False,  # 1 says that nothing is ignored
    )
    assert asked.returncode in (0, 1), asked.stderr
    return set(asked.stdout.split("\0")) - {""}


def ignored_here(root: Path, names: list[str]) -> set[str]:
    permissions = Permissions([root])
    return {name for name in names if not permissions.may_read(root / name)}


CASES = [
    pytest.param({".gitignore": text}, id=text.replace("\n", " "))
    for text in (
        "*.log",
        "*.log\n!a.log",
        "foo/\n!foo/a.log",  # nothing in an ignored folder can be taken back
        "foo/*\n!foo/keep.txt",
        "foo/**\n!foo/keep.txt",
        "foo/**/\n",
        "*\n!*/\n!*.py",
        "/foo\n",
        "foo.txt/\n",  # folders only
        "**/keep/\n",
        "bar/**/keep\n",
        "\\#x\n# a comment\n\n[ab].log",
        "a.log   \nb.log\\ ",
        "a.log\r\n*.txt\r\n",
        "[\n[z-a]\n\\\n//\nc.py",  # what is no pattern matches nothing
        "?.log\n!b*",
    )
]
CASES += [
    pytest.param({".gitignore": "*.log", "foo/.gitignore": "!a.log"}, id="a nested file takes back"),
    pytest.param({".gitignore": "!a.log", "foo/.gitignore": "*.log"}, id="a nested file is the stronger one"),
    pytest.param({".gitignore": "foo/", "foo/.gitignore": "!*"}, id="a file in an ignored folder says nothing"),
    pytest.param({"bar/.gitignore": "/foo\nkeep.txt"}, id="patterns are relative to their file"),
    pytest.param({".git/info/exclude": "*.log", ".gitignore": "!a.log"}, id="the repository's own list"),
    pytest.param({".gitignore": "\ufeff*.log"}, id="a byte order mark"),
]


@needs_git
@pytest.mark.parametrize("files", CASES)
def test_as_git_does(tmp_path: Path, files: dict[str, str]) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    names = tree(tmp_path)
    write(tmp_path, files)
    assert ignored_here(tmp_path, names) == ignored_by_git(tmp_path, names)


@needs_git
def test_as_git_does_with_random_patterns(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    names = tree(tmp_path)
    pieces = ["foo", "bar", "keep", "*.log", "a.log", "*", "**", "b?r", "[ab].log", "*.txt"]
    dice = random.Random(0)
    for _ in range(60):
        for folder in ("", "foo", "bar/foo"):
            lines = []
            for _ in range(dice.randrange(4)):
                path = "/".join(dice.choices(pieces, k=dice.choice((1, 1, 1, 2, 3))))
                lines.append(
                    f"{dice.choice(['', '', '!'])}{dice.choice(['', '', '/'])}{path}{dice.choice(['', '', '/'])}"
                )
            (tmp_path / folder / ".gitignore").write_text("\n".join(lines), encoding="utf-8")
        assert ignored_here(tmp_path, names) == ignored_by_git(tmp_path, names)


def test_patterns_take_effect_when_they_change(tmp_path: Path) -> None:
    permissions = Permissions([write(tmp_path, {"a.py": ""})])
    assert permissions.may_read(tmp_path / "a.py")
    write(tmp_path, {".gitignore": "*.py"})
    assert not permissions.may_read(tmp_path / "a.py")
    (tmp_path / ".gitignore").unlink()
    assert permissions.may_read(tmp_path / "a.py")


def test_a_workspace_that_is_part_of_a_repository(tmp_path: Path) -> None:
    write(tmp_path, {".git/HEAD": "", ".gitignore": "*.log\n/sub/made.py", "sub/a.log": "", "sub/a.py": ""})
    permissions = Permissions([tmp_path / "sub"])
    assert permissions.may_read(tmp_path / "sub/a.py")
    assert not permissions.may_read(tmp_path / "sub/a.log")
    assert not permissions.may_read(tmp_path / "sub/made.py")


def test_secrets_and_gits_own_files(tmp_path: Path) -> None:
    permissions = Permissions([tmp_path])
    for name in (".env", "a/.env.local", "server.pem", "id_rsa", ".env/lib/a.py", ".git/config", "a/.git/HEAD"):
        assert not permissions.may_read(tmp_path / name), name
    assert permissions.may_read(tmp_path / "environment.py")


def test_nothing_outside(tmp_path: Path) -> None:
    root = write(tmp_path / "w", {"a.py": ""})
    write(tmp_path, {"out.py": "", "w2/a.py": ""})
    permissions = Permissions([root])
    assert permissions.may_read(root / "a.py")
    assert permissions.may_read(root / "not-saved-yet.py")
    for path in (tmp_path / "out.py", root / "../out.py", tmp_path / "w2/a.py", root, Path("/etc/passwd"), Path("/\0")):
        assert not permissions.may_read(path), path
    assert not Permissions([]).may_read(root / "a.py")
    assert Permissions([root, tmp_path / "w2"]).may_read(tmp_path / "w2/a.py")


def test_links(tmp_path: Path) -> None:
    root = write(tmp_path / "w", {"a.py": "", "made/b.py": "", ".env": "", ".gitignore": "made/\nlink-ignored.py"})
    write(tmp_path, {"out.py": "", "outside/c.py": ""})
    links = {
        "link.py": "a.py",
        "link-ignored.py": "a.py",
        "to-ignored.py": "made/b.py",
        "to-secret.py": ".env",
        "out.py": "../out.py",
        "folder": "../outside",
        "loop.py": "loop.py",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "in.py").symlink_to(root / "a.py")
    permissions = Permissions([root])
    assert permissions.may_read(root / "link.py")
    for name in ("link-ignored.py", "to-ignored.py", "to-secret.py", "out.py", "folder/c.py"):
        assert not permissions.may_read(root / name), name
    assert not permissions.may_read(tmp_path / "in.py")
    permissions.may_read(root / "loop.py")  # comes to an end


def test_a_workspace_behind_a_link(tmp_path: Path) -> None:
    real = write(tmp_path / "real", {"a.py": "", "b.py": "", ".gitignore": "b.py"})
    (tmp_path / "link").symlink_to(real)
    permissions = Permissions([tmp_path / "link"])
    assert permissions.may_read(tmp_path / "link/a.py")
    assert permissions.may_read(real / "a.py")
    assert not permissions.may_read(tmp_path / "link/b.py")
    assert permissions.shown(tmp_path / "link/a.py") == permissions.shown(real / "a.py") == "a.py"


def test_exclude_list(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "!*.sql"})  # a file of the repository cannot take back what the user excludes
    permissions = Permissions([tmp_path], ["*.sql", "/private/", "# a comment", ""])
    assert not permissions.may_read(tmp_path / "a/b.sql")
    assert not permissions.may_read(tmp_path / "private/a.py")
    assert permissions.may_read(tmp_path / "a/private/a.py")


@pytest.mark.parametrize("line", ["[", "\\", "[z-a]"])
def test_a_wrong_exclude_list_is_told(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="no pattern"):
        Permissions([tmp_path], ["*.sql", line])


def test_character_classes_ignore_rather_too_much(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "[[:upper:]].py\n*.txt\n![[:upper:]].txt"})
    permissions = Permissions([tmp_path])
    assert not permissions.may_read(tmp_path / "A.py")
    assert not permissions.may_read(tmp_path / "A.txt")
    assert permissions.may_read(tmp_path / "AB.py")


def test_rules_that_cannot_be_read_hide_what_they_are_about(tmp_path: Path) -> None:
    os.mkfifo(write(tmp_path, {"a/b.py": "", "c.py": ""}) / "a/.gitignore")
    permissions = Permissions([tmp_path])
    assert not permissions.may_read(tmp_path / "a/b.py")
    assert permissions.may_read(tmp_path / "c.py")
    write(tmp_path, {".gitignore": "#" * (2 << 20)})
    assert not permissions.may_read(tmp_path / "c.py")

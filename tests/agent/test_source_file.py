import os
from pathlib import Path

import pytest

from agent import source_file
from agent.errors import InputError


@pytest.fixture
def crlf(tmp_path: Path) -> source_file.SourceFile:
    path = tmp_path / "a.py"
    path.write_bytes("é = 1\r\n\u2028x\ry\n".encode())
    return source_file.read(path)


def test_places(crlf: source_file.SourceFile) -> None:
    assert crlf.split_at(1, 1) == ("", crlf.text)
    assert crlf.split_at(1, 6) == ("é = 1", "\r\n\u2028x\ry\n")
    assert crlf.split_at(2, 2)[0].endswith("\u2028")
    assert crlf.split_at(3, 2)[1] == "\n"
    assert crlf.split_at(4, 1) == (crlf.text, "")
    assert crlf.language == "python"


@pytest.mark.parametrize(("line", "column"), [(0, 1), (5, 1), (1, 0), (1, 7), (4, 2)])
def test_places_outside(crlf: source_file.SourceFile, line: int, column: int) -> None:
    with pytest.raises(InputError, match="count from 1"):
        crlf.split_at(line, column)


def test_lines(crlf: source_file.SourceFile) -> None:
    assert crlf.lines(2, 3) == "\u2028x\ny"
    for start, end in [(0, 1), (3, 2), (1, 9)]:
        with pytest.raises(InputError):
            crlf.lines(start, end)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    binary, latin, folder = tmp_path / "b", tmp_path / "l", tmp_path
    binary.write_bytes(b"a\0b")
    latin.write_bytes(b"caf\xe9")
    for path, said in [
        (binary, "binary"),
        (latin, "UTF-8"),
        (folder, "directory"),
        (tmp_path / "none", "No such file"),
    ]:
        with pytest.raises(InputError, match=said) as caught:
            source_file.read(path)
        assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="device or a pipe"):
            source_file.read(path)


def test_arguments(tmp_path: Path) -> None:
    assert source_file.parse_place("a:b.py:3:4") == (Path("a:b.py"), 3, 4)
    assert source_file.parse_span("a.py") == (Path("a.py"), None, None)
    assert source_file.parse_span("a.py:3") == (Path("a.py"), 3, None)
    assert source_file.parse_span("a.py:3-5") == (Path("a.py"), 3, 5)
    odd = tmp_path / "a:3"
    odd.write_text("")
    assert source_file.parse_span(str(odd)) == (odd, None, None)
    for wrong in ["a.py", "a.py:3", "a.py:x:y", ":1:1", "a.py:" + "1" * 5000 + ":1"]:
        with pytest.raises(InputError):
            source_file.parse_place(wrong)

import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent import fim
from agent.fim import FORMATS, Piece
from agent.types import Snippet
from tests.fakes import SPECIALS

GOLDEN = tomllib.loads((Path(__file__).parents[1] / "golden" / "fim.toml").read_text(encoding="utf-8"))


def shown(pieces: Sequence[Piece]) -> str:
    return "".join(f"«{piece.text}»" if piece.special else piece.text for piece in pieces)


@pytest.mark.parametrize("kind", ["plain", "context"])
@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_golden(name: str, kind: str) -> None:
    given = GOLDEN["input"]
    snippets = [Snippet(given["snippet_path"], given["snippet"])] if kind == "context" else []
    pieces = fim.render(
        FORMATS.get(name),
        head=given["head"],
        live=given["live"],
        suffix=given["suffix"],
        path=given["path"],
        repository=given["repository"],
        snippets=snippets,
    )
    assert shown(pieces) == GOLDEN[kind][name]
    assert pieces[-1] == Piece(given["live"])


def test_every_format_has_its_golden_cases() -> None:
    assert set(GOLDEN["plain"]) == set(GOLDEN["context"]) == {*FORMATS, "none"}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_sentinels_in_the_users_text_stay_text(fmt: fim.FimFormat) -> None:
    nasty = "".join(fmt.sentinels()) + "".join(fmt.stops)
    pieces = fim.render(
        fmt, head=nasty, live=nasty, suffix=nasty, path=nasty, repository=nasty, snippets=[Snippet(nasty, nasty)]
    )
    special = [piece.text for piece in pieces if piece.special]
    assert special
    assert all(text in fmt.sentinels() for text in special)
    assert all(not piece.special for piece in pieces if nasty in piece.text)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_format_is_found_by_its_vocabulary(fmt: fim.FimFormat) -> None:
    found = fim.detect(set(fmt.sentinels()))
    assert found is not None
    assert found.sentinels() == fmt.sentinels()


def test_a_vocabulary_without_sentinels_has_no_format() -> None:
    assert fim.detect({"the", "a"}) is None
    assert fim.detect(SPECIALS) is FORMATS["qwen"]

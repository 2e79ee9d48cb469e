"""What is known of the rest of a workspace, and when it is looked at again."""

from pathlib import Path

from agent.types import Snippet
from lsp.documents import Change, Document, Place, Units
from lsp.elsewhere import Edits, Elsewhere, path_of
from tests.fakes import FakeClock

CALLER = "from helpers import total\n\n\nprint(total(\n"


def opened(path: Path, text: str) -> Document:
    return Document.opened(path.as_uri(), "python", 1, text, Units.UTF16)


async def found(
    elsewhere: Elsewhere,
    document: Document,
    root: Path,
    *others: Document,
    line: int = 3,
    exclude: tuple[str, ...] = (),
) -> tuple[Snippet, ...]:
    place = Place(line, 0)
    return await elsewhere.snippets(
        document, place, roots=[root.as_uri()], exclude=exclude, others=[document, *others], budget_chars=4000
    )


async def test_declarations_of_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def total(values: list[int]) -> int:\n    return sum(values)\n")
    document = opened(tmp_path / "main.py", CALLER)
    (snippet,) = await found(Elsewhere(), document, tmp_path)
    assert snippet.path == "helpers.py"
    assert "def total(values: list[int]) -> int" in snippet.text


async def test_what_is_excluded_stays_out_and_what_is_open_counts_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def total():\n    return 0\n")
    document = opened(tmp_path / "main.py", CALLER)
    unsaved = opened(tmp_path / "helpers.py", "def total(a, b):\n    return a + b\n")
    snippets = await found(Elsewhere(), document, tmp_path, unsaved)
    assert "def total(a, b)" in snippets[-1].text
    assert not any("def total()" in snippet.text for snippet in snippets)
    assert await found(Elsewhere(), document, tmp_path, unsaved, exclude=("helpers.py",)) == ()


async def test_a_pattern_that_is_none_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def total():\n    return 0\n")
    document = opened(tmp_path / "main.py", CALLER)
    assert await found(Elsewhere(), document, tmp_path, exclude=("!",)) == ()


async def test_a_choice_stands_near_its_place_and_for_a_while(tmp_path: Path) -> None:
    clock = FakeClock()
    elsewhere = Elsewhere(clock)
    helpers = tmp_path / "helpers.py"
    helpers.write_text("def total(first):\n    return first\n")
    document = opened(tmp_path / "main.py", CALLER + "\n" * 100)
    before = await found(elsewhere, document, tmp_path)
    helpers.write_text("def total(second, third):\n    return second\n")
    assert await found(elsewhere, document, tmp_path, line=60) == before
    (far,) = await found(elsewhere, document, tmp_path, line=70)
    assert "second" in far.text
    helpers.write_text("def total(a_fourth_one):\n    return a_fourth_one\n")
    clock.now += 301
    (late,) = await found(elsewhere, document, tmp_path, line=70)
    assert "a_fourth_one" in late.text


async def test_files_that_were_closed_are_looked_through(tmp_path: Path) -> None:
    body = "def shipping_cost(parcel, country):\n    weight = parcel.weight_kg\n    return tariff[country] * weight\n"
    (tmp_path / "prices.py").write_text(body + "\n" * 30)
    document = opened(tmp_path / "main.py", "def invoice(parcel, country, tariff):\n    weight_kg = parcel.weight_kg\n")
    elsewhere = Elsewhere()
    assert await found(elsewhere, document, tmp_path, line=1) == ()
    elsewhere = Elsewhere()
    elsewhere.closed((tmp_path / "prices.py").as_uri())
    (snippet,) = await found(elsewhere, document, tmp_path, line=1)
    assert snippet.path == "prices.py"


async def test_what_is_no_file_has_no_surroundings(tmp_path: Path) -> None:
    document = Document.opened("untitled:one", "python", 1, CALLER, Units.UTF16)
    assert await found(Elsewhere(), document, tmp_path) == ()
    assert path_of("file://elsewhere.example/a.py") is None
    assert path_of("file:///a%20b.py") == Path("/a b.py")


def test_edits_that_lie_close_are_one() -> None:
    edits = Edits()
    document = Document.opened("file:///a.py", "python", 1, "\n".join(f"line{n}" for n in range(60)), Units.UTF16)
    for line in (10, 12, 11):
        document = document.changed(document.version + 1, [Change("new ", (line, 0), (line, 0))])
        edits.note(document, line, line)
    document = document.changed(9, [Change("a\nb\n", (11, 0), (11, 0))])
    edits.note(document, 11, 13)
    (edit,) = edits.latest()
    assert (edit.first, edit.last) == (10, 14)
    assert edit.text.splitlines()[0] == "line8"
    assert "new line12" in edit.text
    assert edit.text.splitlines()[-1] == "line14"
    document = document.changed(10, [Change("far ", (40, 0), (40, 0))])
    edits.note(document, 40, 40)
    assert [each.first for each in edits.latest()] == [10, 40]


def test_the_oldest_edits_are_forgotten() -> None:
    edits = Edits()
    document = Document.opened("file:///a.py", "python", 1, "x\n" * 400, Units.UTF16)
    for line in range(0, 400, 20):
        edits.note(document, line, line)
    assert [each.first for each in edits.latest()] == list(range(240, 400, 20))


def test_what_was_typed_over_and_what_was_closed_is_no_edit_any_more() -> None:
    edits = Edits()
    text = "".join(f"line{n}\n" for n in range(60))
    document = Document.opened("file:///a.py", "python", 1, text, Units.UTF16)
    document = document.changed(2, [Change("secret ", (10, 0), (10, 0))])
    edits.note(document, 10, 10)
    document = document.changed(3, [Change("far ", (40, 0), (40, 0))])
    edits.note(document, 40, 40)
    document = document.changed(4, [Change("", (10, 0), (10, 7))])
    edits.note(document, 10, 10)
    assert not any("secret" in each.text for each in edits.latest())
    assert [each.first for each in edits.latest()] == [40, 10]
    edits.forget("file:///a.py")
    assert edits.latest() == ()


async def test_what_is_excluded_later_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("def total():\n    return 0\n")
    document, other = opened(tmp_path / "main.py", CALLER), opened(tmp_path / "other.py", "x = 1\n\n\n\n")
    elsewhere = Elsewhere()
    assert len(await found(elsewhere, document, tmp_path)) == 1
    await found(elsewhere, other, tmp_path, exclude=("helpers.py",))
    assert await found(elsewhere, document, tmp_path, exclude=("helpers.py",)) == ()

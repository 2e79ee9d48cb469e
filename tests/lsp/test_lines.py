"""Lines in blocks behave like a tuple of lines."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lsp.lines import Lines

SIZES = st.sampled_from([0, 1, 2, 255, 256, 257, 512, 513, 1500])


@settings(max_examples=300)
@given(size=SIZES, edits=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), SIZES), max_size=6))
def test_replacing_lines_is_what_a_tuple_does(size: int, edits: list[tuple[float, float, int]]) -> None:
    wanted = tuple(map(str, range(size)))
    lines = Lines(wanted)
    for number, (one, other, count) in enumerate(edits):
        first, end = sorted((int(one * len(wanted)), int(other * len(wanted))))
        new = [f"{number}.{index}" for index in range(count)]
        before, kept = lines, wanted
        lines, wanted = lines.replaced(first, end, new), (*wanted[:first], *new, *wanted[end:])
        assert tuple(before) == kept
        assert len(lines) == len(wanted)
        assert tuple(lines) == wanted
        assert lines[first : first + 300] == wanted[first : first + 300]
        assert lines[::-1] == wanted[::-1]
        if wanted:
            assert (lines[0], lines[-1], lines[first % len(wanted)]) == (
                wanted[0],
                wanted[-1],
                wanted[first % len(wanted)],
            )


def test_beyond_the_end_is_an_error() -> None:
    lines = Lines(["a"])
    for number in (1, -2):
        try:
            lines[number]
        except IndexError as error:
            assert f"line {number} of 1" in str(error)  # noqa: PT017
        else:
            raise AssertionError

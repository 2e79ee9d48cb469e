"""Fill-in-the-middle formats: a table, and `render`, the only place that writes sentinels.

A prompt is a tuple of pieces. Only pieces that are marked as sentinels may become special tokens; text of the user's is
tokenised as plain text, whatever it looks like. Knows no tokenizer: whoever loads a model checks that each sentinel is
exactly one token of it.

The layout is *line-anchored*: the middle begins at the start of the cursor's line, and the text of that line so far
(`live`) is given as the beginning of the answer. Typing at the end of a line then only appends to the prompt, and the
key-value cache up to there is kept. Source of the idea: EFIM, arXiv 2505.21889.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from agent.types import Snippet

PROMPT_FORMAT = "line-anchored-1"
"""Name and version of what `render` writes; it changes whenever the same input renders to something else."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt."""

    text: str
    special: bool = False
    """Whether it is a sentinel, to be tokenised as one special token."""


@dataclass(frozen=True, slots=True)
class FimFormat:
    """How one family of models wants to be asked for the middle of a text."""

    name: str
    prefix: str
    suffix: str
    middle: str
    """Empty where the prefix comes last and is simply continued."""
    stops: tuple[str, ...]
    """Special tokens at which an answer ends, besides the model's own end of text."""
    suffix_first: bool = False
    file: str = ""
    """Sentinel before the path of each file; empty where the model knows none."""
    repository: str = ""
    """Sentinel before the name of the repository."""
    prefix_pad: str = ""
    """Plain text between the prefix sentinel and the prefix."""

    def sentinels(self) -> tuple[str, ...]:
        """Return every special token that `render` may write."""
        written = (self.prefix, self.suffix, self.middle, self.file, self.repository)
        return tuple(sentinel for sentinel in written if sentinel)


def _same(name: str, opened: str, closed: str, *stops: str, **more: str) -> FimFormat:
    # Families whose three sentinels differ only in the word between the same marks.
    prefix, suffix, middle = (f"{opened}fim_{part}{closed}" for part in ("prefix", "suffix", "middle"))
    return FimFormat(name, prefix, suffix, middle, (*stops, prefix, suffix, middle), **more)  # type: ignore[arg-type]


SUFFIX = FimFormat("suffix", "<tabwise prefix>", "<tabwise suffix>", "<tabwise middle>", ())
"""For servers that are given prefix and suffix apart, and write the model's sentinels themselves. These have a blank, which
no token of a model's has: only the remote engine knows them, and none of them is ever sent."""

FORMATS = {
    fmt.name: fmt
    for fmt in (
        # Before qwen, since it has qwen's sentinels too and is told apart by its own name for the file's.
        _same("codegemma", "<|", "|>", "<|file_separator|>", "<eos>", "<end_of_turn>", file="<|file_separator|>"),
        _same(
            "qwen",
            "<|",
            "|>",
            "<|endoftext|>",
            "<|im_end|>",
            "<|fim_pad|>",
            "<|repo_name|>",
            "<|file_sep|>",
            file="<|file_sep|>",
            repository="<|repo_name|>",
        ),
        _same("starcoder2", "<", ">", "<|endoftext|>", "<file_sep>", file="<file_sep>"),
        FimFormat(
            "mellum",
            "<fim_prefix>",
            "<fim_suffix>",
            "<fim_middle>",
            ("<|endoftext|>", "<filename>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
            suffix_first=True,
            file="<filename>",
        ),
        _same("granite", "<", ">", "<|endoftext|>"),
        # The vocabulary's own words, "▁" standing for the space that belongs to the token.
        FimFormat("codellama", "▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",), prefix_pad=" "),
        FimFormat("deepseek", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜end▁of▁sentence｜>",)),
        FimFormat("codestral", "[PREFIX]", "[SUFFIX]", "", ("</s>",), suffix_first=True),
        FimFormat(
            "seed-coder",
            "<[fim-prefix]>",
            "<[fim-suffix]>",
            "<[fim-middle]>",
            ("<[end▁of▁sentence]>",),
            suffix_first=True,
        ),
        SUFFIX,
    )
}
"""The formats by name. Source: each model's card; the table of notes in ARCHITECTURE.md tells which were run."""


def detect(vocabulary: Container[str]) -> FimFormat | None:
    """Return the first format whose sentinels are all words of `vocabulary`; None where no format fits."""
    for fmt in FORMATS.values():
        if all(sentinel in vocabulary for sentinel in fmt.sentinels()):
            return fmt
    return None


def render(
    fmt: FimFormat | None,
    *,
    head: str,
    live: str,
    suffix: str,
    path: str = "",
    repository: str = "",
    snippets: Sequence[Snippet] = (),
) -> tuple[Piece, ...]:
    """Write the prompt for the text between `head + live` and `suffix`.

    Args:
        fmt: The model's format; None continues the prefix and leaves the suffix out.
        head: Lines above the cursor's line.
        live: Text on the cursor's line, before the cursor.
        suffix: Text behind the cursor.
        path: Path of the document, written where the format has a place for it and there are snippets.
        repository: Name of the workspace, likewise.
        snippets: Text from elsewhere, the most useful last.

    Returns:
        The pieces, in order. Live text is a piece of its own, always the last one.
    """
    context = _context(fmt, path, repository, snippets)
    if fmt is None:
        return (*context, Piece(head), Piece(live))
    before = (Piece(fmt.prefix, special=True), Piece(fmt.prefix_pad + head))
    behind = (Piece(fmt.suffix, special=True), Piece(suffix))
    middle = (Piece(fmt.middle, special=True),) if fmt.middle else ()
    ordered = (*behind, *before) if fmt.suffix_first else (*before, *behind)
    return (*context, *ordered, *middle, Piece(live))


def _context(fmt: FimFormat | None, path: str, repository: str, snippets: Sequence[Snippet]) -> tuple[Piece, ...]:
    if not snippets:
        return ()
    if fmt is None or not fmt.file:
        return tuple(Piece(snippet.text.rstrip("\n") + "\n\n") for snippet in snippets)
    pieces: list[Piece] = []
    if fmt.repository and repository:
        pieces += [Piece(fmt.repository, special=True), Piece(repository + "\n")]
    for snippet in snippets:
        pieces += [Piece(fmt.file, special=True), Piece(f"{snippet.path}\n{snippet.text.rstrip(chr(10))}\n")]
    return (*pieces, Piece(fmt.file, special=True), Piece(path + "\n"))

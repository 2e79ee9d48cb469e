"""The values that travel between editor, daemon and engine: frozen, and made of the standard library alone.

Knows nothing of HTTP, of LSP or of any engine. Text is Python text; positions are counted in characters of it.
Times are milliseconds, counts are tokens, as the suffixes of the names say.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class Trigger(StrEnum):
    """What asked for a completion."""

    AUTOMATIC = "automatic"
    """The editor, after a keystroke."""
    MANUAL = "manual"
    """The user, by a key or a command."""


class Source(StrEnum):
    """Where a completion's text came from."""

    ENGINE = "engine"


class StopReason(StrEnum):
    """Why a completion's text ends where it ends."""

    END = "end"
    """The model ended it by itself."""
    LINE = "line"
    """One line was asked for, and it is complete."""
    BLOCK = "block"
    """The next line leaves the block in which the cursor stands."""
    SUFFIX = "suffix"
    """The next line repeats what already stands behind the cursor."""
    REPETITION = "repetition"
    """The model began to repeat itself."""
    BUDGET = "budget"
    """The allowance of tokens or lines is spent."""
    CANCELLED = "cancelled"
    """Nobody wants the rest."""


@dataclass(frozen=True, slots=True)
class Document:
    """Which document, in which state, a request is about."""

    uri: str
    version: int
    path: str
    """Path as it is shown to the model, relative to the workspace where there is one."""
    language: str
    """LSP language identifier, "python" for example."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """Text from elsewhere that helps at the cursor: another cell of the notebook, for instance."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One question for a completion. Documents travel as windows around the cursor, never whole."""

    id: str
    document: Document
    prefix: str
    """Text before the cursor. Begins at the start of a line, and at the same one while the cursor moves little."""
    suffix: str
    """Text behind the cursor."""
    snippets: tuple[Snippet, ...] = ()
    trigger: Trigger = Trigger.AUTOMATIC
    anchor: int | None = None
    """Characters of `prefix` that stay put while the user types on; the start of the cursor's line if None."""
    activity_ms: int = 0
    """Time since the user's last keystroke, in any document of this editor."""
    multiline: bool | None = None
    """Whether several lines are wanted; decided from the text around the cursor if None."""
    max_tokens: int | None = None
    """Allowance of new tokens; the configured one if None. With 0 the prompt is only read into the cache."""
    brief: bool = False
    """Whether a short prompt will do: at a place that is new, reading a long one would take seconds."""
    impatient: bool = False
    """Whether a short prompt will do if most of the long one would have to be read first."""
    ahead: bool = False
    """Whether it is asked in advance, while nobody waits for it: it gives way to whatever else is asked."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a completion cost."""

    total_ms: float
    first_text_ms: float | None
    """Until the first text arrived; None where none did."""
    prefill_tokens: int
    """Prompt tokens that had to be computed."""
    cached_tokens: int
    """Prompt tokens that were still in the key-value cache."""
    decoded_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a `CompletionRequest`."""

    id: str
    text: str
    source: Source
    stop_reason: StopReason
    timing: Timing
    replaced_chars: int = 0
    """Characters right of the cursor, on its line, that the text stands in for (closers that the editor inserted)."""
    dropped_by: str | None = None
    """The filter that emptied the text, where one did."""
    settled: str = ""
    """The text before the filters that depend on the moment of showing: what a cache keeps."""
    beyond: str = ""
    """Whole lines that the engine wrote behind the end of `settled` before it was stopped."""
    brief: bool = False
    """Whether it was written from a short prompt."""
    adapter: str | None = None
    """Name of the adapter that it was written with; None for the bare model."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The facts of one generation, exactly as served: what feedback and training need to know later."""

    completion_id: str
    model: str
    model_sha256: str
    """Hash of the model's file; empty where it was never computed."""
    prompt_format: str
    """Name and version of the prompt layout."""
    adapter: str | None
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    output_logps: tuple[float, ...]
    """Log-probability of each output token in nats, as the model gave it before sampling."""
    exact: bool
    """False where an engine could not name every token it produced, and ids were recovered from the text."""


@dataclass(frozen=True, slots=True)
class ExplanationRequest:
    """One question for an explanation of a piece of code."""

    id: str
    path: str
    language: str
    """LSP language identifier of the code."""
    code: str
    answer_language: str = "English"
    """The human language of the answer, by its English name or its ISO 639-1 code."""
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat to be continued by the model."""

    messages: tuple[Message, ...]
    opening: str = ""
    """Text with which the answer must begin."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A finished explanation."""

    id: str
    markdown: str
    stop_reason: StopReason
    timing: Timing
    model: str = field(default="")
    adapter: str | None = None
    """Name of the adapter that it was written with; None for the bare model."""

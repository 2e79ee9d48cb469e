"""Text as a model's tokens and back, byte for byte, from a tokenizer of the tokenizers library.

What libraries do for convenience is undone here. Text stands as it is: no blank is put in front of it, and nothing is
normalised, so that the tokens of the pieces of a prompt are those of the whole and stand for exactly its text (but for
U+2581, which is how sentencepiece writes a blank, and cannot be told from one). Text of
the user's never becomes a special token, also where a model's files forgot to call its sentinels special (Qwen's do):
whatever looks like markup among the tokens that were added to a vocabulary counts as special.
"""

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from agent.engines.base import Alternative, Decoded, Token
from agent.engines.sampling import Choice
from agent.errors import ModelCorruptError
from agent.types import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKUP = re.compile(r"▁?(<\S*[^\W\d_]\S*>|\[\S*[^\W\d_]\S*\])")
"""`<|fim_prefix|>`, `▁<PRE>`, `[INST]`; not the runs of blanks that some models add to their vocabulary."""
_CHANGES_TEXT = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Prepend", "Strip", "Lowercase", "StripAccents"})
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece writes a byte that no piece has
_END_WORDS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|file_separator|>",
    "<end_of_turn>",
    "<eos>",
    "</s>",
    "▁<EOT>",
    "<｜end▁of▁sentence｜>",
    "<[end▁of▁sentence]>",
)
"""Tokens that end a text, whatever a model's settings name: those of chat models end a turn, of base models a document,
and both kinds may write either. Source: the models' cards."""


class Vocabulary:
    """The tokens of one model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", name: str, end_ids: Iterable[int] = ()) -> None:
        """Understand a tokenizer.

        Args:
            tokenizer: As transformers loads it.
            name: The model's name, for errors.
            end_ids: Tokens that end a text by the model's own settings.

        Raises:
            ModelCorruptError: It is not one of the tokenizers library.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelCorruptError(f"{name} has no tokenizer.json that can be read; pull or copy the model again")
        facts = _unchanging(json.loads(backend.to_str()))
        added = facts["added_tokens"]
        control = [each for each in added if each["special"] or _MARKUP.fullmatch(each["content"])]
        self._spelled = Tokenizer.from_str(json.dumps(facts))
        kept = [each for each in added if each not in control]
        self._plain = Tokenizer.from_str(json.dumps(facts | {"added_tokens": kept}))
        self._added: dict[int, str] = {each["id"]: each["content"] for each in added}
        self._control: set[int] = {each["id"] for each in control}
        self._unknown_id = tokenizer.unk_token_id  # what no token stands for; harmless where it comes from
        self._byte_of = _byte_alphabet() if _is_byte_level(facts) else None
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self._template = tokenizer
        ends = {self._spelled.token_to_id(word) for word in _END_WORDS} & self._control
        named = {*end_ids, tokenizer.eos_token_id, *ends}
        self.end_ids = frozenset(one for one in named if isinstance(one, int))
        """Tokens that end a text."""
        self.start_ids = _start_ids(tokenizer)
        """Tokens with which every prompt begins."""
        self.blank_id: int = min((*self.start_ids, *self.end_ids), default=0)
        """The token that stands in for a prompt without any: what stands between two texts in training."""

    def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`; words that name special tokens become these only if `special`."""
        ids = self._spelled.encode(text, add_special_tokens=False).ids if special else self._plain_ids(text)
        return [Token(one, self._text_of(one)) for one in ids]

    def _plain_ids(self, text: str) -> list[int]:
        found = self._plain.encode(text, add_special_tokens=False)
        for one, (start, end) in zip(found.ids, found.offsets, strict=True):
            if one in self._control and one != self._unknown_id and end - start > 1:
                # The word is in the vocabulary itself, too: cut within it, no token can span it.
                return self._plain_ids(text[: start + 1]) + self._plain_ids(text[start + 1 :])
        ids: list[int] = found.ids
        return ids

    def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template; contents never become special tokens."""
        # The template sees marks in place of the contents, so that only its own text is tokenised with special tokens.
        mark = secrets.token_hex(8)
        marks = [f"<{mark}:{index}>" for index in range(len(chat.messages))]
        rest = self._framed([replace(turn, content=each) for turn, each in zip(chat.messages, marks, strict=True)])
        ids: list[int] = []
        for turn, placeholder in zip(chat.messages, marks, strict=True):
            frame, _, rest = rest.partition(placeholder)
            ids += self._spelled.encode(frame, add_special_tokens=False).ids
            ids += self._plain_ids(turn.content)
        ids += self._spelled.encode(rest, add_special_tokens=False).ids
        return (*ids, *self._plain_ids(chat.opening))

    def _framed(self, turns: Sequence[Message]) -> str:
        if not self._template.chat_template:
            return "".join(f"{turn.content}\n\n" for turn in turns)  # a base model: it can only be given text
        try:
            return self._templated(turns)
        except Exception:  # a template's own refusal, of a class that belongs to jinja
            # Many templates know no system turn; its text then stands at the head of the first question.
            if len(turns) < 2 or turns[0].role != "system":
                raise
            head, first, *more = turns
            return self._templated([replace(first, content=f"{head.content}\n\n{first.content}"), *more])

    def _templated(self, turns: Sequence[Message]) -> str:
        conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(self._template.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def bytes_of(self, one: int) -> bytes:
        """Return the bytes that a token stands for in a text; none for special tokens."""
        if one not in self._bytes:
            self._bytes[one] = b"" if one in self._control else self._spelling(one)
        return self._bytes[one]

    def shown(self, one: int) -> str:
        """Return as much of a token's text as is text."""
        return self.bytes_of(one).decode("utf-8", errors="ignore")

    def _text_of(self, one: int) -> str | None:
        if one not in self._texts:
            try:
                self._texts[one] = self._spelling(one).decode("utf-8")
            except UnicodeDecodeError:
                self._texts[one] = None
        return self._texts[one]

    def _spelling(self, one: int) -> bytes:
        if one in self._added:
            return self._added[one].encode()
        piece = self._spelled.id_to_token(one)
        if piece is None:  # a row of the model's that no token uses
            return b""
        if self._byte_of is not None:
            return bytes(self._byte_of[character] for character in piece)
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()


class Spelling:
    """Tokens as they are chosen, told once their text is complete: a character may take several."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Begin a text."""
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._held: list[Choice] = []

    def add(self, choice: Choice) -> Decoded | None:
        """Return what can be told now; None while the text ends within a character."""
        self._held.append(choice)
        self._text += self._decoder.decode(self._vocabulary.bytes_of(choice.id))
        pending, _ = self._decoder.getstate()
        return None if pending else self.rest()

    def rest(self) -> Decoded | None:
        """Return what was not told yet; bytes of a character that never came to its end are left out of its text."""
        if not self._held:
            return None
        held, text = self._held, self._text
        self._held, self._text = [], ""
        # Who does not want this token looks at what else might have stood in the place of the first.
        alternatives = tuple(Alternative(one, self._vocabulary.shown(one), logp) for one, logp in held[0].alternatives)
        return Decoded(text, tuple(each.id for each in held), tuple(each.logp for each in held), alternatives)


def _start_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    begins = tokenizer.encode("", add_special_tokens=True)[:1]
    return tuple(begins) if begins == [tokenizer.bos_token_id] else ()


def _unchanging(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's description without what would change a text."""

    def mended(part: Any) -> Any:
        if isinstance(part, list):
            return [better for each in part if (better := mended(each)) is not None]
        if not isinstance(part, dict):
            return part
        if part.get("type") in _CHANGES_TEXT:
            return None
        changed = {key: mended(value) for key, value in part.items()}
        if changed.get("type") == "Metaspace":
            changed["prepend_scheme"] = "never"
        if changed.get("type") == "ByteLevel":
            changed["add_prefix_space"] = False
        return changed

    steps = {key: mended(facts.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return facts | steps | {"post_processor": None, "truncation": None, "padding": None}


def _is_byte_level(facts: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([facts.get("decoder"), facts.get("pre_tokenizer")])


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character stands for in a byte-level vocabulary.

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from 256 on, in order.
    Source: the tokenizer of GPT-2 (Radford et al., 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}

"""Token healing: a cursor in the middle of a word falls into the middle of a token, and models write badly from there.

The last tokens of the text before the cursor are left out of the prompt, and the answer must begin with their text. Pure:
decides over tokens and texts, runs nothing. Source: notes on token healing in the guidance project.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from agent.engines.base import Alternative, Token

N_ALTERNATIVES = 40
"""Likeliest tokens among which a way to the wanted beginning is looked for; it is nearly always in the first ten."""
_WORD_TOKENS = 4  # a longer word is a name of the user's own, which the model would hardly write again by itself
_LAST_WORD = re.compile(r"[ ]?\w+$")


@dataclass(frozen=True, slots=True)
class Healed:
    """A prompt's end with its last tokens taken back."""

    kept_ids: tuple[int, ...]
    wanted: str
    """Text with which the answer must begin; empty where nothing was taken back."""


def candidates(live: Sequence[Token]) -> tuple[Healed, ...]:
    """Return what to take back of the live text, the most promising first.

    The whole word before the cursor with the blank in front of it, which is often one token (" return" is, " retur" is
    not); then the last token alone.
    """
    backs = [n for n in (_word_tokens(live), 1) if 0 < n <= len(live)]
    found = []
    for n in dict.fromkeys(backs):
        texts = [token.text for token in live[-n:]]
        if all(text is not None for text in texts):
            kept = tuple(token.id for token in live[:-n])
            found.append(Healed(kept, "".join(text or "" for text in texts)))
    return tuple(found)


def _word_tokens(live: Sequence[Token]) -> int:
    # How many tokens the word at the end takes, with the blank before it; 0 where there is none or it is long.
    text = "".join(token.text or "\0" for token in live)
    word = _LAST_WORD.search(text)
    if word is None:
        return 0
    length = 0
    for n in range(1, min(_WORD_TOKENS, len(live)) + 1):
        length += len(live[-n].text or "\0")
        if length >= len(word[0]):
            return n
    return 0


def fits(text: str, wanted: str) -> bool:
    """Tell whether an answer that begins with `text` can still begin with `wanted`, or does so already."""
    return text.startswith(wanted) or wanted.startswith(text)


def way_to(wanted: str, so_far: str, alternatives: Sequence[Alternative]) -> Alternative | None:
    """Return the likeliest next token with which the answer can begin with `wanted`; None where there is none.

    Args:
        wanted: Text with which the answer must begin.
        so_far: What was written already; fits `wanted`.
        alternatives: Candidates for the next token, likeliest first.
    """
    return next((token for token in alternatives if token.text and fits(so_far + token.text, wanted)), None)

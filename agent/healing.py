"""Token healing: a cursor in the middle of a word falls into the middle of a token, and models write badly from there.

The last token of the text before the cursor is left out of the prompt, and the answer must begin with its text. Pure:
decides over tokens and texts, runs nothing. Source: notes on token healing in the guidance project.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.engines.base import Alternative, Token

N_ALTERNATIVES = 40
"""Likeliest tokens among which a way to the wanted beginning is looked for; it is nearly always in the first ten."""


@dataclass(frozen=True, slots=True)
class Healed:
    """A prompt's end with its last token taken back."""

    kept_ids: tuple[int, ...]
    wanted: str
    """Text with which the answer must begin; empty where nothing was taken back."""


def take_back(live: Sequence[Token]) -> Healed:
    """Take the last token of the live text back."""
    ids = tuple(token.id for token in live)
    if not live or live[-1].text is None:
        return Healed(ids, "")
    return Healed(ids[:-1], live[-1].text)


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

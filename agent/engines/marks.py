"""Texts that a model's tokenizer takes for special tokens, and how they are kept from it in text of the user's.

An engine that hands over token ids needs none of this. A server that tokenises text itself takes every mark in it for the
special token, whoever wrote it; there a mark is broken first. Pure: knows shapes of marks, no model's list of them.
"""

import re

_TOKEN = re.compile(r"\s*(?:<\S*\w\S*>|\[/?[A-Z]+(?:_[A-Z]+)*\])\s*")
_SHAPES = re.compile(
    r"""
      <\|(?=[^\s|<>]{1,64}\|>)            # <|im_end|>, <|fim_prefix|>: Qwen, Llama, Phi, CodeGemma, Granite
    | <｜(?=[^\s｜<>]{1,64}｜>)            # <｜fim▁begin｜>: DeepSeek
    | <\[(?=[^\s\[\]<>]{1,64}\]>)         # <[fim-prefix]>: Seed-Coder
    | <(?=[a-z]+(?:_[a-z]+)+>)            # <fim_prefix>, <file_sep>, <start_of_turn>: no language's tags look so
    | <(?=/?(?:s|unk|bos|eos|pad|filename|reponame)>)
    | <(?=(?:PRE|SUF|MID|EOT|EOD|END)>)   # CodeLlama
    | \[(?=/?[A-Z]+(?:_[A-Z]+)*\])        # [INST], [SUFFIX], [TOOL_CALLS]: Mistral
    """,
    re.VERBOSE,
)


def may_be_special(token: str) -> bool:
    """Tell whether one token's text looks like a mark. Some are ordinary tokens; breaking those does no harm."""
    return _TOKEN.fullmatch(token) is not None


def parts(text: str, mark: str) -> list[str]:
    """Cut `text` within each `mark` in it, behind the mark's first character; joined, they are `text` again."""
    mark = mark.strip()
    found, place = [], 0
    while (at := text.find(mark, place)) >= 0:
        found.append(text[place : at + 1])
        place = at + 1
    return [*found, text[place:]]


def broken(text: str) -> str:
    """Return `text` with a blank within everything that some model's template may take for a mark."""
    return _SHAPES.sub(lambda found: found.group() + " ", text)

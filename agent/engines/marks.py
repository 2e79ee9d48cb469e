"""Texts that a model's tokenizer takes for special tokens, and how they are kept from it in text of the user's.

An engine that hands over token ids needs none of this. A server that tokenises text itself takes every mark in it for the
special token, whoever wrote it; there a mark is broken first. Pure: knows marks of the models that write code, by name, and
no tokenizer. What it cannot know: marks of a model that came later, which reach a server of text as they stand.
"""

import re

_TOKEN = re.compile(r"\s*(?:<\S*\w\S*>|\[/?[A-Z]+(?:_[A-Z]+)*\])\s*")
_ANGLED = (
    *(f"fim{sign}{part}" for sign in "_-" for part in ("prefix", "suffix", "middle", "pad")),
    *("file_sep", "filename", "repo_name", "reponame", "gh_stars", "empty_output"),
    *(f"issue_{part}" for part in ("start", "comment", "closed")),
    *(f"jupyter_{part}" for part in ("start", "text", "code", "output", "script")),
    *(f"commit_{part}" for part in ("before", "msg", "after")),
    *("start_of_turn", "end_of_turn", "start_of_image", "end_of_image"),
    *("tool_call", "/tool_call", "tool_response", "/tool_response"),
    *("PRE", "SUF", "MID", "EOT"),
    *("s", "/s", "unk", "bos", "eos", "pad"),
)
"""Of StarCoder and those that took its marks, Gemma, Qwen, CodeLlama, and sentencepiece. Named one by one: types' arguments
in C++, Rust, Java and TypeScript have every shape that these have."""
_BRACKETED = (
    *("INST", "/INST", "SYSTEM_PROMPT", "/SYSTEM_PROMPT", "PREFIX", "SUFFIX", "MIDDLE"),
    *("AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "/TOOL_RESULTS", "TOOL_CONTENT"),
)
"""Of Mistral and Codestral; an index in capitals has their shape."""
_MARKS = re.compile(
    rf"""
      <\|(?=[^\s|<>]{{1,64}}\|>)            # <|im_end|>, <|fim_prefix|>: Qwen, Llama, Phi, CodeGemma, Granite
    | <｜(?=[^\s｜<>]{{1,64}}｜>)            # <｜fim▁begin｜>: DeepSeek
    | <(?=\[(?:fim-[a-z]+|[a-z]+▁of▁[a-z]+)\]>)  # <[fim-prefix]>: Seed-Coder; not Rust's Box<[u8]>
    | <(?=(?:{"|".join(map(re.escape, _ANGLED))})>)
    | \[(?=(?:{"|".join(map(re.escape, _BRACKETED))})\])
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
    return _MARKS.sub(lambda found: found.group() + " ", text)

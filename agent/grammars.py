"""tree-sitter's grammars, one for each language that Tabwise parses.

Knows nothing of what the trees are used for. A grammar is loaded when its language is first asked for. The grammars come
as wheels of their own, so that nothing is downloaded at run time.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tree_sitter

_GRAMMARS = {
    "python": ("tree_sitter_python", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "javascriptreact": ("tree_sitter_javascript", "language"),  # that grammar knows JSX
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "typescriptreact": ("tree_sitter_typescript", "language_tsx"),
    "java": ("tree_sitter_java", "language"),
    "go": ("tree_sitter_go", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
}
"""LSP language identifier -> module of the grammar, and the function in it that gives the grammar."""


def parser(language: str) -> "tree_sitter.Parser | None":
    """Return a parser for a language, None where there is no grammar for it.

    Each call returns a parser of its own, since a parser must not be used by two threads at once; only grammars are
    kept.

    Args:
        language: LSP language identifier, "python" for example.
    """
    if language not in _GRAMMARS:
        return None
    from tree_sitter import Parser

    return Parser(_grammar(language))


@cache
def _grammar(language: str) -> "tree_sitter.Language":
    from tree_sitter import Language

    module, function = _GRAMMARS[language]
    return Language(getattr(import_module(module), function)())

"""Whether one line or several are wanted at a cursor, by the grammar of the language.

Several lines are wanted where a block begins, or at the open end of one; never within brackets of another kind, strings
and comments. This stands on the way of each keystroke: what the text alone decides is decided first, and only a piece
near the cursor is parsed. The text up to the cursor leaves brackets open, and trees of such text are mostly errors; so
it is parsed once to find what is open, and, where that matters, once more with all of it closed, which tells what kind
of bracket the innermost one is.

Knows no prompts, and nothing of languages without a grammar: `context.wants_block` goes by indentation there.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent import grammars
from agent.context import indent_of, normal_newlines

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

_CHARS_BEFORE = 5000
"""Holds the function around the cursor nearly always; both parses together take one to two milliseconds."""
_CHARS_BEHIND = 2000
"""Of the suffix only the rest of the line and the next filled line are looked at."""

_BRACKETS = {"(": ")", "[": "]", "{": "}", "${": "}"}
_STRINGS = {"string_start": "string_end", 'R"': '"', 'L"': '"', 'u"': '"', 'U"': '"', 'u8"': '"'} | {
    mark: mark for mark in ('"', "'", "`", '"""')
}
"""Openers of strings, as the grammars call them -> what closes them."""
_CLOSING = _BRACKETS | _STRINGS
_LONG_STRINGS = {"`", '"""', 'R"'}
"""These may go on over several lines, in every language that has them."""
_CLOSERS_ONLY = re.compile(r"""[)>}\]"'`]+[ \t]*[:{;,]?""")

_START = re.compile(r"^([ \t]*)(?=[\w@\"'#/&<$~!-])", re.MULTILINE)
"""The indentation of a line that may begin a statement: no closer, no line of a starred comment."""
_DEFINITION = re.compile(
    r"(?:@|#\[|(?:async|class|def|export|fn|func|function|impl|import|interface|mod|namespace|private|protected|pub|public|"
    r"static|struct|template|type|use|void)\b)"
)
_LABEL = re.compile(r"\s*(?:case\b.*|default\s*|(?:public|private|protected)(?:\s+\w+)?\s*):$")
_ENDS_BODY = re.compile(r"\s*(?:return|raise|throw|break|continue)\b")
_PYTHON_CLAUSE = re.compile(r"\s*(?:async|class|def|if|elif|else|for|while|try|except|finally|with|match|case)\b")
_TEXT = re.compile("string|comment|regex|template|char")
"""Found in the names of nodes whose content is no code."""

_BLOCKS = set(
    "block statement_block compound_statement class_body class_static_block interface_body enum_body module_body "
    "annotation_type_body constructor_body switch_body switch_block expression_switch_statement type_switch_statement "
    "select_statement interface_type declaration_list field_declaration_list enum_variant_list enumerator_list match_block "
    "requirement_seq macro_definition".split()
)
"""Nodes whose braces hold statements or declarations. All others are literals, patterns, lists of imports."""
_VARIABLES = {"identifier", "array_declarator"}
"""Declarators of C++ without parameters."""
_LISTS = set("enum_variant_list enumerator_list match_block field_declaration_list enum_body interface_body".split())
"""Blocks in which a comma ends a line."""
_PYTHON_HEADERS = set(
    "function_definition class_definition if_statement elif_clause else_clause for_statement while_statement try_statement "
    "except_clause except_group_clause finally_clause with_statement match_statement case_clause".split()
)
_BEFORE_BLOCK = set(") => -> | { } ; else do try finally loop unsafe const noexcept".split())
_BEFORE_LITERAL = set("= := == ( [ , : ? && || ?? return import export yield".split())
_NO_SEMICOLONS = {"javascript", "javascriptreact", "typescript", "typescriptreact", "go", "python"}
"""Languages in which the end of a line may end a statement."""
_ENDS_STATEMENT = set(") ] } \" ' ` ++ -- ! > / string_end ...".split())
"""Marks that stand at such ends; ">" and "/" end JSX and regular expressions."""
_HEADERS = {"if_statement", "while_statement", "for_statement", "for_in_statement"}


@dataclass(frozen=True, slots=True)
class _Open:
    kind: str
    """The bracket or the quotation mark, as the grammar calls it."""
    byte: int
    row: int
    is_long: bool
    """Whether it is a string that may go on over several lines."""

    @property
    def is_string(self) -> bool:
        return self.kind in _STRINGS


def wants_block(language: str, prefix: str, suffix: str) -> bool | None:
    """Tell whether several lines fit at the cursor.

    Args:
        language: LSP language identifier, "python" for example.
        prefix: Text before the cursor.
        suffix: Text behind the cursor.

    Returns:
        None where there is no grammar for the language, or the tree does not tell.
    """
    parser = grammars.parser(language)
    if parser is None:
        return None
    text = normal_newlines(prefix[-_CHARS_BEFORE:])
    rest, _, below = normal_newlines(suffix[:_CHARS_BEHIND]).partition("\n")
    line = text.rpartition("\n")[2]
    if rest.strip() and not _CLOSERS_ONLY.fullmatch(rest.strip()):
        return False
    if not _may_begin(text, line) or (not rest.strip() and _goes_on(line, below)):
        return False
    is_whole = len(prefix) <= _CHARS_BEFORE
    piece = text if is_whole else _from_line_start(text)
    if language == "python":
        return _in_python(parser, piece, line)
    return _in_braces(parser, piece, line, language, is_whole=is_whole)


def _may_begin(text: str, line: str) -> bool:
    # What the text alone rules out: nearly every keystroke ends here.
    if line.strip():
        return line.rstrip().endswith((":", "{"))
    above = next((row for row in reversed(text.split("\n")[:-1]) if row.strip()), "")
    # In the first column a new definition would run on without end; behind a return there is nothing to say.
    is_over = _ENDS_BODY.match(above) and indent_of(above) == indent_of(line)
    return bool(line) and not is_over and not above.endswith("\\")


def _goes_on(line: str, below: str) -> bool:
    # Whether more of the same body stands below the cursor: then one line fits between.
    following = next((row for row in below.split("\n") if row.strip()), "")
    if not following or following.lstrip()[0] in ")]}":
        return False
    return indent_of(following) >= indent_of(line) + bool(line.strip())


def _from_line_start(text: str) -> str:
    # One of the least indented lines, a definition if possible, is least likely to lie within a string or a comment.
    starts = list(_START.finditer(text, text.find("\n") + 1, text.rfind("\n") + 1))
    least = min((indent_of(found[1]) for found in starts), default=0)
    outer = [found for found in starts if indent_of(found[1]) == least]
    first = next((found for found in outer if _DEFINITION.match(text, found.end())), outer[0] if outer else None)
    return text[first.start() if first else text.rfind("\n") + 1 :]


def _in_python(parser: "Parser", piece: str, line: str) -> bool | None:
    data = _bytes(piece)
    root = parser.parse(data).root_node
    docstring = max(piece.rfind('"""'), piece.rfind("'''"))
    if docstring >= 0 and not _is_within_text(root, len(_bytes(piece[:docstring]))):
        return False
    if _open_at_end(root, line) != []:
        return False
    leaf = _leaf_before(root, data, line)
    if leaf is None or leaf.type == "comment":
        return None if leaf is None else False
    if leaf.type == ":":
        # A clause whose beginning is not in the piece is an error to the grammar.
        is_clause = _PYTHON_CLAUSE.match(piece.split("\n")[leaf.start_point[0]])
        return bool(is_clause) or (leaf.parent is not None and leaf.parent.type in _PYTHON_HEADERS)
    return not line.strip() and _ends_statement(leaf, "", "python")


def _in_braces(parser: "Parser", piece: str, line: str, language: str, *, is_whole: bool) -> bool | None:
    data = _bytes(piece)
    root = parser.parse(data).root_node
    opened = _open_at_end(root, line)
    if opened is None or _in_open_comment(root, piece):
        return False
    if not opened:
        return False if is_whole else None  # what was cut off may hold the bracket
    innermost = opened[-1]
    if innermost.kind != "{":
        return False
    closers = "\n" + "".join(_CLOSING[one.kind] for one in reversed(opened))  # a comment ends there
    if language == "rust":
        closers += ";"  # lists of imports end in one
    root = parser.parse(data + closers.encode()).root_node
    brace = root.descendant_for_byte_range(innermost.byte, innermost.byte + 1)
    leaf = _leaf_before(root, data, line)
    if brace is None or brace.parent is None or leaf is None:
        return None
    is_block = _is_block(brace, brace.parent)
    if not is_block or "comment" in leaf.type:
        return is_block and False
    if leaf.type == "{":
        return True
    if leaf.type == ":":
        return bool(_LABEL.match(piece.split("\n")[leaf.start_point[0]]))
    return not line.strip() and _ends_statement(leaf, brace.parent.type, language)


def _is_block(brace: "Node", parent: "Node") -> bool | None:
    declarator = parent.parent.child_by_field_name("declarator") if parent.parent is not None else None
    if parent.type == "compound_statement" and declarator is not None and declarator.type in _VARIABLES:
        return False  # `Point p{`, which is the body of a function to the grammar
    if parent.type in _BLOCKS:
        return True
    around = parent.parent.type if parent.parent is not None else ""
    if parent.type == "object_type":
        return around in ("type_alias_declaration", "interface_declaration")
    if parent.type == "token_tree" and around == "macro_invocation":
        return True
    if parent.type not in ("ERROR", "token_tree"):
        return False
    # The grammar is at a loss, or it is a macro's: what stands before the brace tells in most cases.
    before = brace.prev_sibling or parent.prev_sibling
    if before is None or before.type not in _BEFORE_BLOCK | _BEFORE_LITERAL:
        return None
    return before.type in _BEFORE_BLOCK


def _ends_statement(leaf: "Node", block: str, language: str) -> bool:
    if leaf.type in (";", "}"):
        return True
    if leaf.type == ",":
        return block in _LISTS
    above = _ancestors(leaf)
    if language not in _NO_SEMICOLONS:
        return any(one.type.startswith("preproc") or one.type == "attribute_item" for one in above)
    if leaf.type == ")" and len(above) > 1 and above[1].type in _HEADERS:
        return False
    return leaf.is_named or leaf.type in _ENDS_STATEMENT or leaf.type.isalpha()


def _open_at_end(root: "Node", line: str) -> list[_Open] | None:
    """Return the brackets that are open at the end of the text, the innermost last; None where a string is open.

    Only nodes with errors are looked into: in all others each bracket has its partner.
    """
    opened: list[_Open] = []
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.child_count:
            nodes += reversed(node.children) if node.has_error else ()
        elif not node.is_missing:
            _read(node, opened)
    if opened and opened[-1].is_string and not opened[-1].is_long and not line.strip():
        opened.pop()
    return None if opened and opened[-1].is_string else opened


def _read(leaf: "Node", opened: list[_Open]) -> None:
    row = leaf.start_point[0]
    if opened and opened[-1].is_string and not opened[-1].is_long and row > opened[-1].row:
        opened.pop()  # a string that the end of its line ended
    if opened and leaf.type == _CLOSING[opened[-1].kind]:
        opened.pop()
    elif leaf.type in _CLOSING and (leaf.type == "${" or not (opened and opened[-1].is_string)):
        is_long = leaf.type in _LONG_STRINGS or (leaf.text or b"").endswith((b'"""', b"'''"))
        opened.append(_Open(leaf.type, leaf.start_byte, row, is_long))


def _leaf_before(root: "Node", data: bytes, line: str) -> "Node | None":
    # The last leaf before the cursor; a comment only where the cursor stands in its line.
    end = len(data.rstrip())
    while end:
        leaf = root.descendant_for_byte_range(end - 1, end)
        if leaf is None or "comment" not in leaf.type or line.strip():
            return leaf
        end = len(data[: leaf.start_byte].rstrip())
    return None


def _in_open_comment(root: "Node", piece: str) -> bool:
    # To the grammars, a comment without an end is no comment.
    place = piece.find("/*", piece.rfind("*/") + 1)
    while place >= 0:
        if not _is_within_text(root, len(_bytes(piece[:place]))):
            return True
        place = piece.find("/*", place + 1)
    return False


def _is_within_text(root: "Node", byte: int) -> bool:
    leaf = root.descendant_for_byte_range(byte, byte + 1)
    return leaf is not None and any(
        _TEXT.search(one.type) and one.start_byte < byte for one in (leaf, *_ancestors(leaf))
    )


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # half a character, as JSON can carry it


def _ancestors(node: "Node") -> list["Node"]:
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found

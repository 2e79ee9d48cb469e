"""What a text imports, and in which files of the workspace that may lie: Python, TypeScript and JavaScript.

Pure: paths are computed, not looked at. Other languages have no imports here yet. Of TypeScript and JavaScript, only
relative imports are known; aliases of a `tsconfig.json` are not.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from agent import grammars

if TYPE_CHECKING:
    import tree_sitter

EVERYTHING = "*"
"""The name in an import that brings all public names."""
SCRIPTS = frozenset({"javascript", "javascriptreact", "typescript", "typescriptreact"})
"""Languages whose modules are files named by relative paths."""

_QUERIES = {
    "python": "[(import_statement) (import_from_statement)] @import",
    **dict.fromkeys(
        SCRIPTS,
        """(import_statement) @import
        (export_statement source: (string)) @import
        (variable_declarator value: (call_expression function: (identifier) @call) (#eq? @call "require")) @import""",
    ),
}
_SCRIPT_ENDS = (".ts", ".tsx", ".d.ts", ".js", ".jsx", ".mjs", ".cjs", ".mts", ".cts")
_COMPILED_ENDS = {".js": (".ts", ".tsx"), ".jsx": (".tsx",), ".mjs": (".mts",), ".cjs": (".cts",)}
"""TypeScript names the file that the compiler will write; the source lies beside it."""


@dataclass(frozen=True, slots=True)
class Import:
    """One name that an import brings into a text."""

    module: str
    """As it is written: "a.b", "..a" or "./a"."""
    name: str | None
    """Name in the module; None where the module itself is brought, `EVERYTHING` where all its names are."""
    local: str
    """What the name is called in the text."""


def imports(text: str, language: str) -> tuple[Import, ...]:
    """Return what a text imports, in its order; nothing for languages that are not known here."""
    parser = grammars.parser(language) if language in _QUERIES else None
    if parser is None:
        return ()
    from tree_sitter import QueryCursor

    tree = parser.parse(text.encode("utf-8", "replace"))
    nodes = QueryCursor(_query(language)).captures(tree.root_node).get("import", [])
    read = _of_python if language == "python" else _of_script
    found = [each for node in sorted(nodes, key=lambda node: node.start_byte) for each in read(node)]
    return tuple(dict.fromkeys(found))


def candidates(module: str, language: str, importer: Path, bases: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that a module may be, the likeliest first.

    Args:
        module: As the import names it.
        language: Of the text that imports.
        importer: File that imports.
        bases: Folders in which the modules of a program lie; only Python has them.
    """
    if language in SCRIPTS:
        if module.startswith("."):
            yield from _script_files(Path(os.path.normpath(importer.parent / module)))
        return
    name = module.lstrip(".")
    level = len(module) - len(name)
    if level:
        if level <= len(importer.parents):
            yield from _python_files(importer.parents[level - 1], name)
    elif name.partition(".")[0] not in sys.stdlib_module_names:
        for base in bases:
            yield from _python_files(base, name)


def submodule(module: str, name: str) -> str:
    """Return the module that `name` would be in a Python package."""
    return f"{module}{name}" if module.endswith(".") else f"{module}.{name}"


@cache
def _query(language: str) -> "tree_sitter.Query":
    from tree_sitter import Query

    parser = grammars.parser(language)
    assert parser is not None
    assert parser.language is not None
    return Query(parser.language, _QUERIES[language])


def _python_files(folder: Path, name: str) -> Iterator[Path]:
    place = folder.joinpath(*name.split(".")) if name else folder
    if name:
        yield place.with_name(place.name + ".py")
    yield place / "__init__.py"
    if name:
        yield place.with_name(place.name + ".pyi")


def _script_files(place: Path) -> Iterator[Path]:
    for end in _COMPILED_ENDS.get(place.suffix, ()):
        yield place.with_suffix(end)
    if place.suffix in _SCRIPT_ENDS:
        yield place
    for end in _SCRIPT_ENDS:
        yield place.with_name(place.name + end)
    for end in _SCRIPT_ENDS:
        yield place / f"index{end}"


def _of_python(node: "tree_sitter.Node") -> Iterator[Import]:
    names = [_renamed(each) for each in node.children_by_field_name("name")]
    if node.type == "import_statement":
        yield from (Import(name, None, local) for name, local in names)
        return
    module = _text(node.child_by_field_name("module_name"))
    if any(child.type == "wildcard_import" for child in node.named_children):
        yield Import(module, EVERYTHING, EVERYTHING)
    yield from (Import(module, name, local) for name, local in names)


def _of_script(node: "tree_sitter.Node") -> Iterator[Import]:
    clauses = [child for child in node.named_children if child.type.endswith(("_clause", "_export"))]
    source = _text(_source(node, clauses)).strip("'\"`")
    if not source.startswith("."):
        return
    if node.type == "variable_declarator":
        yield from _of_require(node, source)
    elif node.type == "export_statement":
        if not clauses:
            yield Import(source, EVERYTHING, EVERYTHING)
        for clause in clauses:
            if clause.type == "namespace_export":
                yield Import(source, None, _text(clause.named_child(0)))
            else:
                yield from (Import(source, *_renamed(each)) for each in clause.named_children)
    else:
        for clause in clauses:
            yield from _of_clause(clause, source)


def _source(node: "tree_sitter.Node", clauses: Sequence["tree_sitter.Node"]) -> "tree_sitter.Node | None":
    if node.type == "variable_declarator":
        call = node.child_by_field_name("value")
        arguments = call.child_by_field_name("arguments") if call else None
        return arguments.named_child(0) if arguments and arguments.named_child_count else None
    inner = (clause.child_by_field_name("source") for clause in clauses)  # import x = require("./x")
    return node.child_by_field_name("source") or next((each for each in inner if each), None)


def _of_require(node: "tree_sitter.Node", source: str) -> Iterator[Import]:
    pattern = node.child_by_field_name("name")
    if pattern is None:
        return
    if pattern.type == "identifier":
        yield Import(source, None, _text(pattern))
    for each in pattern.named_children:
        if each.type == "pair_pattern":
            yield Import(source, _text(each.child_by_field_name("key")), _text(each.child_by_field_name("value")))
        elif each.type == "shorthand_property_identifier_pattern":
            yield Import(source, _text(each), _text(each))


def _of_clause(clause: "tree_sitter.Node", source: str) -> Iterator[Import]:
    for each in clause.named_children:
        if each.type == "identifier":
            whole = clause.type == "import_require_clause"
            yield Import(source, None if whole else "default", _text(each))
        elif each.type == "namespace_import":
            yield Import(source, None, _text(each.named_child(0)))
        elif each.type == "named_imports":
            yield from (Import(source, *_renamed(item)) for item in each.named_children if item.type != "comment")


def _renamed(node: "tree_sitter.Node") -> tuple[str, str]:
    name = _text(node.child_by_field_name("name") or node)
    return name, _text(node.child_by_field_name("alias")) or name


def _text(node: "tree_sitter.Node | None") -> str:
    return (node.text or b"").decode("utf-8", "replace") if node else ""

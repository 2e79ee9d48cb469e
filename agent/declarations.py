"""What a module declares, without the bodies: signatures, class headers, fields, names of constants.

For Python, TypeScript and JavaScript; other languages give nothing yet. Pure: takes text, reads no file. Values of
constants and defaults of fields are left out, comments and docstrings too. A text that does not parse gives what can be
made out of it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent import grammars

if TYPE_CHECKING:
    from tree_sitter import Node

_MAX_DEPTH = 6  # blocks within blocks; declarations of a module hardly ever lie deeper than an `if` in a `try`
_MAX_SIGNATURE_CHARS = 400  # longer ones hold whole tables as defaults
_MAX_DECORATOR_CHARS = 60  # longer ones are configuration
_PYTHON_BLOCKS = frozenset({"if_statement", "elif_clause", "else_clause", "try_statement", "except_clause", "ERROR"})
_TOLD_DUNDERS = frozenset({"__init__", "__call__", "__getitem__", "__iter__", "__enter__", "__aenter__"})
"""Special methods that tell how a class is used; the others are a matter of course."""
_FUNCTION_VALUES = frozenset({"arrow_function", "function_expression", "generator_function"})
_TIDY = (("( ", "("), (" )", ")"), (",)", ")"), ("[ ", "["), (" ]", "]"), (",]", "]"))
"""What joining lines leaves behind, and what should stand there."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One name that a module declares."""

    name: str
    text: str
    public: bool
    """Whether it is meant for other modules."""


def declarations(text: str, language: str, names: Iterable[str] | None = None) -> str:
    """Return the declarations of a module as text.

    Args:
        text: Source of the module.
        language: LSP language identifier.
        names: What to show, in that order; everything public if None.
    """
    return render(outline(text, language), names)


def outline(text: str, language: str) -> tuple[Declaration, ...]:
    """Return what a module declares, in the order of its text."""
    read = _OUTLINES.get(language)
    parser = grammars.parser(language) if read else None
    if read is None or parser is None:
        return ()
    return tuple(read(parser.parse(text.encode("utf-8", "replace")).root_node))


def render(declared: Iterable[Declaration], names: Iterable[str] | None = None) -> str:
    """Return declarations as text, each beginning on a line of its own; `names` as for `declarations`."""
    if names is None:
        chosen = [each.text for each in declared if each.public]
    else:
        by_name: dict[str, list[str]] = {}
        for each in declared:
            by_name.setdefault(each.name, []).append(each.text)
        chosen = [text for name in names for text in by_name.get(name, ())]
    return "\n".join(dict.fromkeys(chosen))


def _python(root: "Node", depth: int = 0) -> Iterator[Declaration]:
    for child in root.named_children:
        if root.type in ("module", "ERROR") and child.start_point.column:
            continue  # a member of something that did not parse, or the second on its line
        inner = child.child_by_field_name("definition") or child
        if inner.type in ("function_definition", "class_definition"):
            text = _python_function(child, inner) if inner.type[0] == "f" else _python_class(child, inner)
            name = _name(inner)
        elif child.type == "type_alias_statement":
            text, name = _flat(child), _flat(child.child_by_field_name("left"))
        elif child.type in _PYTHON_BLOCKS or child.type == "block":
            if depth < _MAX_DEPTH and "__name__" not in _flat(child.child_by_field_name("condition")):
                yield from _python(child, depth + 1)
            continue
        else:
            name, text = _python_field(child)
        if name and text:
            yield Declaration(name, text, public=not name.startswith("_"))


def _python_function(outer: "Node", function: "Node") -> str:
    body, parameters = function.child_by_field_name("body"), function.child_by_field_name("parameters")
    if body is None or parameters is None or parameters.has_error:
        return ""
    return f"{_decorators(outer)}{_flat(function, body)} ..."


def _python_class(outer: "Node", definition: "Node") -> str:
    body = definition.child_by_field_name("body")
    if body is None:
        return ""
    members: list[str] = []
    for child in body.named_children:
        inner = child.child_by_field_name("definition") or child
        if inner.type == "function_definition":
            name = _name(inner)
            if (name.startswith("_") and name not in _TOLD_DUNDERS) or _changes_property(child):
                continue
            text = _python_function(child, inner)
        elif inner.type == "class_definition":
            inside = inner.child_by_field_name("body")
            name, text = _name(inner), f"{_flat(inner, inside)} ..." if inside else ""
        else:
            name, text = _python_field(child)
        if text and (not name.startswith("_") or name in _TOLD_DUNDERS):
            members += text.split("\n")
    header = f"{_decorators(outer)}{_flat(definition, body)}"
    return "\n    ".join((header, *members)) if members else f"{header} ..."


def _python_field(statement: "Node") -> tuple[str, str]:
    # Name and text of an assignment to one name; empty for any other statement.
    assignment = next(iter(statement.named_children), statement)
    is_whole = assignment.type == "assignment" and not assignment.has_error
    left = assignment.child_by_field_name("left") if is_whole else None
    if statement.type != "expression_statement" or left is None or left.type != "identifier":
        return "", ""
    value = assignment.child_by_field_name("right")
    return _flat(left), f"{_flat(assignment, value)} ..." if value else _flat(assignment)


def _changes_property(decorated: "Node") -> bool:
    return any(
        _flat(child).endswith((".setter", ".deleter"))
        for child in decorated.named_children
        if child.type == "decorator"
    )


def _decorators(decorated: "Node") -> str:
    lines = [_flat(child) for child in decorated.named_children if child.type == "decorator"]
    return "".join(f"{line}\n" for line in lines if len(line) <= _MAX_DECORATOR_CHARS)


def _script(root: "Node") -> list[Declaration]:
    found: list[Declaration] = []
    exports: list[tuple[str, str]] = []  # names, and what other modules call them
    for child in root.named_children:
        if child.type == "export_statement":
            declared, names = _export(child)
        elif child.type == "expression_statement":
            declared, names = _common_js(child)
        else:
            declared, names = [Declaration(*each, public=False) for each in _script_declarations(child)], []
        found += declared
        exports += names
    found += [replace(each, name=told) for name, told in exports for each in found if each.name == name != told]
    exported = {name for pair in exports for name in pair}
    all_public = not exported and not any(each.public for each in found)  # a script, or exports in an unknown way
    return [replace(each, public=each.public or all_public or each.name in exported) for each in found]


def _export(statement: "Node") -> tuple[list[Declaration], list[tuple[str, str]]]:
    inner = statement.child_by_field_name("declaration") or statement.child_by_field_name("value")
    if inner is None:
        clauses = [child for child in statement.named_children if child.type == "export_clause"]
        if statement.child_by_field_name("source"):
            return [], []  # another module's names: imports
        return [], [_renamed(each) for clause in clauses for each in clause.named_children if each.type != "comment"]
    if not any(each.type == "default" for each in statement.children):
        return [Declaration(name, f"export {text}", public=True) for name, text in _script_declarations(inner)], []
    declared = [Declaration(name, f"export default {text}", public=True) for name, text in _script_declarations(inner)]
    declared += [replace(each, name="default") for each in declared if each.name != "default"]
    return declared, [(_flat(inner), "default")] if inner.type == "identifier" else []


def _common_js(statement: "Node") -> tuple[list[Declaration], list[tuple[str, str]]]:
    # `exports.name = …`, and the names in `module.exports = …`.
    assignment = next(iter(statement.named_children), statement)
    left, right = assignment.child_by_field_name("left"), assignment.child_by_field_name("right")
    if left is None or right is None or left.type != "member_expression":
        return [], []
    target = _flat(left)
    if target == "module.exports":
        pairs = right.named_children if right.type == "object" else []
        named = [(_field(each, "value") or _flat(each), _field(each, "key") or _flat(each)) for each in pairs]
        return [], [(_flat(right), _flat(right))] if right.type == "identifier" else named
    if not target.startswith(("exports.", "module.exports.")):
        return [], []
    name = target.rpartition(".")[2]
    body = right.child_by_field_name("body") if right.type in _FUNCTION_VALUES else None
    value = f"{_flat(right, body)} ..." if body else "..."
    return [Declaration(name, f"{target} = {value};", public=True)], []


def _script_declarations(node: "Node") -> Iterator[tuple[str, str]]:
    # Name and text of what a statement declares.
    name, body = _name(node), node.child_by_field_name("body")
    if node.type in ("ambient_declaration", "ERROR"):
        for each in node.named_children:
            if each.type not in ("ambient_declaration", "ERROR"):
                yield from _script_declarations(each)
    elif node.type in ("lexical_declaration", "variable_declaration"):
        keyword = node.children[0].type
        for each in node.named_children:
            variable, value = each.child_by_field_name("name"), each.child_by_field_name("value")
            if variable and variable.type == "identifier" and not _is_require(value):
                yield _flat(variable), f"{keyword} {_variable(each, value)};"
    elif node.type in ("class_declaration", "abstract_class_declaration", "class") and body:
        yield name or "default", _braced(node, body, _script_members(body))
    elif node.type == "interface_declaration" and body:
        yield name, _braced(node, body, (_closed(each) for each in body.named_children if each.type != "comment"))
    elif node.type == "enum_declaration" and body:
        members = [_name(each) or _flat(each) for each in body.named_children if each.type != "comment"]
        yield name, f"{_flat(node, body)} {{ {', '.join(members)} }}"
    elif node.type in ("function_declaration", "generator_function_declaration", *_FUNCTION_VALUES) and body:
        yield name or "default", _closed(node, body)
    elif node.type in ("function_signature", "type_alias_declaration"):
        yield name, _closed(node)


def _script_members(body: "Node") -> Iterator[str]:
    for member in body.named_children:
        if member.type in ("comment", "decorator") or _is_private(member):
            continue
        value = member.child_by_field_name("value")
        if member.type.endswith("field_definition"):
            yield f"{_variable(member, value)};"
        elif member.type != "class_static_block":
            yield _closed(member, member.child_by_field_name("body"))


def _is_private(member: "Node") -> bool:
    return any(
        child.type == "private_property_identifier"
        or (child.type == "accessibility_modifier" and child.text == b"private")
        for child in member.named_children
    )


def _is_require(value: "Node | None") -> bool:
    return value is not None and _flat(value.child_by_field_name("function")) == "require"


def _variable(node: "Node", value: "Node | None") -> str:
    # A variable or field: its type where it has one, the signature of a function.
    if value is None:
        return _flat(node).rstrip(";")
    body = value.child_by_field_name("body") if value.type in _FUNCTION_VALUES else None
    if body:
        return f"{_flat(node, body)} ..."
    return (
        _flat(node, value).removesuffix("=").rstrip()
        if node.child_by_field_name("type")
        else _flat(node, value) + " ..."
    )


def _braced(node: "Node", body: "Node", members: Iterable[str]) -> str:
    lines = [f"  {member}" for member in members]
    header = _flat(node, body)
    return "\n".join((f"{header} {{", *lines, "}")) if lines else f"{header} {{}}"


def _closed(node: "Node", end: "Node | None" = None) -> str:
    return _flat(node, end).rstrip(";,") + ";"


def _field(node: "Node", name: str) -> str:
    return _flat(node.child_by_field_name(name))


def _name(node: "Node") -> str:
    return _field(node, "name")


def _renamed(specifier: "Node") -> tuple[str, str]:
    return _name(specifier), _flat(specifier.child_by_field_name("alias")) or _name(specifier)


def _flat(node: "Node | None", until: "Node | None" = None) -> str:
    """Return the text of a node up to where another begins: in one line, without comments and decorators in front."""
    if node is None:
        return ""
    first = next((child for child in node.children if child.type != "decorator"), node)
    start, end = first.start_byte, until.start_byte if until else node.end_byte
    data = (node.text or b"")[start - node.start_byte : end - node.start_byte]
    for comment in reversed(_comments(node, end) if b"#" in data or b"/" in data else []):
        data = data[: max(0, comment.start_byte - start)] + b" " + data[max(0, comment.end_byte - start) :]
    text = " ".join(data.decode("utf-8", "replace").split())
    for untidy, tidy in _TIDY:
        text = text.replace(untidy, tidy)
    return text if len(text) <= _MAX_SIGNATURE_CHARS else text[: _MAX_SIGNATURE_CHARS - 1] + "…"


def _comments(node: "Node", end: int) -> list["Node"]:
    found, waiting = [], [node]
    while waiting:
        each = waiting.pop()
        if each.type == "comment":
            found.append(each)
        waiting += [child for child in reversed(each.children) if child.start_byte < end]
    return found


_OUTLINES: dict[str, Callable[["Node"], Iterable[Declaration]]] = {
    "python": _python,
    **dict.fromkeys(("javascript", "javascriptreact", "typescript", "typescriptreact"), _script),
}

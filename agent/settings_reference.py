"""Writes docs/settings.md from the settings' own descriptions: `python -m agent.settings_reference > docs/settings.md`."""

import sys
import tomllib
from collections.abc import Iterator

from pydantic import BaseModel

from agent.config import Settings, is_for_editors

_HEAD = """\
# Settings

One TOML file; `tabwise doctor` prints where it lies. Every key may be left out. Editors pass the same sections and keys
under `tabwise`, those that are marked "own"; the others are the daemon's, which serves every editor, and hold from its
next start. This page is generated from the code (`make docs`).
"""


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "[]" if value == () else str(value)


def render() -> str:
    """Return the page, as Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    for name, section in Settings.model_fields.items():
        kind: type[BaseModel] = type(section.default)
        yield f"## [{name}]\n\n{kind.__doc__}\n\n| key | default | takes | editors | what it is |\n| --- | --- | --- | --- | --- |"
        schema = kind.model_json_schema()["properties"]
        for key, field in kind.model_fields.items():
            own = "own" if is_for_editors(name, key) else ""
            example = f"{key} = {_toml(field.default)}"
            tomllib.loads(example)  # the default must be valid TOML, since readers copy it
            yield f"| `{key}` | `{_toml(field.default)}` | {_takes(schema[key])} | {own} | {field.description} |"
        yield ""


def _takes(schema: dict[str, object]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])  # type: ignore[attr-defined]
    if "minimum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return {"boolean": "true, false", "array": "list of text"}.get(str(schema["type"]), "text")


if __name__ == "__main__":
    sys.stdout.write(render())

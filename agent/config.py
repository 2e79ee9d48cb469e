"""Settings: one TOML file, checked whole, every problem reported at once.

Knows what the settings mean and which values they take; not who reads them. `docs/settings.md` is generated from the
descriptions below (`python -m agent.settings_reference`).
"""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from agent import paths
from agent.errors import ConfigError

_EDITOR: dict[str, JsonValue] = {"editor": True}
"""Marks a setting that each editor may have for itself; all others are the daemon's, which serves every editor."""

_UNTOLD = ("remote.url",)
"""Settings whose wrong value is not repeated, since somebody may have written a password into it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSettings(_Section):
    """Which model answers."""

    name: str = Field(
        "starter", min_length=1, description="Name from `tabwise models list`, or the path of a GGUF file of your own."
    )


class EngineSettings(_Section):
    """How the model is run."""

    kind: Literal["auto", "llamacpp", "transformers", "remote"] = Field(
        "auto",
        description="What runs it. `auto`: transformers on an NVIDIA GPU that has room for the model, else llama.cpp; never "
        "`remote`, which sends text to the server of [remote].",
    )
    context_tokens: int = Field(
        4096,
        ge=512,
        le=131_072,
        description="Room for prompt and answer together. Memory grows with it: 12 KB a token for the starter model, "
        "56 KB for Qwen2.5-Coder-7B. llama.cpp takes it once for explanations and for each of the completion slots, "
        "transformers `cache_contexts` times at most.",
    )
    threads: int = Field(0, ge=0, le=512, description="Threads of the CPU engine; 0 takes one for each physical core.")
    batch_tokens: int = Field(
        0,
        ge=0,
        le=2048,
        description="Prompt tokens computed in one go; 0 for 512 on a GPU, and on a CPU for 7 in llama.cpp and 64 in "
        "transformers. A cancelled request holds the engine for up to two batches (0.2 s at 7 on 2 cores, calculated). "
        "More read long prompts faster (25 % at 16), but in llama.cpp sums come out a little different for every size "
        "from 8 on, so that caches can change a completion where two tokens are nearly as likely.",
    )
    quantisation: Literal["auto", "nf4", "int8", "bf16", "fp32"] = Field(
        "auto",
        description="How transformers holds a model's weights: `nf4` in four bits, `int8` in eight, `bf16` in sixteen, "
        "`fp32` in thirty-two. `auto` takes `bf16` on a GPU where that fits, else `nf4`; on a CPU `fp32`, else `bf16`, "
        "which is slow there. A GGUF file in llama.cpp stays as it is.",
    )
    gpu_layers: int = Field(
        -1, ge=-1, le=1000, description="Layers that llama.cpp puts on a GPU, where it was built for one; -1 for all."
    )
    completion_slots: int = Field(
        6,
        ge=1,
        le=16,
        description="Places in the code whose prompts are kept computed at the same time: one for each document that is "
        "typed at, and two more. In llama.cpp each takes the memory of one context.",
    )
    cache_contexts: int = Field(
        2,
        ge=1,
        le=17,
        description="How many contexts' worth of memory the prompts that transformers keeps computed take together; "
        "those that were used longest ago are given up.",
    )
    unload_after_s: int = Field(
        900,
        ge=0,
        le=604_800,
        description="Seconds without a request after which the model leaves memory; 0 for never. One on a server has none here.",
    )


class CompletionSettings(_Section):
    """What a completion may see and how long it may be."""

    automatic: bool = Field(
        True, json_schema_extra=_EDITOR, description="Answer while you type. Off: only when you ask by key or command."
    )
    languages_off: tuple[str, ...] = Field(
        (),
        strict=False,
        json_schema_extra=_EDITOR,
        description='Language identifiers in which nothing is completed while you type, `["markdown"]` for instance.',
    )
    prefix_tokens: int = Field(384, ge=16, le=65_536, description="Most tokens of text before the cursor in a prompt.")
    suffix_tokens: int = Field(128, ge=0, le=65_536, description="Most tokens of text behind the cursor in a prompt.")
    snippet_tokens: int = Field(
        -1,
        ge=-1,
        le=65_536,
        description="Most tokens from other files: declarations of what is imported, similar pieces, recent edits. -1 for "
        "256 on a CPU and 1,024 on a GPU, 0 for none.",
    )
    exclude: tuple[str, ...] = Field(
        (),
        strict=False,
        json_schema_extra=_EDITOR,
        description="Files whose text never enters another file's prompt, in the form of `.gitignore`, beside what that "
        "names and what holds secrets.",
    )
    line_tokens: int = Field(48, ge=1, le=4096, description="Most new tokens where one line is wanted.")
    block_tokens: int = Field(96, ge=1, le=4096, description="Most new tokens where a block is wanted.")
    block_lines: int = Field(10, ge=1, le=200, description="Most lines of a block.")


class ExplainSettings(_Section):
    """How code is explained."""

    language: str = Field(
        "English",
        min_length=1,
        max_length=64,
        json_schema_extra=_EDITOR,
        description='Language of the answer: "German", "fr", "日本語", …',
    )
    max_tokens: int = Field(
        320, ge=16, le=8192, json_schema_extra=_EDITOR, description="Most tokens of an explanation."
    )
    code_tokens: int = Field(
        1500, ge=64, le=65_536, description="Most tokens of code that are read; of longer code the end is left out."
    )


class DaemonSettings(_Section):
    """How the daemon is reached."""

    tcp_port: int = Field(
        0,
        ge=0,
        le=65_535,
        description="Port on 127.0.0.1 for tools that cannot use the Unix socket; needs the token of `tabwise status`. "
        "0 for none.",
    )


class RemoteSettings(_Section):
    """A server that runs the model in your stead; it is used where `engine.kind` is `remote`, and then gets text of yours."""

    url: str = Field(
        "",
        max_length=2048,
        description="Address of an OpenAI-compatible server (vLLM, llama-server, Ollama), with or without `/v1`: "
        '"http://127.0.0.1:8000". No user, password or token in it.',
    )
    model: str = Field(
        "",
        max_length=512,
        description="Name of the model there. May be empty where it lists one alone; where it lists several, one must be named.",
    )
    base: str = Field(
        "",
        max_length=512,
        description="Name from `tabwise models list` of the model that is served there. Adapters are only loaded where it "
        "says what they were trained on.",
    )
    fim: str = Field(
        "auto",
        description="Format of fill-in-the-middle, by its name in agent/fim.py. `auto` asks a server that tokenises which one "
        "it knows, and gives others prefix and suffix apart (`suffix`); `none` leaves the suffix out.",
    )
    token_file: str = Field(
        "",
        max_length=4096,
        description="File with the server's bearer token, readable by you alone (0600); empty for the environment's "
        "`TABWISE_REMOTE_TOKEN`, or none.",
    )
    adapters_dir: str = Field(
        "",
        max_length=4096,
        description="Folder in which vLLM finds the adapters' folders, where it is another path there than here.",
    )
    proxy: Literal["none", "environment"] = Field(
        "none", description="Whether a proxy of the environment (`HTTPS_PROXY`, …) is used on the way to the server."
    )
    connect_s: float = Field(5.0, ge=0.05, le=60, description="Seconds for a connection to be made.")
    first_s: float = Field(
        60.0, ge=0.05, le=3600, description="Seconds for an answer to begin, second tries and waiting included."
    )
    between_s: float = Field(
        30.0,
        ge=0.05,
        le=3600,
        description="Seconds for an answer to go on; comments that keep a connection open do not count.",
    )

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        if problem := _wrong_with(url):
            raise ValueError(problem)
        return url


def _wrong_with(url: str) -> str | None:
    if not url:
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "not an address; write it as http://HOST:PORT"
    if parts.scheme not in ("http", "https") or not parts.hostname or any(sign.isspace() for sign in url):
        return "not an address; write it as http://HOST:PORT"
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        return "must hold no user, password, query or fragment; the token goes into remote.token_file"
    return None


class LogSettings(_Section):
    """What is written to the log files. Text of documents never is."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")


class Settings(_Section):
    """All settings, with the defaults of a machine without a GPU."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    remote: RemoteSettings = RemoteSettings()
    completion: CompletionSettings = CompletionSettings()
    explain: ExplainSettings = ExplainSettings()
    daemon: DaemonSettings = DaemonSettings()
    log: LogSettings = LogSettings()


def load(path: Path | None = None) -> Settings:
    """Read the settings file; the defaults where there is none.

    Args:
        path: File to read, `paths.config_file()` if None.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or holds unknown keys or wrong values: all of them, in one
            line.
    """
    file = path or paths.config_file()
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings {file}: {error.strerror}; mend its permissions or remove it"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"the settings {file} are not UTF-8 text; save the file as UTF-8") from None
    except RecursionError:
        raise ConfigError(f"the settings {file} are nested too deeply; see docs/settings.md for the form") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the settings {file} are not TOML: {error}; see docs/settings.md for the form") from None
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"the settings {file} have problems: {'; '.join(problems(error))}") from None


def with_engine(settings: Settings, kind: str) -> Settings:
    """Return the settings with another `engine.kind`.

    Raises:
        ConfigError: There is no such kind.
    """
    try:
        engine = EngineSettings.model_validate(settings.engine.model_dump() | {"kind": kind})
    except ValidationError as error:
        raise ConfigError(f"the engine {'; '.join(problems(error))}") from None
    return settings.model_copy(update={"engine": engine})


def overlay(base: Settings, changes: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Lay an editor's settings over the file's: what is wrong is reported and left out, what is good is kept.

    A setting of the daemon's, which serves every editor, is reported, too: it would have no effect from here.

    Args:
        base: Settings to start from.
        changes: Nested sections and keys as in the file; any of them may be missing.

    Returns:
        The new settings, and one line for each problem.
    """
    found: list[str] = []
    merged = _merge(base.model_dump(), _of_an_editor(changes, found))
    while True:
        try:
            return Settings.model_validate(merged), found
        except ValidationError as error:
            found += problems(error)
            places = [detail["loc"] for detail in error.errors()]
            for place in places:
                _restore(merged, base.model_dump(), place)


def is_for_editors(section: str, key: str) -> bool:
    """Tell whether an editor may set `section.key` for itself."""
    kind = type(Settings.model_fields[section].default)
    return bool(kind.model_fields[key].json_schema_extra == _EDITOR)


def _of_an_editor(changes: Mapping[str, Any], found: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for section, values in changes.items():
        kept[section] = values
        if section not in Settings.model_fields or not isinstance(values, Mapping):
            continue  # wrong in a way that the validation tells
        known = type(Settings.model_fields[section].default).model_fields
        daemons = [key for key in values if key in known and not is_for_editors(section, key)]
        kept[section] = {key: value for key, value in values.items() if key not in daemons}
        found += [f"{section}.{key}: holds for every editor, set it in {paths.config_file()}" for key in daemons]
    return kept


def problems(error: ValidationError) -> list[str]:
    """Return one line for each problem: the key, what is wrong with it, and the value seen."""
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"]) or "(whole)"
        if detail["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key, remove it or see docs/settings.md")
        elif key in _UNTOLD:
            lines.append(f"{key}: {detail['msg']}")
        else:
            lines.append(f"{key}: {detail['msg']}, got {detail['input']!r:.80}")
    return lines


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def _restore(target: dict[str, Any], base: Mapping[str, Any], place: Iterable[int | str]) -> None:
    # The deepest dictionary on the way to the wrong value gets the value of `base` back, or loses the key.
    key, *rest = place
    inner, good = target.get(str(key)), base.get(str(key))
    if rest and isinstance(inner, dict) and isinstance(good, dict):
        _restore(inner, good, rest)
    elif key in base:
        target[str(key)] = base[str(key)]
    else:
        target.pop(str(key), None)

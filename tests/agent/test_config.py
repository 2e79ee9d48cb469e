import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import config, settings_reference
from agent.config import Settings
from agent.errors import ConfigError

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_no_file_gives_the_defaults(tmp_path: Path) -> None:
    assert config.load(tmp_path / "none.toml") == Settings()


def test_values_are_taken_and_the_rest_stays(tmp_path: Path) -> None:
    path = write(tmp_path, '[explain]\nlanguage = "German"\n[completion]\nlanguages_off = ["markdown"]\n')
    settings = config.load(path)
    assert settings.explain.language == "German"
    assert settings.completion.languages_off == ("markdown",)
    assert settings.engine == Settings().engine


def test_every_problem_is_reported_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, '[engine]\nthreads = "two"\nspeed = 1\n[extra]\na = 1\n[completion]\nprefix_tokens = 2\n')
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "engine.threads",
        "'two'",
        "engine.speed: unknown key",
        "extra: unknown key",
        "completion.prefix_tokens",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("content", "said"), [("[engine\n", "not TOML"), (b"\xff\xfe", "UTF-8"), ("model = 3\n", "model: ")]
)
def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(write(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.chmod(0)
    with as_nobody(), pytest.raises(ConfigError, match="Permission denied"):
        config.load(path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to read every file, for a moment."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if me == 0:
            os.seteuid(0)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        config.load(tmp_path)


def test_an_editors_settings_are_laid_over_and_only_the_wrong_ones_left_out() -> None:
    changes = {
        "explain": {"language": "fr", "max_tokens": "many"},
        "engine": 3,
        "completion": {"automatic": False, "color": "red", "languages_off": ["a", 1]},
    }
    settings, problems = config.overlay(Settings(), changes)
    assert settings.explain.language == "fr"
    assert settings.explain.max_tokens == Settings().explain.max_tokens
    assert settings.completion.automatic is False
    assert settings.completion.languages_off == ()
    assert settings.engine == Settings().engine
    assert len(problems) == 4


def test_what_an_editor_cannot_set_for_itself_is_told_and_not_silently_ignored() -> None:
    changes = {"completion": {"line_tokens": 2, "automatic": False}, "model": {"name": "x"}, "engine": {"threads": 1}}
    settings, problems = config.overlay(Settings(), changes)
    assert settings == Settings().model_copy(
        update={"completion": Settings().completion.model_copy(update={"automatic": False})}
    )
    assert [problem.partition(":")[0] for problem in problems] == [
        "completion.line_tokens",
        "model.name",
        "engine.threads",
    ]
    assert all("set it in" in problem for problem in problems)


def test_nesting_without_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        config.load(write(tmp_path, "x = " + "[" * 5000))


def test_the_settings_reference_is_current() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings_reference.render(), "run: make docs"
    for section in Settings.model_fields:
        assert f"## [{section}]" in written

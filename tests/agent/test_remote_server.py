import os
from pathlib import Path

import pytest

from agent import config, remote_server
from agent.config import RemoteSettings, Settings
from agent.errors import ConfigError

SECRET = "sk-very-secret"


def settings(**changes: str) -> RemoteSettings:
    return RemoteSettings(**{"url": "http://127.0.0.1:8000", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://gw.example/team/v1", "https://gw.example/team"),
    ],
)
def test_an_address_with_or_without_its_version(url: str, root: str) -> None:
    assert remote_server.root(settings(url=url)) == root


def test_no_address() -> None:
    with pytest.raises(ConfigError, match=r"remote\.url"):
        remote_server.root(RemoteSettings())


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:b:c",
        "http://a b",
        "http://me:hunter2@a",
        "http://a/?key=hunter2",
    ],
)
def test_addresses_that_cannot_be_are_refused_and_no_password_is_repeated(tmp_path: Path, url: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[remote]\nurl = "{url}"\n')
    with pytest.raises(ConfigError, match=r"remote\.url") as caught:
        config.load(path)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_editor_cannot_send_text_elsewhere() -> None:
    changed, problems = config.overlay(
        Settings(), {"remote": {"url": "http://evil.example"}, "engine": {"kind": "remote"}}
    )
    assert changed == Settings()
    assert len(problems) == 2


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.8.8", True),
        ("http://[::1]:8000", True),
        ("http://localhost:3", True),
        ("http://LOCALHOST", True),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://10.0.0.2", False),
        ("https://models.example", False),
    ],
)
def test_whether_text_leaves_this_machine(url: str, here: bool) -> None:
    assert remote_server.is_here(settings(url=url)) is here
    told = remote_server.exposure(settings(url=url))
    assert ("leaves this machine" in told) is not here
    assert ("unencrypted" in told) is (not here and url.startswith("http:"))


def proxied(monkeypatch: pytest.MonkeyPatch, proxy: str, url: str) -> RemoteSettings:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("https_proxy", proxy)
    return settings(url=url, proxy="environment")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "http://[::1]:8000", "http://localhost:3", "http://[::ffff:127.0.0.1]"]
)
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    asked = proxied(monkeypatch, "http://proxy.example:3128", url)
    assert remote_server.proxy(asked) is None
    assert "proxy" not in remote_server.exposure(asked)
    assert "on this machine" in remote_server.exposure(asked)


@pytest.mark.parametrize("url", ["http://models.example:8000", "https://models.example"])
def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    asked = proxied(monkeypatch, f"http://me:{SECRET}@proxy.example:3128", url)
    assert remote_server.exposure(asked).endswith("through the proxy proxy.example:3128")
    assert SECRET not in remote_server.exposure(asked)
    assert remote_server.proxy(asked) == f"http://me:{SECRET}@proxy.example:3128"
    assert "proxy" not in remote_server.exposure(settings(url=url))
    assert remote_server.proxy(proxied(monkeypatch, "proxy.example:3128", url)) == "http://proxy.example:3128"
    monkeypatch.setenv("no_proxy", "models.example")
    assert "proxy" not in remote_server.exposure(asked)


def token_file(tmp_path: Path, text: str, mode: int = 0o600) -> RemoteSettings:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    return settings(token_file=str(path))


def test_a_token_of_a_file(tmp_path: Path) -> None:
    assert remote_server.token(token_file(tmp_path, f"{SECRET}\n"), {}) == SECRET


def test_a_token_of_the_environment() -> None:
    assert remote_server.token(settings(), {}) is None
    assert remote_server.token(settings(), {"TABWISE_REMOTE_TOKEN": SECRET}) == SECRET


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        remote_server.token(token_file(tmp_path, SECRET, mode), {})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", f"{SECRET}\r\nX-Evil: 1", f"{SECRET} {SECRET}", "schlüssel", "x" * 5000])
def test_what_is_no_token_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="no token") as caught:
        remote_server.token(token_file(tmp_path, text), {})
    assert SECRET not in str(caught.value)


def test_a_token_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        remote_server.token(settings(token_file=str(tmp_path / "none")), {})
    with pytest.raises(ConfigError, match=r"remote\.token_file"):
        remote_server.token(settings(token_file=str(tmp_path)), {})
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bytes").chmod(0o600)
    with pytest.raises(ConfigError, match="no text"):
        remote_server.token(settings(token_file=str(tmp_path / "bytes")), {})


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes in the file system")
def test_a_pipe_in_its_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="no plain file"):
        remote_server.token(settings(token_file=str(tmp_path / "pipe")), {})

"""What the settings say of a remote server: where it is, whether text leaves this machine for it, and its token.

Reads the settings, one file, and the environment: a token's variable and the proxies'. Connects to nothing (`engines/remote_http.py` does) and
knows no protocol.
"""

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from agent.config import RemoteSettings
from agent.errors import ConfigError

TOKEN_VARIABLE = "TABWISE_REMOTE_TOKEN"
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")  # what a header can carry; signed tokens have a few thousand characters


def root(settings: RemoteSettings) -> str:
    """Return the server's address without `/v1` and without a slash at its end.

    Raises:
        ConfigError: None is set.
    """
    if not settings.url:
        raise ConfigError('engine.kind is "remote", but remote.url is empty; set it to the server, http://HOST:PORT')
    return settings.url.rstrip("/").removesuffix("/v1").rstrip("/")


def is_here(settings: RemoteSettings) -> bool:
    """Tell whether the server's address is this machine's own: no text leaves it then."""
    host = (urlsplit(settings.url).hostname or "").rstrip(".")
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name: where it leads is decided elsewhere, and may change
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or address).is_loopback


def proxy(settings: RemoteSettings) -> str | None:
    """Return the proxy on the way to the server; None where there is none. May hold a password: never show it whole.

    This machine's own addresses are always reached directly: behind a proxy they would be the proxy's.
    """
    if settings.proxy != "environment" or is_here(settings):
        return None
    parts = urlsplit(settings.url)
    host = parts.netloc.rpartition("@")[2]
    found = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    return found if not found or "://" in found else f"http://{found}"


def exposure(settings: RemoteSettings) -> str:
    """Say in one line what becomes of the user's text at this server."""
    where = urlsplit(settings.url).netloc
    if is_here(settings):
        return f"text is sent to {where}, on this machine"
    read = "" if urlsplit(settings.url).scheme == "https" else ", unencrypted"
    by = proxy(settings)
    through = f", through the proxy {urlsplit(by).netloc.rpartition('@')[2]}" if by else ""
    return f"text leaves this machine: it is sent to {where}{read}{through}"


def token(settings: RemoteSettings, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the bearer token; None where none is set.

    Raises:
        ConfigError: The file cannot be read, can be read by others, or holds no token. The message never holds it.
    """
    if settings.token_file:
        path = Path(os.path.expanduser(settings.token_file))  # noqa: PTH111 - never raises
        text, source = _private_text(path), str(path)
    else:
        text, source = environment.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not text:
            return None
    if not _TOKEN.fullmatch(text.strip()):
        raise ConfigError(f"{source} holds no token: one line of printable ASCII without blanks is one")
    return text.strip()


def _private_text(path: Path) -> str:
    try:
        # Opened once and looked at as opened, so that nobody can put another file in its place in between.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, encoding="utf-8") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ConfigError(f"remote.token_file {path} is no plain file; give a file that holds the token alone")
            if os.name == "posix" and (info.st_mode & 0o077 or info.st_uid != os.getuid()):
                raise ConfigError(
                    f"remote.token_file {path} is not yours alone (mode {info.st_mode & 0o777:04o}); run: chmod 600 {path}"
                )
            return file.read(1 << 16)  # far more than any token
    except OSError as error:
        raise ConfigError(
            f"cannot read remote.token_file {path}: {error.strerror}; mend the path or its rights"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"remote.token_file {path} is no text; give a file that holds the token alone") from None

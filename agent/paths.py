"""Where Tabwise keeps its files: settings, models, logs and the sockets of a running daemon.

Knows the names of directories, not what is in the files. Each can be moved by an environment variable, so that a test
or a second user of the same account gets a world of its own.
"""

import os
import stat
import tempfile
from pathlib import Path

import platformdirs

from agent.errors import ConfigError, DaemonError

SOCKET_PATH_BYTES = 100
"""Longest path of a socket: Linux takes 107 bytes, macOS 103; both with room for a suffix."""


def _override(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(os.path.expanduser(value)).absolute() if value else None  # noqa: PTH111 - never raises


def config_file() -> Path:
    """Return the path of the settings file, which need not exist (`TABWISE_CONFIG`)."""
    return _override("TABWISE_CONFIG") or platformdirs.user_config_path("tabwise") / "config.toml"


def data_dir() -> Path:
    """Return the directory of models and state (`TABWISE_DATA_DIR`)."""
    return _override("TABWISE_DATA_DIR") or platformdirs.user_data_path("tabwise")


def models_dir() -> Path:
    """Return the directory of pulled models (`TABWISE_MODELS_DIR`, so that several worlds can share one download)."""
    return _override("TABWISE_MODELS_DIR") or data_dir() / "models"


def log_dir() -> Path:
    """Return the directory of log files."""
    return data_dir() / "logs"


def runtime_dir() -> Path:
    """Return the directory of sockets, tokens and locks, created with mode 0700 (`TABWISE_RUNTIME_DIR`).

    Raises:
        DaemonError: The directory belongs to somebody else, others may enter it, or its path is too long for a socket.
    """
    path = _override("TABWISE_RUNTIME_DIR") or _default_runtime_dir()
    longest = len(os.fsencode(path / "engine-000000.sock"))  # the longest name that is used
    if longest > SOCKET_PATH_BYTES:
        raise DaemonError(
            f"the runtime directory {path} makes socket paths of {longest} bytes, at most {SOCKET_PATH_BYTES} work; "
            "set TABWISE_RUNTIME_DIR to a shorter one"
        )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DaemonError(
            f"cannot create the runtime directory {path}: {error.strerror}; set TABWISE_RUNTIME_DIR"
        ) from None
    if os.name == "posix":
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise DaemonError(f"{path} is not a directory of yours; remove it, or set TABWISE_RUNTIME_DIR")
        if info.st_mode & 0o077:
            path.chmod(0o700)
    return path


def _default_runtime_dir() -> Path:
    # XDG_RUNTIME_DIR is per user, 0700 and emptied at logout. Without one (containers, cron, macOS), the temporary
    # directory with the user's id in the name; runtime_dir() checks who owns it.
    if os.name == "posix":
        xdg = os.environ.get("XDG_RUNTIME_DIR")
        if xdg and os.access(xdg, os.W_OK):
            return Path(xdg) / "tabwise"
        return Path(tempfile.gettempdir()) / f"tabwise-{os.getuid()}"
    return platformdirs.user_runtime_path("tabwise")


def private_dir(path: Path) -> Path:
    """Create `path` with mode 0700 where it is missing, and return it.

    Raises:
        ConfigError: It cannot be created.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the directory {path}: {error.strerror}; set TABWISE_DATA_DIR") from None
    return path


def write_private(path: Path, text: str) -> None:
    """Write `text` to a file that only the user can read (0600), replacing it in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)

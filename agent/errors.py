"""Everything that can go wrong, as one tree. Each message is one line: what happened, the value seen, what to do.

TabwiseError
├── ConfigError            the settings file cannot be read, or holds wrong values
├── InputError             a file, position or argument of the user's that cannot be used
├── ModelError
│   ├── UnknownModelError  no such name in the catalogue, no such path
│   ├── ModelMissingError  known, but not pulled yet
│   ├── ModelCorruptError  the file is cut, damaged, or not what its hash says
│   ├── ModelSetAsideError the model killed the daemon too often
│   └── PullError          a download failed: network, disk space
├── EngineError            the engine refused a request or broke
│   ├── PromptTooLongError the prompt does not fit the context
│   ├── MemoryFullError    the device has no memory left for it
│   ├── AdapterError       an adapter is damaged, or was made for another model
│   └── RemoteError        a remote server refused, broke off, or said nothing in time
│       └── ModelChangedError  it serves another model than the one that was asked about
├── DaemonError            the daemon cannot be reached, started or bound
│   ├── DaemonGoneError    nobody listens: it is not running
│   └── DaemonBusyError    a daemon of another version is still at work
└── RequestError           a request to the daemon that it cannot take
"""

import copy


class TabwiseError(Exception):
    """Base of all errors that are meant for the user's eyes."""

    code = "tabwise_error"
    """Name of the kind of error on the wire; `from_wire` turns it back into its class."""

    def bare(self) -> "TabwiseError":
        """Return the same error without where it comes from: a traceback holds whatever its functions had in hand."""
        return copy.copy(self)


class ConfigError(TabwiseError):
    """The settings file cannot be read, or holds wrong values."""

    code = "config"


class InputError(TabwiseError):
    """A file, position or argument of the user's cannot be used."""

    code = "input"


class ModelError(TabwiseError):
    """Something is wrong with a model."""

    code = "model"


class UnknownModelError(ModelError):
    """No model of that name or path."""

    code = "unknown_model"


class ModelMissingError(ModelError):
    """The model is known, but it is not on this machine yet."""

    code = "model_missing"


class ModelCorruptError(ModelError):
    """The model's file is cut, damaged, or not the one that its hash names."""

    code = "model_corrupt"


class ModelSetAsideError(ModelError):
    """The model killed the daemon too often to be tried again."""

    code = "model_set_aside"


class PullError(ModelError):
    """A model could not be downloaded."""

    code = "pull"


class EngineError(TabwiseError):
    """The engine refused a request or broke."""

    code = "engine"


class PromptTooLongError(EngineError):
    """The prompt does not fit into the model's context."""

    code = "prompt_too_long"


class MemoryFullError(EngineError):
    """The device has no memory left for what was asked."""

    code = "memory_full"


class AdapterError(EngineError):
    """An adapter is damaged, or was made for another model."""

    code = "adapter"


class RemoteError(EngineError):
    """A remote server refused, broke off, or said nothing in time."""

    code = "remote"

    def __init__(self, message: str, status: int | None = None) -> None:
        """Tell what happened; `status` is the server's HTTP status, where it gave one."""
        super().__init__(message)
        self.status = status


class ModelChangedError(RemoteError):
    """A remote server serves another model than the one that was asked about; what is known of that one is void."""

    code = "model_changed"


class DaemonError(TabwiseError):
    """The daemon cannot be reached, started or bound."""

    code = "daemon"


class DaemonGoneError(DaemonError):
    """Nobody listens where the daemon should."""

    code = "daemon_gone"


class DaemonBusyError(DaemonError):
    """A daemon of another version is still at work."""

    code = "daemon_busy"


class RequestError(TabwiseError):
    """A request to the daemon that it cannot take."""

    code = "request"


def from_wire(code: str, message: str) -> TabwiseError:
    """Return the error that the daemon described, as an instance of its own class."""
    kinds: list[type[TabwiseError]] = [TabwiseError]
    for kind in kinds:
        if kind.code == code:
            return kind(message)
        kinds.extend(kind.__subclasses__())
    return TabwiseError(message)

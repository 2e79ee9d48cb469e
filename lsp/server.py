"""The language server: puts the features together and runs them on standard input and output. No logic of its own."""

import argparse
import asyncio
import logging
import os
import stat
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from lsprotocol import types
from lsprotocol.converters import get_converter
from pygls.io_ import StdoutWriter, run_async
from pygls.lsp.server import LanguageServer

from agent.version import __version__
from lsp.features import explain, inline_completion, lifecycle, synchronize
from lsp.protocol import TabwiseProtocol, is_unreadable
from lsp.state import State

log = logging.getLogger(__name__)

_LINE_BYTES = 1 << 24  # of a header; what is longer is a message without one
_NOTEBOOKS = types.NotebookDocumentSyncOptions(
    notebook_selector=[types.NotebookDocumentFilterWithNotebook(notebook="*")]
)


class TabwiseServer(LanguageServer):
    """A server that tells its errors to the log, not to the user."""

    protocol: TabwiseProtocol

    def start_stdio(self) -> None:
        """Serve on standard input and output until the client ends it.

        pygls reads in a thread, line by line, which costs a millisecond for each key; the event loop reads pipes itself.
        """
        if not _are_pipes(sys.stdin.fileno(), sys.stdout.fileno()):
            self.start_io()
            return
        self._stop_event = threading.Event()
        self.protocol.set_writer(StdoutWriter(sys.stdout.buffer))
        try:
            asyncio.run(self._read_pipe(self._stop_event))
        except BrokenPipeError:
            log.error("the client is gone")
        except (KeyboardInterrupt, SystemExit):
            pass
        finally:
            self.shutdown()  # type: ignore[no-untyped-call]

    async def _read_pipe(self, stop: threading.Event) -> None:
        reader = asyncio.StreamReader(limit=_LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        try:
            await run_async(stop, reader, self.protocol, log, self.report_server_error)
        except asyncio.IncompleteReadError:
            log.error("the client broke off in the middle of a message")
        except ValueError:
            log.error("a header line of over %d bytes came; messages begin with Content-Length", _LINE_BYTES)

    def report_server_error(self, error: Exception, source: Any) -> None:
        """Log what went wrong, without values, which may be text of the user's; answer what was no JSON."""
        del source
        if is_unreadable(error):
            self.protocol.report_unreadable()
            return
        # pygls hands over an error of its own, in the middle of handling the one that it stands for.
        error = next((one for one in (sys.exc_info()[1],) if isinstance(one, Exception)), error)
        places = traceback.extract_tb(error.__traceback__)[-4:]
        trail = " < ".join(f"{Path(place.filename).name}:{place.lineno}" for place in reversed(places))
        log.error("%s at %s", type(error).__name__, trail or "an unknown place")


def _are_pipes(given: int, answered: int) -> bool:
    if os.name != "posix":
        return False  # Windows' loop cannot wait for such pipes
    if os.path.sameopenfile(given, answered):
        return False  # one socket for both: reading would make writing fail where it has to wait
    mode = os.fstat(given).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def create_server() -> TabwiseServer:
    """Return a server with all its features."""
    server = TabwiseServer(
        "tabwise",
        __version__,
        text_document_sync_kind=types.TextDocumentSyncKind.Incremental,
        notebook_document_sync=_NOTEBOOKS,
        protocol_cls=TabwiseProtocol,
        converter_factory=get_converter,
    )
    state = State()
    for feature in (synchronize, inline_completion, explain, lifecycle):
        feature.register(server, state)
    return server


def main() -> None:
    """Run the server until the client ends it."""
    parser = argparse.ArgumentParser(
        "tabwise-lsp", description="The Tabwise language server, on standard input and output."
    )
    parser.add_argument(
        "--stdio", action="store_true", help="accepted, since many clients pass it; there is no other way"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--version", action="version", version=f"tabwise-lsp {__version__}")
    options = parser.parse_args()
    logging.basicConfig(
        stream=sys.stderr,
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # These log parameters and payloads, which are text of the user's; clients may log every request.
    logging.getLogger("pygls").setLevel(logging.CRITICAL + 1)
    for noisy in ("aiohttp", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    create_server().start_stdio()


if __name__ == "__main__":
    main()

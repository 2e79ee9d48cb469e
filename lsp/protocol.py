"""JSON-RPC as it should be answered: whatever arrives, a request gets a response, and nothing ends the server.

pygls turns every nested object that has a "jsonrpc" key into a message, drops requests that do not deserialise, keeps
silent after shutdown, and logs parameters, which are text of the user's. Here messages are checked once, at the top, and
each refusal is a response. Document notifications go to our own buffer alone. Knows messages, no features.
"""

import json
import logging
from typing import Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.protocol import LanguageServerProtocol

log = logging.getLogger(__name__)

_OURS = (
    types.TEXT_DOCUMENT_DID_OPEN,
    types.TEXT_DOCUMENT_DID_CHANGE,
    types.TEXT_DOCUMENT_DID_CLOSE,
    types.NOTEBOOK_DOCUMENT_DID_OPEN,
    types.NOTEBOOK_DOCUMENT_DID_CHANGE,
    types.NOTEBOOK_DOCUMENT_DID_CLOSE,
    # pygls's own cannot be cancelled: the cancel ends the generator around the command, not the command.
    types.WORKSPACE_EXECUTE_COMMAND,
)

_PARSE_ERROR = types.ErrorCodes.ParseError
_INVALID_REQUEST = types.ErrorCodes.InvalidRequest
_INVALID_PARAMS = types.ErrorCodes.InvalidParams
_NOT_INITIALIZED = types.ErrorCodes.ServerNotInitialized


class TabwiseProtocol(LanguageServerProtocol):
    """The protocol of our language server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the document notifications away from pygls's workspace."""
        super().__init__(*args, **kwargs)
        self._initialized = False
        for method in _OURS:
            self.fm.builtin_features.pop(method, None)

    def structure_message(self, data: dict[str, Any]) -> Any:
        """Leave objects as they are: pygls calls this for every one, however deep it lies."""
        return data

    def handle_message(self, message: Any) -> None:
        """Answer a message, or refuse it."""
        refusal = self._refusal(message)
        if refusal is not None:
            code, reason = refusal
            self._refuse(message, code, reason)
            return
        message = self._with_params(message)
        try:
            structured = super().structure_message(message)
        except JsonRpcException:
            self._refuse(message, _INVALID_PARAMS, "the parameters do not fit the method")
            return
        if message.get("method") == types.INITIALIZE:
            self._initialized = True
        super().handle_message(structured)

    def report_unreadable(self) -> None:
        """Answer a message that is no JSON."""
        self._refuse(None, _PARSE_ERROR, "the message is not JSON")

    def _refusal(self, message: Any) -> tuple[int, str] | None:
        if not isinstance(message, dict):
            return _INVALID_REQUEST, "a message is a JSON object; batches are not supported"
        if message.get("jsonrpc") != self.VERSION:
            return _INVALID_REQUEST, 'a message has "jsonrpc": "2.0"'
        method = message.get("method")
        if method is None:
            return self._wrong_response(message)
        if not isinstance(method, str):
            return _INVALID_REQUEST, "the method is not a string"
        is_request = "id" in message
        if is_request and not _is_id(message["id"]):
            return _INVALID_REQUEST, "the id is neither an integer nor a string"
        if not isinstance(message.get("params"), (dict, list, type(None))):
            return _INVALID_PARAMS, "the parameters are neither an object nor an array"
        if is_request and self._is_notification(method):
            return _INVALID_REQUEST, "this method is a notification and takes no id"
        if self._shutdown and is_request:
            return _INVALID_REQUEST, "the server is shutting down"
        if not self._initialized and method not in (types.INITIALIZE, types.EXIT):
            return _NOT_INITIALIZED, "the first request must be initialize"
        if self._initialized and method == types.INITIALIZE:
            return _INVALID_REQUEST, "the server is initialized already"
        return None

    def _is_notification(self, method: str) -> bool:
        kind = self.get_message_type(method)
        return kind is not None and not hasattr(kind, "id")

    def _wrong_response(self, message: dict[str, Any]) -> tuple[int, str] | None:
        if not _is_id(message.get("id")) or not ("result" in message or "error" in message):
            return _INVALID_REQUEST, "a message has a method, or an id and a result or error"
        if message["id"] not in self._request_futures:
            return _INVALID_REQUEST, "a response to no request of ours"
        return None

    def _with_params(self, message: dict[str, Any]) -> dict[str, Any]:
        method = message.get("method")
        if method is not None and self.get_message_type(method) is None:
            return {"params": None} | message  # pygls's type for methods it does not know has no default
        return message

    def _refuse(self, message: Any, code: int, reason: str) -> None:
        fields = message if isinstance(message, dict) else {}
        log.warning("refused a message: %s", reason)
        if fields and "method" not in fields and ("result" in fields or "error" in fields):
            return  # a response: answering it could begin a quarrel without end
        if isinstance(fields.get("method"), str) and "id" not in fields and fields.get("jsonrpc") == self.VERSION:
            return  # a notification: JSON-RPC wants no answer to it
        msg_id = fields.get("id")
        error = {"code": int(code), "message": reason}
        self._send_data({"jsonrpc": self.VERSION, "id": msg_id if _is_id(msg_id) else None, "error": error})


def is_unreadable(error: Exception) -> bool:
    """Tell whether an error says that a message was no JSON."""
    return isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError))


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)

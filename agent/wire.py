"""How requests and answers look on the wire: JSON objects, streams of JSON lines, errors. Shared by daemon and client.

Knows encodings, no routes. A stream of lines holds `{"text": …}` any number of times and ends with one line that holds
the answer, or `{"error": …}`.
"""

import json
import re
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from agent.errors import RequestError, TabwiseError, from_wire

T = TypeVar("T")

_SURROGATES = re.compile("[\ud800-\udfff]")

API = 4
"""Version of the daemon's own routes; a client of another one replaces the daemon."""


def line(**fields: Any) -> bytes:
    """Return one line of a stream."""
    # ASCII: readers of lines take U+2028 and its like for the end of one.
    return json.dumps(fields, default=_plain, separators=(",", ":")).encode() + b"\n"


def body(request: Any) -> bytes:
    """Return a dataclass as a request's body; halves of surrogate pairs, which are no text, become U+FFFD."""
    return _SURROGATES.sub("\ufffd", json.dumps(request, ensure_ascii=False, default=_plain)).encode()


def error_fields(error: TabwiseError) -> dict[str, str]:
    """Return an error as it travels."""
    return {"code": error.code, "message": str(error)}


def error_from(fields: dict[str, Any]) -> TabwiseError:
    """Return the error that travelled as `fields`."""
    return from_wire(str(fields.get("code")), str(fields.get("message")))


def structure(kind: type[T], data: bytes | dict[str, Any]) -> T:
    """Turn JSON into a dataclass or model.

    Raises:
        RequestError: It does not fit; names every field that is wrong, and no text of documents.
    """
    adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # a class can be hashed
    try:
        return adapter.validate_json(data) if isinstance(data, bytes) else adapter.validate_python(data)
    except ValidationError as error:
        # Without the values: they may be text of the user's, and messages go to the log.
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors())
        raise RequestError(f"the request does not fit {kind.__name__}: {wrong}") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # takes milliseconds to make


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as a dictionary that JSON can hold."""
    fields: dict[str, Any] = json.loads(json.dumps(value, default=_plain))
    return fields


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"cannot send a {type(value).__name__}")

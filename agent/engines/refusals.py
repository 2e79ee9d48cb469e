"""What may be told of a server's refusal: messages of servers quote requests, and errors go into logs.

Pure but for the reading of a body. Knows words that servers use, no routes; which requests hold text of the user's, the
caller knows.
"""

import json
from typing import Any

import aiohttp

_REASON_BYTES = 1 << 16  # of a refusal's body
_REASON_CHARS = 200  # of it in a message of one line
_CODES = frozenset(
    # OpenAI's, and of those that followed it.
    "invalid_request_error authentication_error permission_error not_found_error rate_limit_error rate_limit_exceeded "
    "insufficient_quota server_error internal_error api_error overloaded_error timeout_error model_not_found invalid_api_key "
    "context_length_exceeded unsupported_parameter "
    # llama-server's.
    "unavailable_error not_supported_error exceed_context_size_error "
    # vLLM's.
    "BadRequestError NotFoundError InternalServerError NotImplementedError UnprocessableEntityError".split()
)
"""Kinds of refusals that may be told. Any other word may be an identifier of the user's, or the token."""
_KINDS = frozenset({"application/json", "application/x-ndjson", "application/problem+json", "text/html", "text/plain"})
"""Kinds of contents that may be told, for the same reason."""


async def read(answer: aiohttp.ClientResponse) -> Any:
    """Return the JSON of a refusal's body; None where it has none."""
    received = b""
    try:
        while len(received) < _REASON_BYTES and (part := await answer.content.readany()):
            received += part
        return json.loads(received[:_REASON_BYTES])
    except (aiohttp.ClientError, ValueError, RecursionError):
        return None  # the status says what there is to say


def kind(content_type: str) -> str:
    """Return a kind of contents as it may be told."""
    return content_type if content_type in _KINDS else "something else"


def codes(fields: Any) -> str:
    """Return the known codes of a refusal, as a message goes on with them; of one that may quote text of the user's."""
    inner = fields.get("error", fields) if isinstance(fields, dict) else None
    if not isinstance(inner, dict):
        return ""
    words = [inner.get(name) for name in ("type", "code")]
    told = [word for word in words if isinstance(word, str) and word in _CODES]
    return f", {', '.join(dict.fromkeys(told))}" if told else ""


def reason(fields: Any, token: str | None) -> str:
    """Return what a refusal says, as a message goes on with it; `token` is not repeated."""
    inner = fields.get("error", fields) if isinstance(fields, dict) else None
    said = inner.get("message") if isinstance(inner, dict) else inner
    if not isinstance(said, str) or not said.strip():
        return ""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in said).split())
    if token:
        text = text.replace(token, "…")
    return f": {text[:_REASON_CHARS]}"

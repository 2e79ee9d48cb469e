"""Server-sent events, taken apart as their bytes arrive. Pure: bytes in, data of whole events out.

Knows the framing alone, not what the data mean. Comments, which servers send to keep a connection open, yield nothing, so
that whoever waits for data is not told that some came. Source: the HTML standard, section 9.2.
"""

import re

EVENT_BYTES = 1 << 20
"""Longest event that is taken: one token with 40 alternatives has 5 KB."""
_LINE_END = re.compile(rb"\r\n|\n|\r")


class TooLongError(ValueError):
    """An event has no end within `EVENT_BYTES`."""


class Events:
    """One stream of events."""

    def __init__(self) -> None:
        """Begin at the beginning of a stream."""
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that `received` completes.

        Raises:
            TooLongError: An event is longer than any that could be meant.
        """
        found: list[bytes] = []
        text, place = self._rest + received, 0
        for end in _LINE_END.finditer(text):
            if end.group() == b"\r" and end.end() == len(text):
                break  # the other half of a line's end may still come
            self._line(text[place : end.start()], found)
            place = end.end()
        self._rest = text[place:]
        if len(self._rest) + self._size > EVENT_BYTES:
            raise TooLongError
        return found

    def _line(self, line: bytes, found: list[bytes]) -> None:
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
            self._data, self._size = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(line)
            if self._size > EVENT_BYTES:
                raise TooLongError

import json
import random

import pytest

from agent.engines import sse

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a": 1}\n\n'
    b"event: ping\r\nid: 3\r\nretry: 10\r\n\r\n"
    b'data:{"b":\rdata: 2}\r\r'
    b"data: \xf0\x9f\x99\x82 {}\n\n"
    b"data\n\n"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = [b'{"a": 1}', b'{"b":\n2}', "🙂 {}".encode(), b"", b"[DONE]"]


def test_events_are_taken_apart_and_comments_are_none() -> None:
    assert sse.Events().feed(STREAM) == EVENTS
    assert json.loads(EVENTS[1]) == {"b": 2}


def test_where_the_bytes_were_cut_makes_no_difference() -> None:
    rng = random.Random(1)
    for _ in range(200):
        events, found, place = sse.Events(), [], 0
        while place < len(STREAM):
            step = rng.randint(1, 9)
            found += events.feed(STREAM[place : place + step])
            place += step
        assert found == EVENTS


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_event_without_end_is_given_up(end: bytes) -> None:
    events = sse.Events()
    for _ in range(10):
        assert events.feed(b"data: " + b"x" * 100_000 + end) == []
    with pytest.raises(sse.TooLongError):
        events.feed(b"data: " + b"x" * 100_000 + end)


def test_a_long_stream_of_short_events_is_none_too_long() -> None:
    events = sse.Events()
    assert sum(len(events.feed(b"data: " + b"x" * 1000 + b"\n\n")) for _ in range(3000)) == 3000

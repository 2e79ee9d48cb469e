"""Ghost text for one editor: what is known already, what is being written, and what must be asked for.

A request is first answered from the cache; where an engine is writing what was typed so far, it is joined; otherwise the
engine is asked, and what it was writing for this document is given up. An answer may be given while its text still
grows, to clients that can ask again when it is whole. When nobody waits, the engine writes what follows the text on
screen, and reads the place where the cursor rests. Knows no protocol.

Invariant: for each document at most one stream of the daemon writes.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from agent import postprocess
from agent.context import Surroundings
from agent.errors import TabwiseError
from agent.types import Completion, CompletionRequest, Snippet, StopReason, Trigger
from agent.types import Document as DocumentFacts
from lsp import anchors, triggers
from lsp.agent_link import AgentLink
from lsp.anchors import LIVE_CHARS, Anchor, Around
from lsp.cache import Cache, Entry, Key
from lsp.documents import Document, Place
from lsp.triggers import Patience, Rhythm, Shown

log = logging.getLogger(__name__)

_EARLY_S = 0.05
"""A client that can ask again gets what is there after this long. A tenth of a second is felt as at once, so what grows
within it is not seen growing; later comes after a fast typist's next key."""
_EARLY_CHARS = 2  # visible ones; as the filters hold it for whole texts
_AFTER_S = 0.003  # an answer takes as long to be written
_GRACE_S = 0.3  # for the next request to come and join what the one that was cancelled waited for
_REST_S = 0.05  # after which a cursor that moved is taken to rest
_REANCHOR_S = 0.7  # without a key, before a longer prompt is read; who pauses for so long thinks
_ANCHORS = 4  # of a document that are remembered: what is typed at, what was before, and where a closer came and went
_SESSIONS = 64  # documents whose completions are kept


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the features make it."""

    document: Document
    facts: DocumentFacts
    place: Place
    around: Around
    trigger: Trigger
    is_hypothetical: bool = False
    """Whether the document holds text before the cursor that is chosen in a list, and not there yet."""
    deleted: bool = False
    """Whether the last change took text away."""
    refreshes: bool = False
    """Whether the client asks again when it is told that a text has grown."""
    activity_ms: int = 0


@dataclass(frozen=True, slots=True)
class Offer:
    """What to show."""

    text: str
    replaced_chars: int


@dataclass(slots=True)
class _Writing:
    """A stream of the daemon's that writes an entry."""

    key: Key
    entry: Entry
    anchor: Anchor
    ahead: bool
    task: asyncio.Task[None] | None = None
    grew: asyncio.Event = field(default_factory=asyncio.Event)

    def is_for(self, around: Surroundings) -> bool:
        """Tell whether it writes at this anchor, by whatever trigger."""
        return any(self.key == _key(around, trigger) for trigger in Trigger)

    def tell(self) -> None:
        """Wake whoever waits for more."""
        self.grew.set()
        self.grew = asyncio.Event()


@dataclass(slots=True)
class _Session:
    """One document."""

    cache: Cache = field(default_factory=Cache)
    anchor: Anchor | None = None
    visited: Anchor | None = None
    """Where the cursor came to rest last; it becomes the anchor once its prompt is read, or somebody types there."""
    earlier: tuple[Anchor, ...] = ()
    """Anchors that were typed at before, the latest first."""
    at: tuple[int, Place] | None = None
    """Where the cursor is, as far as it was told, and in which version of the document."""
    writing: _Writing | None = None
    waiting: int = 0
    """Requests that wait for what is being written."""
    shown: Shown | None = None
    partial: tuple[Asked, str] | None = None
    """A request that was answered while its text still grew, and the answer."""
    resting: asyncio.Task[None] | None = None
    next: asyncio.TimerHandle | None = None
    """Looks ahead in a moment."""
    _closed: bool = False

    def anchors(self) -> tuple[Anchor, ...]:
        """Anchors that may still hold, the one that was typed at last first."""
        return tuple(anchor for anchor in (self.anchor, self.visited, *self.earlier) if anchor is not None)

    def take(self, anchor: Anchor) -> None:
        """Type at an anchor from now on."""
        others = [one for one in (self.anchor, *self.earlier) if one is not None and not one.is_at(anchor)]
        self.anchor, self.earlier = anchor, tuple(others[: _ANCHORS - 1])

    def was_brief(self, anchor: Anchor, *, brief: bool) -> None:
        """Take note of how long a prompt was; the engine may have lost the long one."""
        if brief and self.anchor is not None and self.anchor.is_at(anchor):
            self.anchor = replace(self.anchor, brief=True, snippets=())

    def move_texts(self, before: Anchor | None, anchor: Anchor) -> None:
        """Take what is known at an anchor over to one further down, if nothing else lies between them."""
        if before is None or before.suffix != anchor.suffix or before.head == anchor.head:
            return
        if anchor.head.startswith(before.head):
            above = anchor.head[len(before.head) :]
            self.cache.move((before.head, before.suffix), (anchor.head, anchor.suffix), above)

    def close(self) -> None:
        """The document is closed: nothing new begins for it."""
        self._closed = True

    def is_closed(self) -> bool:
        """Tell whether it is; a call, since that changes while one waits."""
        return self._closed


class Completions:
    """The completions of one editor."""

    def __init__(
        self,
        link: AgentLink,
        clock: Callable[[], float] = time.monotonic,
        elsewhere: Callable[[Asked], Awaitable[tuple[Snippet, ...]]] | None = None,
    ) -> None:
        """Know nothing yet.

        Args:
            link: The line to the daemon.
            clock: Seconds, from anywhere on.
            elsewhere: Returns what stands elsewhere and helps at a cursor; asked when a long prompt is read.
        """
        self.on_grown: Callable[[Document], None] | None = None
        """Called when a text that was answered early is whole."""
        self.rhythm = Rhythm()
        self.patience = Patience()
        self._link = link
        self._elsewhere = elsewhere
        self._clock = clock
        self._sessions: dict[str, _Session] = {}
        self._adapter: str | None = None
        """What the daemon answered with last, and so wrote all that is kept."""

    def close(self) -> None:
        """The editor leaves: nothing is written or read any more."""
        for uri in list(self._sessions):
            self.forget(uri)

    def forget(self, uri: str) -> None:
        """A document was closed."""
        session = self._sessions.pop(uri, None)
        if session is not None:
            session.close()
            self._give_up(session)
            self._disturb(session)

    def look_again(self) -> None:
        """What may stand in prompts has changed: nothing of what was chosen before does any more."""
        for session in self._sessions.values():
            self._disturb(session)
            if session.anchor is not None:
                session.anchor = replace(session.anchor, brief=True, snippets=())
            session.earlier = ()

    async def offer(self, asked: Asked) -> Offer | None:
        """Return what to show at a cursor, or None for nothing; a daemon that has no answer is told to the log."""
        session = self._session(asked.document.uri)
        self._come_to(session)
        session.partial = None
        session.at = at = (asked.document.version, asked.place)
        before = session.anchor
        anchor, around = anchors.anchored(asked.document, asked.place, session.anchors(), asked.around)
        session.move_texts(before, anchor)
        session.take(anchor)
        key = _key(around, asked.trigger)
        if session.cache.has(by_key := _key(around, Trigger.MANUAL), around.live):
            key = by_key  # a text that was asked for by key stays for as long as what is typed fits
        self._learn(session, key, around.live)
        entry = await self._known(session, asked, key, around, anchor)
        if entry is None:
            return None
        piece = entry.piece(around.live)
        text, _ = postprocess.present(piece, around)
        if asked.trigger is Trigger.AUTOMATIC and self.patience.was_rejected((key, around.live), text):
            text = ""
        settled = entry.is_settled(around.live)
        session.partial = None if settled else (asked, text)
        if text:
            session.shown = Shown(key, around.live, text, self._clock())
        if settled and session.at == at and not session.is_closed():
            # Once the answer is on its way.
            self._disturb(session)
            loop = asyncio.get_running_loop()
            session.next = loop.call_later(_AFTER_S, self._look_ahead, session, asked, key, entry, around)
        return Offer(text, postprocess.replaced_chars(text, around)) if text else None

    def rest(self, asked: Asked) -> None:
        """The cursor moved without a key: have its place read, in case somebody types there."""
        session = self._session(asked.document.uri)
        at = (asked.document.version, asked.place)
        if session.at == at:
            return  # it has not moved: editors tell of a cursor that went along with a key
        self._come_to(session)
        session.at, session.partial = at, None
        session.resting = asyncio.create_task(self._read(session, asked, _REST_S))

    async def _known(
        self, session: _Session, asked: Asked, key: Key, around: Surroundings, anchor: Anchor
    ) -> Entry | None:
        """Return the entry with what follows the live text, once there is enough of it; None where nothing does."""
        live = around.live
        early = self._clock() + _EARLY_S if asked.refreshes else None
        may_ask = True
        session.waiting += 1
        try:
            while not session.is_closed():
                entry = session.cache.find(key, live)
                writing = session.writing
                if entry is not None and entry.piece(live) and entry.is_settled(live):
                    return entry
                if entry is not None and not entry.growing and entry.ended:
                    return entry
                if entry is not None and entry.growing and writing is not None and writing.entry is entry:
                    left = None if early is None or not _is_visible(entry.piece(live)) else early - self._clock()
                    if left is not None and left <= 0:
                        return entry
                    await _wait(writing.grew, left)
                    continue
                if not may_ask or (asked.trigger is Trigger.AUTOMATIC and triggers.is_in_the_way(around)):
                    return entry
                may_ask = False
                if wait_s := self._wait_s(asked):
                    await asyncio.sleep(wait_s)
                    if session.is_closed():
                        break
                self._ask(session, asked, key, around, anchor)
            return None
        except asyncio.CancelledError:
            if session.writing is not None and not session.writing.ahead:
                asyncio.get_running_loop().call_later(_GRACE_S, self._give_up_unwanted, session, session.writing)
            raise
        finally:
            session.waiting -= 1

    def _wait_s(self, asked: Asked) -> float:
        if asked.trigger is Trigger.MANUAL:
            return 0.0
        now = self._clock()
        return max(self.rhythm.wait_s(), self.patience.wait_s(now), triggers.wait_after_deletion_s(asked.deleted))

    def _ask(self, session: _Session, asked: Asked, key: Key, around: Surroundings, anchor: Anchor) -> None:
        self._give_up(session)
        entry = session.cache.add(key, around.live)
        request = _request(asked, around, around.live, anchor)
        self._write(session, _Writing(key, entry, anchor, ahead=False), request)

    def _look_ahead(self, session: _Session, asked: Asked, key: Key, entry: Entry, around: Surroundings) -> None:
        """Have written what follows the text on screen, as if it were accepted."""
        on_screen = len(around.live) + len(entry.piece(around.live))
        nobody_types_here = triggers.is_in_the_way(around)
        anchor, done = session.anchor, entry.ended or on_screen < len(entry.text)
        if anchor is None or session.writing is not None or done or nobody_types_here:
            self._move_anchor(session, asked, around)
            return
        entry.growing = True
        request = _request(asked, around, entry.text, anchor, ahead=True)
        self._write(session, _Writing(key, entry, anchor, ahead=True), request)
        self._move_anchor(session, asked, around)

    def _move_anchor(self, session: _Session, asked: Asked, around: Surroundings) -> None:
        anchor = session.anchor
        if anchor is not None and not asked.is_hypothetical and (anchor.brief or len(around.live) > LIVE_CHARS // 2):
            self._disturb(session)
            session.resting = asyncio.create_task(self._read(session, asked, _REANCHOR_S))

    async def _read(self, session: _Session, asked: Asked, after_s: float) -> None:
        """Have the prompt of a place read into the engine's cache: a short one first where nothing of it is there."""
        await asyncio.sleep(after_s)
        anchor, around = anchors.anchored(asked.document, asked.place, session.anchors(), asked.around)
        writing = session.writing
        if writing is not None and not session.waiting and not writing.is_for(around):
            self._give_up(session)  # the cursor has left the place
        elif writing is not None and writing.task is not None:
            await asyncio.wait({writing.task})
        old = session.anchor
        if anchor is not old:
            session.visited = anchor
        if anchor is old and len(around.live) > LIVE_CHARS // 2:
            anchor, around = anchors.anew(asked.document, asked.place, asked.around)
            lengths: tuple[bool, ...] = (False,)
        elif anchor is old and not anchor.brief:
            return
        else:
            lengths = (True, False) if anchor is not old and anchor.brief else (False,)
        for brief in lengths:
            if not brief and len(lengths) > 1:
                await asyncio.sleep(_REANCHOR_S)
            snippets = anchor.snippets  # of a long prompt that was read before
            if anchor.brief:
                snippets = () if brief or self._elsewhere is None else await self._elsewhere(asked)
            anchor = replace(anchor, brief=brief, snippets=snippets)
            if not await self._was_read(_request(asked, around, around.live, anchor, ahead=True, max_tokens=0)):
                return
            session.move_texts(old, anchor)
            session.take(anchor)
            old = anchor

    async def _was_read(self, request: CompletionRequest) -> bool:
        try:
            async with aclosing(self._link.complete(request)) as parts:
                # To its end, or the connection could not be used again.
                (answer,) = [part async for part in parts if isinstance(part, Completion)]
        except TabwiseError as error:
            log.info("nothing was read ahead: %s", error)
            return False
        return answer.stop_reason is not StopReason.CANCELLED

    def _write(self, session: _Session, writing: _Writing, request: CompletionRequest) -> None:
        session.writing = writing
        writing.task = asyncio.create_task(self._stream(session, writing, request))

    async def _stream(self, session: _Session, writing: _Writing, request: CompletionRequest) -> None:
        entry, began = writing.entry, self._clock()
        base = len(entry.text)
        done: Completion | None = None
        is_told = writing.ahead  # what is written in advance says nothing of how long one waits
        try:
            async with aclosing(self._link.complete(request)) as parts:
                async for part in parts:
                    if isinstance(part, Completion):
                        done = part
                        # Who waits need not wait for the stream's end; it is read, or the connection would be lost.
                        self._settle(session, writing, base, done)
                        continue
                    if not is_told:
                        self.rhythm.first_text(self._clock() - began)
                        is_told = True
                    entry.text += part
                    writing.tell()
        except asyncio.CancelledError:
            if not is_told:
                self.rhythm.gave_up(self._clock() - began)
            raise
        except TabwiseError as error:
            log.error("no completion: %s", error)
        finally:
            if done is None:
                self._settle(session, writing, base, None)

    def _settle(self, session: _Session, writing: _Writing, base: int, done: Completion | None) -> None:
        if session.writing is not writing:
            return  # it was given up, and its entry may be written by another one already
        entry = writing.entry
        entry.growing = False
        session.writing = None
        if done is None or done.stop_reason is StopReason.CANCELLED:
            self._take_back(session, writing)
        else:
            session.was_brief(writing.anchor, brief=done.brief)
            if done.adapter != self._adapter:
                self._forget_texts(done.adapter)
                if not writing.ahead:  # what was written in advance continues a text of the other adapter's
                    session.cache.put(writing.key, entry)
            entry.settle(base, done.settled, done.beyond)
            entry.ended = not done.settled or done.stop_reason in _NOTHING_FOLLOWS
        writing.tell()
        if session.partial is not None:
            asked, _ = session.partial
            session.partial = None
            if self.on_grown is not None:
                self.on_grown(asked.document)

    def _forget_texts(self, adapter: str | None) -> None:
        """The daemon answers with another adapter: all that is kept was written by the one before."""
        self._adapter = adapter
        for session in self._sessions.values():
            session.cache.clear()

    def _learn(self, session: _Session, key: Key, live: str) -> None:
        shown, now = session.shown, self._clock()
        if shown is None:
            return
        fate = shown.fate(key, live, now)
        if fate is None:
            if key != shown.key or not live.startswith(shown.live):
                session.shown = None
            return
        session.shown = None
        if fate:
            self.patience.accepted(now)
        else:
            self.patience.rejected((shown.key, shown.live), shown.text, now)

    def _session(self, uri: str) -> _Session:
        session = self._sessions.pop(uri, None) or _Session()
        self._sessions[uri] = session
        while len(self._sessions) > _SESSIONS:
            self.forget(next(iter(self._sessions)))
        return session

    def _give_up_unwanted(self, session: _Session, writing: _Writing) -> None:
        if session.writing is writing and not session.waiting and session.partial is None:
            self._give_up(session)

    def _give_up(self, session: _Session) -> None:
        writing, session.writing = session.writing, None
        if writing is not None and writing.task is not None:
            writing.task.cancel()
            # Here, too: a task that had not begun yet never gets to its end.
            self._take_back(session, writing)
            writing.tell()

    def _take_back(self, session: _Session, writing: _Writing) -> None:
        """Leave of an entry only the pieces that are whole."""
        entry = writing.entry
        entry.growing, entry.text = False, entry.text[: entry.end]
        if not writing.ahead and entry.end == entry.start:
            session.cache.drop(writing.key, entry)

    def _come_to(self, session: _Session) -> None:
        """The user is at a document: nothing is done in advance for it, nor for any other, before it is known where."""
        for other in self._sessions.values():
            self._disturb(other)
            if other is not session and other.writing is not None and other.writing.ahead and not other.waiting:
                self._give_up(other)

    def _disturb(self, session: _Session) -> None:
        if session.next is not None:
            session.next.cancel()
            session.next = None
        if session.resting is not None:
            session.resting.cancel()
            session.resting = None


_NOTHING_FOLLOWS = {StopReason.END, StopReason.SUFFIX, StopReason.REPETITION}


def _key(around: Surroundings, trigger: Trigger) -> Key:
    # What is asked for by key may have several lines where other requests have one.
    return (around.head, around.suffix + ("\0" if trigger is Trigger.MANUAL else ""))


def _request(
    asked: Asked,
    around: Surroundings,
    live: str,
    anchor: Anchor,
    *,
    ahead: bool = False,
    max_tokens: int | None = None,
) -> CompletionRequest:
    return CompletionRequest(
        id=uuid.uuid4().hex,
        document=asked.facts,
        prefix=around.head + live,
        suffix=around.closers + around.suffix if live == around.live else around.suffix,
        snippets=anchor.snippets,
        trigger=asked.trigger,
        anchor=len(around.head),
        activity_ms=asked.activity_ms,
        brief=anchor.brief,
        impatient=max_tokens is None,
        ahead=ahead,
        max_tokens=max_tokens,
    )


def _is_visible(text: str) -> bool:
    return len("".join(text.split())) >= _EARLY_CHARS


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return

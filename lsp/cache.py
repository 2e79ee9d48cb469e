"""Completions that were written for a place, kept for what is typed next.

Under one anchor and one suffix, texts that begin at the anchor: the live text at which a completion was asked for, then
the completion. Whatever is typed, the text that begins with it has the rest: that is typing through a completion,
accepting it in part, and coming back to it after a slip, all without the engine. A text may still be growing while an
engine writes it, and grows further when its continuation is asked for in advance. Pure: knows no engine and no clock.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

_PLACES = 32  # anchors that are remembered: more than anybody goes back to
_TEXTS = 64  # for each of them: all that an hour at one place brings

Key = tuple[str, str]
"""Text above the anchor, and behind the cursor."""


@dataclass(slots=True)
class Entry:
    """What is known to follow some live text."""

    text: str
    """From the anchor on."""
    start: int
    """Length of the live text at which it was asked for."""
    cuts: list[int] = field(default_factory=list)
    """Ends of the pieces of `text` that are shown one after the other, ascending."""
    growing: bool = True
    """Whether an engine is writing it."""
    ended: bool = False
    """Whether nothing is known to follow: the model ended it, or what it wrote was not worth showing."""

    def fits(self, live: str) -> bool:
        """Tell whether this is what follows `live`, or may be once it has grown."""
        if len(live) < self.start:
            return False
        return self.text.startswith(live) or (self.growing and live.startswith(self.text))

    def piece(self, live: str) -> str:
        """Return what is to be shown behind `live`: up to the next cut, or as far as it has grown."""
        cut = next((cut for cut in self.cuts if cut > len(live)), len(self.text))
        return self.text[len(live) : cut]

    def is_settled(self, live: str) -> bool:
        """Tell whether the piece behind `live` will not change any more."""
        return not self.growing or any(cut > len(live) for cut in self.cuts)

    @property
    def end(self) -> int:
        """End of the last piece."""
        return self.cuts[-1] if self.cuts else self.start

    def settle(self, base: int, text: str, beyond: str = "") -> None:
        """Replace what has grown behind `base` by the text as it is after the filters.

        Args:
            base: Length of `text` when the engine began.
            text: The whole piece; empty where nothing is to be shown.
            beyond: Whole lines that follow it.
        """
        self.text = self.text[:base] + text
        if text:
            self.cuts.append(len(self.text))
        if text and beyond.strip():
            self.text += beyond
            self.cuts.append(len(self.text))


class Cache:
    """The completions of one document."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._places: OrderedDict[Key, list[Entry]] = OrderedDict()

    def find(self, key: Key, live: str) -> Entry | None:
        """Return what follows `live`; where there are several, the one that was asked for last."""
        found = next((entry for entry in reversed(self._places.get(key, ())) if entry.fits(live)), None)
        if found is not None:
            self._places.move_to_end(key)
        return found

    def has(self, key: Key, live: str) -> bool:
        """Tell whether there is something to show behind `live`, or soon will be."""
        return any(entry.fits(live) and (entry.growing or entry.piece(live)) for entry in self._places.get(key, ()))

    def add(self, key: Key, live: str) -> Entry:
        """Return a new entry that grows behind `live`."""
        entry = Entry(live, len(live))
        entries = self._places.setdefault(key, [])
        entries.append(entry)
        del entries[:-_TEXTS]
        self._places.move_to_end(key)
        while len(self._places) > _PLACES:
            self._places.popitem(last=False)
        return entry

    def clear(self) -> None:
        """Forget everything."""
        self._places.clear()

    def put(self, key: Key, entry: Entry) -> None:
        """Take in an entry that was forgotten."""
        self._places.setdefault(key, []).append(entry)

    def drop(self, key: Key, entry: Entry) -> None:
        """Forget an entry."""
        entries = self._places.get(key, [])
        if entry in entries:
            entries.remove(entry)

    def move(self, key: Key, to: Key, above: str) -> None:
        """Take the entries of an anchor over to one further down, `above` being the text between the two."""
        for entry in self._places.get(key, ()):
            if entry.text.startswith(above) and entry.start >= len(above) and not entry.growing:
                moved = self.add(to, entry.text[len(above) :])
                moved.start, moved.growing, moved.ended = entry.start - len(above), False, entry.ended
                moved.cuts = [cut - len(above) for cut in entry.cuts]

"""Which of an engine's slots takes a prompt: the one that has most of it already, unless it is in use for another place.

Knows token ids and adapters' names, no engine: it remembers what each slot was asked last, and trusts that the slot still
holds it. What was computed with another adapter, or with none, is of no use.
"""

from collections.abc import Sequence

_SAME_PLACE = 0.75
"""Share of a prompt that a slot must hold to be taken for work in advance. Typing on holds all of it but a token or two;
another anchor in the same document holds no more than the text above, about two thirds."""
_SAME_DOCUMENT = 0.25
"""The same for requests that somebody waits for. What prompts of two documents have in common is how they begin, a licence
at most: taking a slot for that would lose more than it spares."""


class Slots:
    """What the slots for completions hold."""

    def __init__(self, count: int) -> None:
        """Hold nothing yet, in `count` slots."""
        self._held: list[tuple[int, ...]] = [()] * count
        self._adapters: list[str | None] = [None] * count  # that these were computed with
        self._read = [0] * count  # tokens of these that were computed; fewer where reading was broken off
        self._used = [0] * count  # at which request each was used last
        self._requests = 0

    def choose(self, prompt_ids: tuple[int, ...], adapter: str | None = None, *, ahead: bool) -> tuple[int, int]:
        """Return the slot for a prompt and how many of its tokens that holds, and take note of it.

        Args:
            prompt_ids: The prompt.
            adapter: The adapter that is asked; None for the bare model.
            ahead: Whether nobody waits for it. Then the prompt that was used last must not be lost for it.
        """
        self._requests += 1
        shared = [self._shared(slot, prompt_ids, adapter) for slot in range(len(self._held))]
        slots = range(len(self._held))
        best = max(slots, key=lambda slot: (shared[slot], -self._used[slot]))
        if shared[best] < (_SAME_PLACE if ahead else _SAME_DOCUMENT) * len(prompt_ids):
            best = min(slots, key=lambda slot: self._used[slot])
        held = min(shared[best], self._read[best])
        self._held[best], self._read[best], self._adapters[best] = prompt_ids, held, adapter
        self._used[best] = self._requests
        return best, held

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many of a prompt's tokens are computed, with this adapter, in the slot that has most of them."""
        slots = range(len(self._held))
        return max(min(self._shared(slot, prompt_ids, adapter), self._read[slot]) for slot in slots)

    def read(self, slot: int, count: int) -> None:
        """Take note that so much of a slot's prompt is computed."""
        self._read[slot] = count

    def _shared(self, slot: int, prompt_ids: tuple[int, ...], adapter: str | None) -> int:
        return common(self._held[slot], prompt_ids) if self._adapters[slot] == adapter else 0


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    shortest = min(len(one), len(other))
    if one[:shortest] == other[:shortest]:
        return shortest
    return next((index for index in range(shortest) if one[index] != other[index]), shortest)

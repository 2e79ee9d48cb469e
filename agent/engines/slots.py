"""Which of an engine's slots takes a prompt: the one that has most of it already, unless it is in use for another place.

Knows token ids, no engine: it remembers what each slot was asked last, and trusts that the slot still holds it.
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
        self._read = [0] * count  # tokens of these that were computed; fewer where reading was broken off
        self._used = [0] * count  # at which request each was used last
        self._requests = 0

    def choose(self, prompt_ids: tuple[int, ...], *, ahead: bool) -> tuple[int, int]:
        """Return the slot for a prompt and how many of its tokens that holds, and take note of it.

        Args:
            prompt_ids: The prompt.
            ahead: Whether nobody waits for it. Then the prompt that was used last must not be lost for it.
        """
        self._requests += 1
        shared = [common(held, prompt_ids) for held in self._held]
        slots = range(len(self._held))
        best = max(slots, key=lambda slot: (shared[slot], -self._used[slot]))
        if shared[best] < (_SAME_PLACE if ahead else _SAME_DOCUMENT) * len(prompt_ids):
            best = min(slots, key=lambda slot: self._used[slot])
        held = min(shared[best], self._read[best])
        self._held[best], self._read[best] = prompt_ids, held
        self._used[best] = self._requests
        return best, held

    def held(self, prompt_ids: tuple[int, ...]) -> int:
        """Return how many of a prompt's tokens are computed in the slot that has most of them."""
        kept = zip(self._held, self._read, strict=True)
        return max(min(common(held, prompt_ids), read) for held, read in kept)

    def read(self, slot: int, count: int) -> None:
        """Take note that so much of a slot's prompt is computed."""
        self._read[slot] = count


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    shortest = min(len(one), len(other))
    if one[:shortest] == other[:shortest]:
        return shortest
    return next((index for index in range(shortest) if one[index] != other[index]), shortest)

"""Drafts: tokens that are guessed from what the text says already, so that a model can check several in one pass.

Code repeats itself. Where the last tokens stood before, what followed them there is likely to follow again; the model
then reads the guess in one pass, and what it would have chosen itself is kept. Nothing here changes what is written,
only how many passes that takes. Pure: knows token ids, counts and seconds, no model and no clock.

Source of the idea: prompt lookup decoding (Saxena, 2023), after speculative decoding (Leviathan et al., arXiv
2211.17192).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHORTEST_MATCH = 2
"""Tokens that must have stood before. A single one ("(" or a blank) says next to nothing of what follows."""
LONGEST_MATCH = 16
"""Longer matches are as good as this one: what follows them is accepted nearly always."""
LENGTHS = (1, 3, 7, 15)
"""Drafts that are tried: with the token before them, passes of 2, 4, 8 and 16 tokens. Few sizes, so that what each
costs is known soon."""
_LOOKED_AT = 32  # latest places of a pair that are compared; a pair like ") :" stands in a file hundreds of times

_MATCH_CLASSES = (3, 6, 12)  # matches of 2, of 3 to 5, of 6 to 11, and longer ones: each has an acceptance of its own
_FIRST_GUESS = (0.5, 0.65, 0.8, 0.9)  # of these, before anything was seen; a tenth of it goes with each observation
_NEW_WEIGHT = 0.1  # of one observation: some twenty are remembered, about a completion's worth
_COST_WEIGHT = 0.3  # of one timing: other programs disturb single ones
_FORGET = (
    0.003  # of the cost of each other size that is forgotten with each pass: it is tried again after some hundreds
)
_WORTH = 1.1  # least gain for which a draft is made: below, the estimate's error is as large as the gain


@dataclass(frozen=True, slots=True)
class Draft:
    """A guess."""

    ids: tuple[int, ...] = ()
    matched: int = 0
    """How many tokens before it stood before its source, too."""


class History:
    """The tokens of a text so far, and where each pair of them stands."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        """Take the text so far."""
        self.ids: list[int] = []
        self._behind: dict[tuple[int, int], list[int]] = {}
        self._expected: Sequence[int] = ()
        self._met = 0  # of what is expected
        self.extend(ids)

    def expect(self, ids: Sequence[int]) -> None:
        """Take note of what stood behind this very text before; it is the draft for as long as it comes true."""
        self._expected, self._met = ids, 0

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens."""
        for one in ids:
            if self._expected:
                fits = self._met < len(self._expected) and self._expected[self._met] == one
                self._expected, self._met = (self._expected, self._met + 1) if fits else ((), 0)
            if len(self.ids) >= SHORTEST_MATCH:
                # Known only now that something follows it: so the pair at the very end never matches itself.
                self._behind.setdefault((self.ids[-2], self.ids[-1]), []).append(len(self.ids))
            self.ids.append(one)

    def draft(self, most: int) -> Draft:
        """Guess up to `most` tokens: what followed the longest match, and of several as long, the latest.

        A guess that reaches the end of the text goes on with its own beginning, so that a pattern repeats.
        """
        if expected := tuple(self._expected[self._met : self._met + max(0, most)]):
            return Draft(expected, LONGEST_MATCH)
        if most < 1 or len(self.ids) < SHORTEST_MATCH:
            return Draft()
        best, matched = 0, 0
        for place in reversed(self._behind.get((self.ids[-2], self.ids[-1]), ())[-_LOOKED_AT:]):
            length = self._match_before(place)
            if length > matched:
                best, matched = place, length
            if matched == LONGEST_MATCH:
                break
        if not matched:
            return Draft()
        period = len(self.ids) - best
        return Draft(tuple(self.ids[best + index % period] for index in range(most)), matched)

    def _match_before(self, place: int) -> int:
        length = SHORTEST_MATCH
        while length < min(LONGEST_MATCH, place) and self.ids[place - 1 - length] == self.ids[-1 - length]:
            length += 1
        return length


class Acceptance:
    """How often a drafted token was the one that the model chose, by the length of the match."""

    def __init__(self) -> None:
        """Begin with a guess."""
        self._rates = list(_FIRST_GUESS)

    def rate(self, matched: int) -> float:
        """Return the share of tokens that are accepted, between 0 and 1."""
        return self._rates[_match_class(matched)]

    def learn(self, matched: int, *, accepted: int, drafted: int) -> None:
        """Take note of a draft's fate: the accepted tokens, and the one that ended it if there was one."""
        trials = [1.0] * accepted + ([0.0] if accepted < drafted else [])
        place = _match_class(matched)
        for trial in trials:
            self._rates[place] += _NEW_WEIGHT * (trial - self._rates[place])


def _match_class(matched: int) -> int:
    return sum(matched >= bound for bound in _MATCH_CLASSES)


class Costs:
    """How long a pass takes that reads one token, or a few."""

    def __init__(self) -> None:
        """Know nothing: a draft is free until it was seen to cost something, so that it is tried."""
        self._seconds: dict[int, float] = {}
        self._met: set[int] = set()

    def timed(self, n_tokens: int, seconds: float) -> None:
        """Take note of a pass; others than those of `LENGTHS` are not looked at."""
        if n_tokens - 1 not in (0, *LENGTHS):
            return
        if n_tokens not in self._met:
            self._met.add(n_tokens)  # the first pass of a size chooses its kernels, and takes longer than any other
            return
        before = self._seconds.get(n_tokens, seconds)
        self._seconds[n_tokens] = before + _COST_WEIGHT * (seconds - before)
        single = self._seconds.get(1)
        if single is not None:
            for other, cost in self._seconds.items():
                if other not in (1, n_tokens) and cost > single:
                    self._seconds[other] = cost + _FORGET * (single - cost)

    def ratio(self, n_tokens: int) -> float:
        """Return what a pass of so many tokens costs, in passes of one token."""
        single = self._seconds.get(1)
        several = self._seconds.get(n_tokens)
        return several / single if single and several else 1.0


def worthwhile_length(draft: Draft, acceptance: Acceptance, costs: Costs) -> int:
    """Return how many tokens of a draft to let the model check; 0 where plain decoding is as fast.

    With each token accepted at the rate a, a pass over k drafted ones yields 1 + a + … + a^k tokens; it is held against
    what it costs (Leviathan et al., section 3).
    """
    rate = acceptance.rate(draft.matched)
    best, gain = 0, _WORTH
    for length in LENGTHS:
        if length > len(draft.ids):
            break
        yielded = sum(rate**power for power in range(length + 1))
        if (ratio := yielded / costs.ratio(length + 1)) > gain:
            best, gain = length, ratio
    return best


def accepted_length(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many drafted tokens are those that the model chose in their places."""
    return next(
        (index for index, (one, other) in enumerate(zip(drafted, chosen, strict=False)) if one != other), len(drafted)
    )

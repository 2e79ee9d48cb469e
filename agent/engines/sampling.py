"""From logits to tokens: the likeliest, or one by chance that a seed repeats; with log-probabilities and alternatives.

Chance belongs to a place in the text, not to a call: the number drawn for a token depends on the seed and on the token's
position alone. So drafts, a stream that is broken off and taken up again, and a cache change nothing of what is written.
Knows no text.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from agent.errors import EngineError

NAN = "the model computed NaN where it should choose a token; detach its adapter, or try engine.quantisation = fp32"
_LEAST_TEMPERATURE = 1e-4
"""Below, the likeliest token is taken: it would be drawn anyway (a logit that is less by 0.01 has odds of e^-100), and scores
divided by much less are infinite."""
_SEED_BYTES = 8  # of a hash, for a number between 0 and 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was chosen."""

    id: int
    logp: float
    """In nats, of the model's own distribution: before the temperature."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with their log-probabilities, the likeliest first."""


def choose(logits: torch.Tensor, *, temperature: float, seed: int, position: int, n_alternatives: int) -> list[Choice]:
    """Choose a token for each row.

    Args:
        logits: (T, V), of T places that follow one another.
        temperature: 0, or nearly so, for the likeliest token.
        seed: Chooses among the tokens otherwise.
        position: Place of the first of them in the text.
        n_alternatives: How many of the likeliest tokens to report.

    Returns:
        T choices, read from the device in one go; T may be 0.

    Raises:
        EngineError: The model computed something that is no number; its text would be noise.
    """
    if not len(logits):
        return []
    scores = logits.float()
    totals = scores.logsumexp(-1, keepdim=True)  # (T, 1)
    sampled = temperature >= _LEAST_TEMPERATURE
    ids = _draw(scores / temperature, seed, position) if sampled else scores.argmax(-1, keepdim=True)  # (T, 1)
    columns = [ids.double(), (scores.gather(-1, ids) - totals).double()]
    if n_alternatives:
        top = scores.topk(min(n_alternatives, scores.shape[-1]), dim=-1)
        columns += [top.indices.double(), (top.values - totals).double()]
    rows = torch.cat(columns, -1).tolist()  # an id is exact in a double
    if any(math.isnan(row[1]) for row in rows):
        raise EngineError(NAN)
    return [_choice(row) for row in rows]


def _choice(row: list[float]) -> Choice:
    n = (len(row) - 2) // 2
    pairs = zip(row[2 : 2 + n], row[2 + n :], strict=True)
    return Choice(int(row[0]), row[1], tuple((int(one), logp) for one, logp in pairs))


def _draw(scores: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """Return ids (T, 1), drawn from the softmax of `scores` by inversion: one number for each place."""
    shares = scores.double().softmax(-1).cumsum(-1)  # in doubles: 150,000 small shares must add up to one
    numbers = [_number(seed, position + row) for row in range(len(scores))]
    wanted = torch.tensor(numbers, dtype=shares.dtype, device=shares.device).unsqueeze(-1) * shares[:, -1:]
    return torch.searchsorted(shares, wanted, right=True).clamp_(max=scores.shape[-1] - 1)


def _number(seed: int, position: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "big") / float(1 << 8 * _SEED_BYTES)

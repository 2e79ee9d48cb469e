"""What is given up, in which order, when a device has no memory left: comfort first, then length, and never the daemon.

First the caches of other places, which are only read again; then the size of the pieces in which prompts are read; then the
context, so that requests which cannot fit are refused before they fill the memory. Knows caches and numbers, no model.
"""

import logging
import time
from collections.abc import Callable

import torch

from agent.engines import out_of_memory
from agent.engines.kv_cache import PrefixCache, Shelf
from agent.errors import MemoryFullError

log = logging.getLogger(__name__)

_LEAST_CHUNK_TOKENS = 32  # of a prompt read in one pass: below, activations are nothing beside the weights
_LEAST_CONTEXT_TOKENS = 512  # the least that the settings allow
_SHRINK = 0.75  # of the context that was too long
_RECOVER_AFTER_S = 600.0
"""Time after the last shortage when all is tried again. Time and not successful requests: what still fits says nothing of
what was too long, and memory comes back when other programs end, of which nobody tells. Where it doesn't, one request in
ten minutes is refused for it."""


class Headroom:
    """How much an engine may still take."""

    def __init__(
        self,
        shelf: Shelf,
        device: torch.device,
        *,
        context_tokens: int,
        chunk_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with all that the settings allow.

        Args:
            shelf: The engine's caches.
            device: Where they lie.
            context_tokens: Most tokens of prompt and answer together.
            chunk_tokens: Prompt tokens that are read in one pass.
            clock: Tells the time, in seconds.
        """
        self.context_tokens = context_tokens
        self.chunk_tokens = chunk_tokens
        self.device = device
        self._shelf = shelf
        self._allowed = context_tokens, chunk_tokens
        self._clock = clock
        self._short_at: float | None = None

    def recover(self) -> None:
        """Take all that the settings allow again, where the last shortage is long ago."""
        if self._short_at is None or self._clock() - self._short_at < _RECOVER_AFTER_S:
            return
        self._short_at = None
        self.context_tokens, self.chunk_tokens = self._allowed
        log.info("memory on %s was not short for a while: the context is %d again", self.device, self.context_tokens)

    def make_room(self, kept: PrefixCache, needed_tokens: int) -> None:
        """Give up the next thing that takes memory.

        Args:
            kept: The cache of the text under way.
            needed_tokens: Tokens of that text.

        Raises:
            MemoryFullError: There is nothing left to give up. The context is shorter from now on, unless the text was
                so short that a shorter context would not have helped.
        """
        self._short_at = self._clock()
        freed = self._shelf.give_up_others(kept)
        out_of_memory.return_unused(self.device)
        if freed:
            log.warning("memory is full on %s: the caches of other places are given up, %d bytes", self.device, freed)
        elif self.chunk_tokens > _LEAST_CHUNK_TOKENS:
            self.chunk_tokens = max(_LEAST_CHUNK_TOKENS, self.chunk_tokens // 4)
            log.warning("memory is full on %s: prompts are read %d tokens a time", self.device, self.chunk_tokens)
        else:
            raise self._shrink(needed_tokens)

    def _shrink(self, needed: int) -> MemoryFullError:
        if needed <= _LEAST_CONTEXT_TOKENS:
            log.error("memory is full on %s at %d tokens", self.device, needed)
            return out_of_memory.full(self.device, f"{needed} tokens")
        shorter = max(_LEAST_CONTEXT_TOKENS, int(_SHRINK * min(needed, self.context_tokens)))
        self.context_tokens = min(self.context_tokens, shorter)
        log.error("memory is full on %s at %d tokens: the context is %d now", self.device, needed, self.context_tokens)
        return out_of_memory.full(
            self.device, f"{needed} tokens", f"the context is {self.context_tokens} tokens for some minutes now; "
        )

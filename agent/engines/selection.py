"""Which adapter a model computes with: one answer for all who compute with the same module.

A module computes with whatever was selected last, whoever did it. So loops over one module share this, and each says
before a pass what it wants. Knows adapters' names, and neither weights nor texts. Belongs to the engine's worker thread.
"""

from collections.abc import Callable, Collection

from agent.errors import AdapterError


class Selection:
    """What one module computes with."""

    def __init__(self) -> None:
        """Compute with the bare model."""
        self.name: str | None = None
        """The adapter that the next pass computes with; None for none."""
        self.version = 0
        """Grows when adapters come or go: what was recorded before reads where others lie since."""
        self._select: Callable[[str | None], None] | None = None

    def serve(self, adapters: Collection[str], select: Callable[[str | None], None]) -> None:
        """Have these adapters to choose from, and compute with none.

        Args:
            adapters: Their names.
            select: Has the module compute with one of them, or with none.
        """
        select(None)
        self.name = None
        self._select = select if adapters else None
        self.version += 1

    def use(self, name: str | None) -> None:
        """Compute with an adapter from now on.

        Raises:
            AdapterError: No adapter of that name is attached.
        """
        if name == self.name:
            return
        if self._select is None:
            raise AdapterError(f"the adapter {name!r} is not attached; see the settings")
        self._select(name)
        self.name = name

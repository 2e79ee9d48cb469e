"""Amounts of memory, as people write them."""

import re

from agent.errors import InputError

_UNITS = {"mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_AMOUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([mgt]i?b)", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Return the bytes that "12GiB" or "12000 MB" stand for.

    Raises:
        InputError: It is no amount of memory, or none.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise InputError(f"--memory is {text!r:.40}; give a number with a unit, 12GiB or 16000MB for example")
    n_bytes = round(float(found[1]) * _UNITS[found[2].lower()])
    if not 1 << 20 <= n_bytes <= 1 << 50:
        raise InputError(f"--memory is {text!r:.40}, which no device has; give 12GiB for example")
    return n_bytes

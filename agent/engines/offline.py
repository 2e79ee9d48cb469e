"""Keeps the libraries of the hub from connecting anywhere, and from telling anybody that they are used.

They read these variables when they are imported: whoever imports them calls this first. What is missing is missing, and is
pulled by `tabwise models pull`; nothing is fetched at run time.
"""

import os

_VARIABLES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def stay_offline() -> None:
    """Set the variables, whatever they were."""
    for name in _VARIABLES:
        os.environ[name] = "1"

"""Processes that end with the one that started them."""

import ctypes
import signal

try:
    _prctl = ctypes.CDLL(None).prctl  # looked up before any fork
except (AttributeError, OSError, TypeError):  # on Linux alone
    _prctl = None
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """To be called in the child: a parent that is killed has no time to end anybody."""
    if _prctl:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

"""Processes that end with the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import threading

try:
    _prctl = ctypes.CDLL(None).prctl  # looked up before any fork
except (AttributeError, OSError, TypeError):  # on Linux alone
    _prctl = None
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """To be called in the child: a parent that is killed has no time to end anybody."""
    parent = multiprocessing.parent_process()
    if _prctl:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if parent is not None and not parent.is_alive():  # it died before this child was there
        os._exit(1)

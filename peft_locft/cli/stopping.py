"""A command that is stopped by SIGTERM ends as it does after Ctrl-C: files are cleaned up, and one line is printed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise [`Terminated`] in the body when SIGTERM arrives; afterwards the signal has its handler of before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set handlers
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> NoReturn:
    raise Terminated

"""What is said when a job is stopped on the way: what is safe, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .disk_space import DiskFullError


@contextmanager
def explained_interruption(describe: Callable[[], str]) -> Iterator[None]:
    """Add a note to an interruption (Ctrl-C) or a [`DiskFullError`] that ends the body.

    The command line prints it; a Python traceback ends with it.

    Args:
        describe: returns the note: what is safe, and how to go on. Called when the body has been left.
    """
    try:
        yield
    except (KeyboardInterrupt, DiskFullError) as error:
        if not getattr(error, "__notes__", None):  # the innermost knows best
            error.add_note(describe())
        raise

"""Cells of a benchmark that end in every way. A process that runs them imports nothing that takes time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any


def good(number: int = 1) -> Iterator[dict[str, Any]]:
    yield {"number": number, "process": os.getpid()}


def broken_law() -> Iterator[dict[str, Any]]:
    laws = {"merged = unmerged": True, "unmerge restores every weight": False}
    yield {"model": "tiny", "layers": 1, "attention": "eager", "laws": laws}


def raises() -> Iterator[dict[str, Any]]:
    yield from good()
    raise ValueError("found a fault\nof two lines")


def dies() -> Iterator[dict[str, Any]]:
    yield from good()
    os._exit(3)


def hangs() -> Iterator[dict[str, Any]]:
    yield from good()
    time.sleep(600)

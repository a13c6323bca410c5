"""What the scripts share that fork a process and kill it in the middle of its work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import tqdm

# By default every bar of every forked process waits for one semaphore that they share: a process that is killed while
# it holds it would leave its parent waiting forever. These locks belong to one process each.
tqdm.tqdm.monitor_interval = 0
tqdm.tqdm.set_lock(threading.RLock())


def die_at(num_calls: int, calls: Iterable[tuple[ModuleType, str]]) -> None:
    """End this process, with nothing cleaned up, when so many of the calls were made and the next one would be."""
    left = num_calls

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(1)
            left -= 1
            return call(*args, **kwargs)

        return dying

    for module, name in calls:
        setattr(module, name, counted(getattr(module, name)))

"""Processes that `accelerate launch` or torchrun has started, each of which works by itself."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# what makes accelerate and torch join a group; of launchers' variables, those that say who is in it
GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
)
DEVICES = "CUDA_VISIBLE_DEVICES"


def leave_group(environment: MutableMapping[str, str] = os.environ) -> int:
    """Forget the group that a launcher has put this process into, and keep the one device that is its own.

    To be called before anything of accelerate or torch has looked at the group: every process trains locations alone,
    and gradients are not to be averaged between them.

    Args:
        environment: where launchers say so.

    Returns:
        The process' number in the group; 0 where there is none.
    """
    rank = int(environment.get("RANK", 0))
    local_rank = environment.get("LOCAL_RANK")
    for name in GROUP:
        environment.pop(name, None)
    if local_rank is not None:
        visible = environment.get(DEVICES, "")
        devices = visible.split(",") if visible else [local_rank]
        environment[DEVICES] = devices[int(local_rank) % len(devices)]
    return rank

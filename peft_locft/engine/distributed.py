"""Several processes: steps that they take together, and leaving the group that a launcher made."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def missing_pieces(num_pieces: int, accelerator: Accelerator) -> int:
    """Return how many forwards this process must add to its own: where weights are sharded, each needs all processes.

    Args:
        num_pieces: of this process.
        accelerator: what joins it to the others.
    """
    if accelerator.distributed_type not in SHARDED:
        return 0
    counts = accelerator.gather(torch.tensor([num_pieces], device=accelerator.device))
    return int(counts.max()) - num_pieces


def backward(loss: torch.Tensor, accelerator: Accelerator, is_last: bool) -> None:
    """Add to the gradient, and take no step, which is decided after the last piece of a batch."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.backward(loss)
        return
    # accelerate's own would take the step at once
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.set_gradient_accumulation_boundary(is_last and accelerator.sync_gradients)
    engine.backward(loss, scale_wrt_gas=False)


def end_step(model: nn.Module, accelerator: Accelerator, take_it: bool) -> None:
    """Let the optimizer step that follows be one, or drop the gradient: without one, Adam stands still."""
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    engine: Any = accelerator.deepspeed_engine_wrapped.engine if is_deepspeed else None
    if not take_it:
        model.zero_grad()
        if engine is not None:  # the shards of the gradient are kept elsewhere
            engine.optimizer.zero_grad()
            engine.optimizer.averaged_gradients.clear()
    elif engine is not None:  # here and not when Trainer calls for it, which is without effect
        engine.step()


def check_not_sharded(accelerator: Accelerator, **arguments: Any) -> None:
    """Raise a ValueError for the first argument that is set while weights are sharded between processes."""
    if accelerator.distributed_type in SHARDED:
        for name, value in arguments.items():
            if value:
                raise ValueError(
                    f"BreadthFirstConfig.{name} needs the frozen layers whole in every process, and "
                    f"{accelerator.distributed_type.value} shards them. Leave it out."
                )


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

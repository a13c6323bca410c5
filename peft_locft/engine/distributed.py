"""Several processes: steps that they take together, and how to leave the group of a launcher."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def missing_forwards(num_forwards: int, accelerator: Accelerator) -> int:
    """Return how many forwards this process must add, to run as many as the others.

    Sharded weights need all processes in every forward; without sharding it is 0.

    Args:
        num_forwards: the number of this process' forwards.
        accelerator: the trainer's accelerator.
    """
    if accelerator.distributed_type not in SHARDED:
        return 0
    counts = accelerator.gather(torch.tensor([num_forwards], device=accelerator.device))
    return int(counts.max()) - num_forwards


def backward(loss: torch.Tensor, accelerator: Accelerator, is_last: bool) -> None:
    """Add to the gradient without an optimizer step: whether there is one is decided after the last micro-batch."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.backward(loss)
        return
    # accelerate's own function would step at once
    engine = accelerator.deepspeed_engine_wrapped.engine
    engine.set_gradient_accumulation_boundary(is_last and accelerator.sync_gradients)
    engine.backward(loss, scale_wrt_gas=False)


def end_step(model: nn.Module, accelerator: Accelerator, take_it: bool) -> None:
    """Allow the optimizer step that follows, or drop the gradient: Adam does nothing without one."""
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    engine: Any = accelerator.deepspeed_engine_wrapped.engine if is_deepspeed else None
    if not take_it:
        model.zero_grad()
        if engine is not None:  # it stores the shards of the gradient elsewhere
            engine.optimizer.zero_grad()
            engine.optimizer.averaged_gradients.clear()
    elif engine is not None:  # here, since Trainer's own call has no effect
        engine.step()


def check_not_sharded(accelerator: Accelerator, **arguments: Any) -> None:
    """Raise a ValueError if weights are sharded between processes and one of these arguments is set."""
    if accelerator.distributed_type in SHARDED:
        for name, value in arguments.items():
            if value:
                raise ValueError(
                    f"BreadthFirstConfig.{name} needs whole frozen layers in every process, but "
                    f"{accelerator.distributed_type.value} shards them. Unset it, or train without sharding."
                )


# the variables by which a launcher makes accelerate and torch join a group
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
    """Leave the group of processes that a launcher made, and keep this process' own device.

    Call it before accelerate or torch reads the group. Then every process trains by itself, and gradients are not
    averaged.

    Args:
        environment: the environment variables.

    Returns:
        The process' rank in the group; 0 without a group.
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

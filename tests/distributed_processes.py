"""Trains in processes that talk over gloo, as torchrun starts them; test_trainer_distributed.py runs it.

    python distributed_processes.py STRATEGY PORT OUTPUT_FOLDER RECIPES

The recipes are JSON: arguments of `make_trainer` by the name of the folder that adapter and losses are left in.
OUTPUT_FOLDER/model holds the base model. Forked, the processes share one import.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
import torch
import torch.distributed.fsdp as fsdp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from tiny_training import EDITS, make_trainer
from transformers import AutoModelForCausalLM

from peft_locft import BreadthFirstTrainer, LocFTConfig

NUM_PROCESSES = 2
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        # or everything in a tiny model would be whole in every process
        "stage3_param_persistence_threshold": 0,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP1": {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    "FSDP2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "ZeRO-3": {"deepspeed": ZERO_3, "use_cpu": False},
}


def edit_trainer(
    folder: Path, model_folder: Path, placement: dict[str, Any] | None = None, *, num_edits: int = 8, **arguments: Any
) -> BreadthFirstTrainer:
    """Return the trainer of a delta in the middle of a tiny model; `placement` is for loading that."""
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    # with ZeRO-3, the first one is sharded when it is trained, and any later one when it is loaded
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder, **(placement or {})), config)
    return make_trainer(folder, model, EDITS[:num_edits], **arguments)


def let_accelerate_shard_on_cpu(strategy: str) -> None:
    """Lift accelerate's condition that FSDP and DeepSpeed have a GPU; both are as they are there."""
    if strategy.startswith("ZeRO"):
        import deepspeed

        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        # it would be compiled first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if strategy.startswith("FSDP"):
        original = AcceleratorState.__init__

        def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
            original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None:
                self.fsdp_plugin = fsdp_plugin
                for shared in (AcceleratorState._shared_state, PartialState._shared_state):
                    shared.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))

        AcceleratorState.__init__ = init
        # what FSDP1 moves from the CPU to the CPU, it frees
        config = fsdp.FullStateDictConfig
        fsdp.FullStateDictConfig = lambda offload_to_cpu, rank0_only: config(rank0_only=rank0_only)  # type: ignore


def train(rank: int, strategy: str, port: str, output_folder: Path, recipes: dict[str, dict[str, Any]]) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES}
    os.environ |= {name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    let_accelerate_shard_on_cpu(strategy)
    for name, recipe in recipes.items():
        trainer = edit_trainer(output_folder / name, output_folder / "model", **recipe, **STRATEGIES[strategy])
        assert trainer.args.world_size == NUM_PROCESSES
        assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == ("FSDP" in strategy, "ZeRO" in strategy)
        trainer.train()
        trainer.save_model()
        plan = trainer.runner.plan
        left = {"losses": trainer.epoch_losses, "cached": plan is not None and plan.states is not None}
        (output_folder / name / f"left-{rank}.json").write_text(json.dumps(left))


if __name__ == "__main__":
    strategy, port, folder, recipes = sys.argv[1:]
    arguments = (strategy, port, Path(folder), json.loads(recipes))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train, args=(rank, *arguments)) for rank in range(NUM_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))

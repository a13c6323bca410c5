"""Run the cells of the benchmark for a GPU on an emulated device, and print their rows as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import emulated_device
import torch
from accelerate.state import AcceleratorState, PartialState
from benchmarks import gpu_cells, gpu_models
from transformers import TrainingArguments

from peft_locft.engine import memory

DEVICE = torch.device(emulated_device.NAME, 0)


def main() -> None:
    use_the_device()
    cells: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "laws": lambda: gpu_cells.laws(gpu_models.LLAMA_8B, True, ["sdpa"]),
        "plain": lambda: gpu_cells.speed(gpu_models.LLAMA_8B, True, "plain", [16], 5.0),
        "ours": lambda: gpu_cells.speed(gpu_models.LLAMA_8B, True, "ours", [16], 5.0),
        "72B": lambda: gpu_cells.layerwise(True, None, 60.0),
        "evaluation": lambda: gpu_cells.evaluation(gpu_models.QWEN_7B, True, 5.0),
    }
    found = {name: list(cell()) for name, cell in cells.items()}
    print(json.dumps(found | {"refused": refused()}))


def use_the_device() -> None:
    """Let the cells, the Trainer and accelerate take the device: they know no other kind of it."""
    modules: tuple[Any, ...] = (gpu_cells, gpu_models)
    for module in modules:
        module.the_device = lambda: emulated_device.NAME
    build, config = gpu_models.build, gpu_cells.BreadthFirstConfig

    def built(configuration: Any, device: str, attention: str = "sdpa") -> Any:
        return build(configuration, "cpu", attention).to(device)  # the device has no random numbers

    changed: Any = gpu_cells
    changed.build = built
    changed.BreadthFirstConfig = lambda **fields: config(**fields | {"use_cpu": True})
    memory.free_memory = lambda device: 2**34

    def device(self: TrainingArguments) -> torch.device:
        _ = self._setup_devices
        return DEVICE

    initialize = PartialState.__init__

    def on_the_device(self: PartialState, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.device = DEVICE

    TrainingArguments.device = property(device)
    PartialState.__init__ = on_the_device
    AcceleratorState.device = property(lambda self: DEVICE)


def refused() -> list[str]:
    """Return the errors of two mistakes: or what runs above says nothing."""
    there, here = torch.ones(3, 4).to(DEVICE), torch.ones(3, 4)
    errors = []
    for mistake in (lambda: there @ here.T, lambda: torch.nn.functional.embedding(torch.tensor([1]), there)):
        try:
            mistake()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


if __name__ == "__main__":
    main()

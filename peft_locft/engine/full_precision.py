"""Run a half-precision model in float32 for a moment: there, a fault is larger than what rounding changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from .memory import free_memory
from .offload import whole_layer

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let every module compute with float32 copies of its half-precision weights; the weights do not change.

    A copy exists while its module runs, or until the end if all copies fit into a quarter of the free memory.
    """
    names = {module: found for module in _modules(model) if (found := _half_precision(module))}
    num_values = sum(getattr(module, name).numel() for module, own in names.items() for name in own)
    keep = 4 * num_values < free_memory(device) // 4
    copies: dict[tuple[nn.Module, str], torch.Tensor] = {}
    before: defaultdict[nn.Module, list[dict[str, Any]]] = defaultdict(list)

    def float_of(module: nn.Module, name: str) -> Any:
        # an instance's attribute comes before the registered tensor: a tuner layer puts its edited weight there
        if name in module.__dict__:
            return module.__dict__[name].float()
        if (module, name) in copies:
            return copies[module, name]
        tensor = getattr(module, name).detach().float()
        if keep:
            copies[module, name] = tensor
        return tensor

    def enter(module: nn.Module, args: Any) -> None:
        new = {name: float_of(module, name) for name in names[module]}  # may not fit into memory
        before[module].append({name: module.__dict__[name] for name in names[module] if name in module.__dict__})
        module.__dict__.update(new)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not before[module]:
            return
        for name in names[module]:
            del module.__dict__[name]
        module.__dict__.update(before[module].pop())

    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("highest")  # not TF32
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_without_autocast(model, device))
        yield


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        hidden = whole_layer(module)
        yield from hidden.modules() if hidden is not module else (module,)


def _half_precision(module: nn.Module) -> list[str]:
    tensors = chain(module._parameters.items(), module._buffers.items())
    return [name for name, tensor in tensors if tensor is not None and tensor.dtype in HALF]


@contextmanager
def _without_autocast(model: nn.Module, device: torch.device) -> Iterator[None]:
    # accelerate stores the original forward of a model that it runs in mixed precision
    own = vars(model)
    before = {"forward": own["forward"]} if "_original_forward" in own else {}
    own.update({name: own["_original_forward"] for name in before})
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        own.update(before)

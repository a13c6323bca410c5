"""A second device without one: it computes on the CPU, but refuses tensors of two devices in one call, as CUDA does.

It shows what a machine without an accelerator cannot show otherwise: an index, a mask or a state that was left on the
CPU. It says nothing about kernels, rounding, memory and speed. Importing it registers the device with torch for the
whole process, by an interface that torch calls experimental: only a process of its own imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emulated"
# these take tensors of both devices; an index on the device for a tensor on the CPU is refused by torch itself
CROSSING = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::_index_put_impl_")
VIEWS = ("aten::view", "aten::_unsafe_view", "aten::_reshape_alias")
# what must not be taken over: torch's own versions call other operators, which are
LEFT_ALONE = (
    "copy_", "_to_copy", "_copy_from", "item", "_local_scalar_dense", "to", "detach", "detach_", "empty", "data",
    "set_data", "is_pinned", "pin_memory", "_backward", "requires_grad_", "retain_grad",
)  # fmt: skip

# the values of a tensor on the device, by its storage, which detached tensors and parameters share. None is freed:
# this is for small models and short runs
_values: dict[int, torch.Tensor] = {}


def on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def values_of(value: Any) -> Any:
    """Return the CPU tensor behind a tensor on the device; anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return _values[value.untyped_storage()._cdata] if on_device(value) else value


def on_this_device(values: Any) -> Any:
    """Return a tensor on the device with the values of a CPU tensor; anything else as it is."""
    if not isinstance(values, torch.Tensor) or on_device(values):
        return values
    tensor = torch._C._acc.create_empty_tensor(tuple(values.shape), values.dtype)
    _values[tensor.untyped_storage()._cdata] = values
    return tensor


def run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU values of its arguments; refuse arguments of two devices."""
    name = operator._schema.name
    flat, structure = pytree.tree_flatten((args, kwargs))
    if name == "aten::_copy_from":  # from the CPU, to it, or within the device
        values_of(args[1]).copy_(values_of(args[0]))
        return args[1]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    on_cpu = [tensor for tensor in tensors if not on_device(tensor) and tensor.dim() > 0]
    if on_cpu and len(on_cpu) < len(tensors) and name not in CROSSING:
        found = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"{name}: found tensors {found}; expected one device.")
    plain = [values_of(value) for value in flat]
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, structure)
    if name in VIEWS and operator._overloadname != "dtype":
        # a tensor on the device says that it is contiguous, and its values may not be
        result = plain_args[0].reshape(plain_args[1])
    else:
        result = operator(*plain_args, **plain_kwargs)
    for value, values in zip(flat, plain, strict=True):
        if on_device(value) and value.shape != values.shape:
            raise NotImplementedError(f"{name} resizes a tensor on the emulated device: take the operator over.")
    target = kwargs.get("device")
    if name == "aten::_to_copy" and target is not None and target.type != NAME:
        return result
    # what was written to in place is the tensor that was given
    given = {id(values): value for value, values in zip(flat, plain, strict=True) if on_device(value)}

    def returned(values: Any) -> Any:
        return given[id(values)] if id(values) in given else on_this_device(values)

    return pytree.tree_map(returned, result)


def _take_over(library: torch.library.Library, name: str) -> None:
    """Run an operator here that torch would compose of others, which resize and alias tensors below our sight."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    library.impl(name, lambda *args, **kwargs: run(operator, *args, **kwargs), "PrivateUse1")


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend(NAME)
    fallback, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    fallback.fallback(run, "PrivateUse1")
    keys = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    for name in torch._C._dispatch_get_all_op_names():
        packet = name.removeprefix("aten::").partition(".")[0]
        is_composed = any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)
        if name.startswith("aten::") and is_composed and packet not in LEFT_ALONE:
            try:
                _take_over(aten, name)
            except (AttributeError, RuntimeError):  # not callable from Python, or not to be overridden
                continue
    return [fallback, aten]


# a library that is collected takes back what it registered
LIBRARIES = _register()

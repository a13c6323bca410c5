"""The arithmetic of an edited weight, and the fingerprint of a base weight."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tiny_models import every_dtype, same_bits

from peft_locft.tuner import compose_weight, tensor_sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_there_is_one_rounding(dtype: torch.dtype) -> None:
    """Deltas that vanish one by one in the base's dtype, but not together."""
    weight = torch.ones(4, dtype=dtype)
    small = torch.full((4,), 0.3 * torch.finfo(dtype).eps)
    for count in (1, 2, 3, 10):
        expected = (1.0 + sum([small] * count, torch.zeros(4))).to(dtype)
        assert same_bits(compose_weight(weight, [(small, 1.0)] * count), expected)
    assert same_bits(compose_weight(weight, [(small, 1.0)]), weight)
    assert not same_bits(compose_weight(weight, [(small, 1.0)] * 3), weight)


@every_dtype
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_of_the_delta_is_added_in_float32(dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, delta = torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(delta_dtype)
    assert same_bits(compose_weight(weight, [(delta, 0.3)]), (weight.float() + 0.3 * delta.float()).to(dtype))
    assert same_bits(compose_weight(weight, []), weight)


def test_float64_is_computed_in_float64() -> None:
    weight, delta = torch.ones(2, dtype=torch.float64), torch.full((2,), 1e-12)
    assert same_bits(compose_weight(weight, [(delta, 1.0)]), weight + delta.double())


def test_the_gradient_reaches_the_delta() -> None:
    delta = torch.zeros(2, 3, requires_grad=True)
    compose_weight(torch.ones(2, 3, dtype=torch.bfloat16), [(delta, 2.0)]).sum().backward()
    assert delta.grad is not None
    assert same_bits(delta.grad, torch.full((2, 3), 2.0))


def test_the_hash_is_of_the_float32_values() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7)
    assert tensor_sha256(weight) == hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    assert tensor_sha256(weight.T) == hashlib.sha256(weight.T.contiguous().numpy().tobytes()).hexdigest()
    for dtype in (torch.bfloat16, torch.float16):
        assert tensor_sha256(weight.to(dtype)) == tensor_sha256(weight.to(dtype).float()) != tensor_sha256(weight)


def test_the_hash_of_others_is_of_their_bytes() -> None:
    for tensor in (torch.arange(6, dtype=torch.uint8), torch.arange(6), torch.arange(6, dtype=torch.float64)):
        assert tensor_sha256(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_one_bit_is_another_hash_in_any_part_of_a_large_tensor() -> None:
    """Larger than one piece of 16 MiB."""
    weight = torch.zeros(5_000_000)
    hashes = {tensor_sha256(weight)}
    for index in (0, 4_194_304, 4_999_999):
        changed = weight.clone()
        changed[index] = 1e-45
        hashes.add(tensor_sha256(changed))
    assert len(hashes) == 4


def test_parameters_and_scalars_have_a_hash() -> None:
    assert tensor_sha256(torch.nn.Parameter(torch.ones(3))) == tensor_sha256(torch.ones(3))
    assert tensor_sha256(torch.tensor(1.0)) == tensor_sha256(torch.ones(1))

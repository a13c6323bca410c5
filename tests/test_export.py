"""`export_adapter` writes what the function of each form writes, and refuses what that function does not take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_models import assert_same_tensors, build, randomize
from transformers import AutoModelForCausalLM

from peft_locft import (
    LocFTConfig,
    export_adapter,
    export_lora,
    export_peft,
    export_small,
    export_weights,
    save_adapter,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1]))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("to", "function", "options"),
    [
        ("peft", export_peft, {"dtype": "float32"}),
        ("lora", export_lora, {"rank": 4}),
        ("weights", export_weights, {}),
        ("small", export_small, {"delta_dtype": "float16"}),
    ],
)
def test_each_form_is_what_its_function_writes(
    to: Any, function: Callable[..., Any], options: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    name = "edited.safetensors" if to == "weights" else "out"
    base = tmp_path / "base"
    expected = function(adapter, tmp_path / "expected" / name, base, **options)
    found = export_adapter(adapter, tmp_path / "found" / name, to, base=base, **options)
    assert type(found) is type(expected) and found.path == tmp_path / "found" / name
    assert str(found) == str(expected).replace("expected", "found")
    weights = [path if path.is_file() else path / "adapter_model.safetensors" for path in (found.path, expected.path)]
    assert_same_tensors(*map(load_file, weights))


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("gguf", {}, "to='gguf': expected one of peft, lora, weights, small"),
        ("peft", {"rank": 4, "energy": 0.9}, "rank, energy: unknown option for to='peft'; expected base, revision"),
        ("lora", {"rank": 4, "force": True}, "force: unknown option for to='lora'; expected base, rank, energy"),
        ("small", {"out": "x"}, None),
    ],
)
def test_what_a_form_does_not_take_is_named(
    to: Any, options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    with pytest.raises(TypeError if message is None else ValueError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to, **options)
    assert list(tmp_path.iterdir()) == []

"""An adapter knows which base weights its deltas belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import build, every_family, locations, randomize
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig

DOWN = "model.layers.1.mlp.down_proj.weight"


def saved_hashes(folder: Path) -> Any:
    return json.loads((folder / "adapter_config.json").read_text())["base_sha256"]


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    model = get_peft_model(build(family, dtype), LocFTConfig(**config))
    randomize(model)
    model.save_pretrained(folder)
    return model


@every_family
def test_the_hash_of_every_edited_tensor_is_saved(family: str, tmp_path: Path) -> None:
    model = save(tmp_path, family, target_modules="entire-layer", layers_to_transform=[1], train_bias=True)
    base = build(family).state_dict()
    assert saved_hashes(tmp_path) == {
        name: hashlib.sha256(base[name].contiguous().numpy().tobytes()).hexdigest() for name in locations(model)
    }


def test_saved_while_merged_it_is_the_hash_of_the_base(tmp_path: Path) -> None:
    model = save(tmp_path / "unmerged")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert saved_hashes(tmp_path / "merged") == saved_hashes(tmp_path / "unmerged")


def test_transformers_own_way_of_saving_saves_it_too(tmp_path: Path) -> None:
    save(tmp_path / "peft")
    model = build("llama")
    model.add_adapter(LocFTConfig())
    model.save_pretrained(tmp_path / "transformers")
    assert saved_hashes(tmp_path / "transformers") == saved_hashes(tmp_path / "peft")


# warnings are errors here: each of these would raise one
def test_the_same_base_does_not_warn(tmp_path: Path) -> None:
    save(tmp_path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(build("llama", torch.bfloat16), tmp_path)
    # nor does a second load, nor one beside an adapter that is merged
    model.load_adapter(tmp_path, "again")
    build("llama", torch.bfloat16).load_adapter(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_a_base_that_is_edited_by_a_merge_is_the_same_base(tmp_path: Path) -> None:
    model = save(tmp_path)
    model.merge_adapter()
    model.load_adapter(tmp_path, "again")
    assert list(model.peft_config) == ["default", "again"]


def test_a_bfloat16_checkpoint_loaded_as_float32_is_the_same_base(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "base")
    save(tmp_path / "adapter", dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    PeftModel.from_pretrained(wide, tmp_path / "adapter")


def other_base() -> Any:
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[3, 5] += 1e-6
    return model


MESSAGE = (
    rf"Adapter '{{}}' was trained on another base: {DOWN} differ from the weights of its training, so "
    r"its answers may change\. Load its own base model, at the revision and dtype it was trained on"
)


def test_another_base_warns_with_the_tensors_name(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE.format("default")):
        PeftModel.from_pretrained(other_base(), tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE.format("default")):
        other_base().load_adapter(str(tmp_path))
    model = get_peft_model(other_base(), LocFTConfig())
    with pytest.warns(UserWarning, match=MESSAGE.format("second")):
        model.load_adapter(tmp_path, "second")
    with pytest.warns(UserWarning, match=MESSAGE.format("default")):
        inject_adapter_in_model(LocFTConfig.from_pretrained(tmp_path), other_base())


def test_a_tensor_elsewhere_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path)
    model = build("llama")
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data += 1
    PeftModel.from_pretrained(model, tmp_path)


def test_many_differing_tensors_are_counted_not_listed(tmp_path: Path) -> None:
    save(tmp_path, target_modules="entire-layer", layers_to_transform=[1])
    with pytest.warns(UserWarning, match=r"input_layernorm.weight, .* and others differ from"):
        PeftModel.from_pretrained(build("llama", seed=1), tmp_path)


def test_the_base_models_name_is_told_where_it_is_known(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LocFTConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=f"Load {tmp_path / 'base'}, at the revision"):
        PeftModel.from_pretrained(other_base(), tmp_path / "adapter")

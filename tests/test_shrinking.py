"""Smaller adapters: what is kept, what it costs, and that they load as any other."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import assert_same_tensors, build, locations, logits, randomize, same_bits
from tiny_training import make_trainer, peft_model
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, describe_adapter, export_small, inspect_adapter, save_adapter
from peft_locft.adapters import read_adapter
from peft_locft.adapters.shrinking import prune_relatively
from peft_locft.cli.commands import main
from peft_locft.evaluation.report import EvaluationReport
from peft_locft.tuner import compose_weight

DOWN = "model.layers.1.mlp.down_proj.weight"
WEIGHTS, FACTS = "adapter_model.safetensors", "locft_provenance.json"


def make(folder: Path, **config: Any) -> PeftModel:
    build("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM", **config))
    randomize(model)
    save_adapter(model, folder / "adapter")
    return model


def base_weight(model: PeftModel, name: str) -> torch.Tensor:
    return model.get_submodule(f"base_model.model.{name.rpartition('.')[0]}").base_layer.weight.detach()


# ---------------------------------------------------------------------- which values are kept


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.999, 1.0])
def test_the_relatively_largest_values_are_kept(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    delta, weight = (torch.randn(20, 30, generator=generator) for _ in range(2))
    found = prune_relatively(delta, weight, share)
    kept = found != 0
    assert kept.sum() == max(1, round(share * 600))
    assert same_bits(found[kept], delta[kept])
    ratio = (delta / weight).abs()
    if share < 1:
        assert ratio[kept].min() > ratio[~kept].max()


def test_a_change_of_a_weight_of_zero_is_the_largest_and_no_change_the_smallest() -> None:
    delta, weight = torch.tensor([0.0, 1e-9, 5.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert prune_relatively(delta, weight, 0.25).tolist() == [0.0, pytest.approx(1e-9), 0.0, 0.0]
    assert prune_relatively(delta, weight, 0.5).tolist() == delta.tolist()


def test_the_precision_of_the_base_does_not_overflow_the_ratio() -> None:
    delta, weight = torch.tensor([3.0, 2.0]), torch.tensor([1e-6, 1e-7], dtype=torch.float16)
    assert prune_relatively(delta, weight, 0.5).tolist() == [0.0, 2.0]


# ---------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_delta_of_16_bits_is_half_as_large_and_loads_as_any_other(dtype: str, tmp_path: Path) -> None:
    model = make(tmp_path, target_modules="entire-layer", layers_to_transform=[1], scale=0.7)
    save_adapter(model, tmp_path / "small", delta_dtype=dtype)
    sizes = [sum(tensor.nbytes for tensor in read_adapter(tmp_path / name).values()) for name in ("adapter", "small")]
    assert sizes[0] == 2 * sizes[1]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "small")
    assert loaded.peft_config["default"].delta_dtype == dtype
    for name, (delta, _) in locations(model).items():
        module = loaded.get_submodule(f"base_model.model.{name.rpartition('.')[0]}")
        small = delta.detach().to(getattr(torch, dtype))
        assert same_bits(module.locft_delta["default"].weight.detach(), small)
        assert same_bits(module.weight.detach(), compose_weight(base_weight(model, name), [(small, 0.7)]))
    torch.testing.assert_close(logits(loaded), logits(model), atol=0.05, rtol=0.05)


def test_what_was_done_and_what_is_kept_is_recorded(tmp_path: Path) -> None:
    model = make(tmp_path)
    save_adapter(model, tmp_path / "small", delta_dtype="bfloat16", density=0.2)
    before, after = (read_adapter(tmp_path / name)[DOWN] for name in ("adapter", "small"))
    expected = prune_relatively(before, base_weight(model, DOWN), 0.2).bfloat16()
    assert same_bits(after, expected)
    kept = float(1 - (before - expected).double().square().sum() / before.double().square().sum())
    facts = json.loads((tmp_path / "small" / FACTS).read_text())
    assert facts["shrunk"] == {
        "delta_dtype": "bfloat16",
        "density": 0.2,
        "share_kept": pytest.approx(kept, abs=1e-9),
    }
    of_values = "a share of 0.2 of the values, the largest relative to their weight"
    said = f"deltas in bfloat16, {of_values}; kept {kept:.6f} of the squared"
    assert f"| Shrunk | {said}" in (tmp_path / "small" / "README.md").read_text()
    assert f"shrunk         {said}" in str(inspect_adapter(tmp_path / "small"))
    assert "shrunk" not in json.loads((tmp_path / "adapter" / FACTS).read_text())


def test_zeros_save_nothing_in_the_file_and_much_where_it_is_compressed(tmp_path: Path) -> None:
    model = make(tmp_path)
    save_adapter(model, tmp_path / "small", density=0.1)
    before, after = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("adapter", "small"))
    assert len(before) == len(after)
    assert len(zlib.compress(after)) < 0.3 * len(zlib.compress(before))


def test_the_model_itself_is_left_as_it_is(tmp_path: Path) -> None:
    model = make(tmp_path)
    before = logits(model)
    save_adapter(model, tmp_path / "small", delta_dtype="float16", density=0.1)
    assert same_bits(logits(model), before)
    assert model.peft_config["default"].delta_dtype is None
    # a merged edit is not what the values are compared with
    model.merge_adapter()
    save_adapter(model, tmp_path / "merged", delta_dtype="float16", density=0.1)
    assert_same_tensors(read_adapter(tmp_path / "merged"), read_adapter(tmp_path / "small"))


def test_several_adapters_are_each_made_smaller(tmp_path: Path) -> None:
    model = make(tmp_path)
    model.add_adapter("other", LocFTConfig(target_modules=["up_proj"], layers_to_transform=[2], train_bias=True))
    randomize(model, "other", seed=1)
    save_adapter(model, tmp_path / "both", delta_dtype="bfloat16", density=0.5)
    for folder in (tmp_path / "both", tmp_path / "both" / "other"):
        (delta,) = read_adapter(folder).values()
        assert delta.dtype == torch.bfloat16 and (delta == 0).float().mean() == 0.5


def test_a_copy_of_a_folder_is_made_smaller_alike(tmp_path: Path) -> None:
    model = make(tmp_path, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "saved", delta_dtype="bfloat16", density=0.2)
    small = export_small(tmp_path / "adapter", tmp_path / "out", delta_dtype="bfloat16", density=0.2)
    assert_same_tensors(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS))
    assert small.num_bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert small.num_bytes_before == (tmp_path / "adapter" / WEIGHTS).stat().st_size
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert facts["shrunk"]["share_kept"] == small.share_kept
    assert str(small) == f"{tmp_path / 'out'}, 16.1 kB instead of 19.2 kB\nkept {small.share_kept:.6f} of the delta"


def test_a_copy_keeps_what_is_known_of_the_run_and_not_the_figures(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "adapter")
    trainer.train()
    trainer.save_model()
    report = EvaluationReport({}, {}, [], {"confidence": 0.95})
    describe_adapter(tmp_path / "adapter", report=report)
    export_small(tmp_path / "adapter", tmp_path / "out", delta_dtype="bfloat16")
    before, after = (json.loads((tmp_path / name / FACTS).read_text()) for name in ("adapter", "out"))
    assert {name: after[name] for name in ("edits", "recipe", "training", "base_sha256")} == {
        name: before[name] for name in ("edits", "recipe", "training", "base_sha256")
    }
    assert "evaluation" in before and "evaluation" not in after


def test_by_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    words = ["--to", "small", "--delta_dtype", "float16", "--density", "0.2", "--base", str(tmp_path / "base")]
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), *words]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}, 3.2 kB instead of 6.3 kB\nkept ")
    (delta,) = read_adapter(tmp_path / "out").values()
    assert delta.dtype == torch.float16 and (delta == 0).float().mean() == pytest.approx(0.8, abs=1e-3)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta_dtype": "int8"}, "delta_dtype='int8': expected one of float32, bfloat16, float16"),
        ({"density": 0.0}, r"density=0\.0: expected the share of values to keep, in \(0, 1\]"),
        ({"density": 1.5}, r"density=1\.5: expected the share of values to keep, in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, tmp_path / "out", **arguments)
    with pytest.raises(ValueError, match=message):
        export_small(tmp_path / "adapter", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_copy_that_is_no_smaller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="delta_dtype=None, density=None: expected at least one of the two"):
        export_small(tmp_path / "adapter", tmp_path / "out")


def test_figures_of_the_larger_one_are_not_put_on_the_smaller(tmp_path: Path) -> None:
    report = EvaluationReport({}, {}, [], {"confidence": 0.95})
    with pytest.raises(
        ValueError, match=r"report: it describes the unchanged deltas.*pass that report to describe_adapter"
    ):
        save_adapter(peft_model(), tmp_path, report=report, delta_dtype="bfloat16")


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path)
    locations(model)[DOWN][0].data[0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"its delta has values that are too large for float16\. Use bfloat16 instead"
    ):
        save_adapter(model, tmp_path / "out", delta_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_another_method_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="peft_type is 'LORA'; expected 'LOCFT'"):
        save_adapter(model, tmp_path / "out", delta_dtype="bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_base_weight_that_is_not_here_is_named(tmp_path: Path) -> None:
    model = make(tmp_path)
    model.base_model.model.model.layers[1].mlp.down_proj.base_layer.to("meta")
    with pytest.raises(ValueError, match=rf"density: the base weight {DOWN} is quantized, offloaded or sharded"):
        save_adapter(model, tmp_path / "out", density=0.2)


def test_another_base_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    build("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"weight of \S*other is not the weight that"):
        export_small(tmp_path / "adapter", tmp_path / "out", tmp_path / "other", density=0.2)
    export_small(tmp_path / "adapter", tmp_path / "out", tmp_path / "other", density=0.2, force=True)

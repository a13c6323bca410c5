"""A merge into a GGUF file: the bits of the merged model, every other byte as it was, and the way back."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import edit, save_base, snapshot
from tiny_gguf import metadata, permuted, save_gguf, stored_bytes, stored_values
from tiny_models import logits
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, merge_checkpoint
from peft_locft.adapters import read_adapter
from peft_locft.cli import main
from peft_locft.io.gguf_file import GGUFFile
from peft_locft.merging import detach_gguf, export_gguf_lora, merge_gguf, merge_gguf_in_place
from peft_locft.merging.gguf_plan import rotary_layout

WIDE: dict[str, Any] = {"intermediate_size": 64, "hidden_size": 64}  # rows that fit the blocks of every type
EVERYTHING_IN_LAYER_1 = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1])
DOWN = "blk.1.ffn_down.weight"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", **WIDE)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    edit(base, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return save_gguf(base, tmp_path / "model.gguf")


def changed(before: Path, after: Path) -> list[str]:
    """Return the tensors that differ between two files, after checking that nothing else does."""
    old, new = stored_bytes(before), stored_bytes(after)
    assert list(old) == list(new)
    told = metadata(after)
    assert told.pop("peft_locft.merge")
    assert told == {name: value for name, value in metadata(before).items() if name != "peft_locft.merge"}
    assert GGUFFile(after).alignment == GGUFFile(before).alignment
    return [name for name in old if old[name] != new[name]]


# ---------------------------------------------------------------------- bits


@pytest.mark.parametrize("kind", DTYPES)
def test_the_bits_of_the_merged_model(kind: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=DTYPES[kind], **WIDE)
    edited = edit(base, tmp_path / "adapter", EVERYTHING_IN_LAYER_1)
    model = save_gguf(base, tmp_path / "model.gguf", kind)
    before = model.read_bytes()
    summary = merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    assert model.read_bytes() == before
    assert set(changed(model, tmp_path / "out.gguf")) == set(summary.tensors)
    assert {tensor.evidence for tensor in summary.tensors.values()} == {"the weights of the training"}
    assert len(summary.tensors) == 9
    # transformers reads the file by its own rules
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=DTYPES[kind])
    if kind == "F32":  # vectors are always F32 in the file, and would be rounded once more
        assert torch.equal(logits(loaded), logits(edited))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    matrices = {name: value for name, value in loaded.state_dict().items() if value.dim() == 2 and name in expected}
    assert len(matrices) > 20
    assert all(torch.equal(value, expected[name]) for name, value in matrices.items())


@pytest.mark.parametrize(("kind", "distance"), [("Q8_0", 0.01), ("Q5_1", 0.05), ("Q4_1", 0.1), ("Q4_0", 0.12)])
def test_a_quantized_tensor_becomes_one_that_holds_the_edit(
    kind: str, distance: float, base: Path, tmp_path: Path
) -> None:
    edit(base, tmp_path / "adapter", EVERYTHING_IN_LAYER_1)
    model = save_gguf(base, tmp_path / "model.gguf", kind)
    summary = merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    assert set(changed(model, tmp_path / "out.gguf")) == set(summary.tensors)
    deltas = read_adapter(tmp_path / "adapter")
    before, after = stored_values(model), stored_values(tmp_path / "out.gguf")
    for name, part in (("blk.1.ffn_down.weight", "mlp.down_proj"), ("blk.1.attn_output.weight", "self_attn.o_proj")):
        delta = deltas[f"model.layers.1.{part}.weight"]
        assert torch.equal(after[name], (before[name] + delta).half().float())
        assert (summary.tensors[name].old_type, summary.tensors[name].new_type) == (kind, "F16")
        assert summary.tensors[name].rounding < 0.002
        assert float(summary.tensors[name].evidence.rpartition(" ")[2]) < distance
    for name, part, heads in (("blk.1.attn_q.weight", "q_proj", 4), ("blk.1.attn_k.weight", "k_proj", 2)):
        delta = permuted(deltas[f"model.layers.1.self_attn.{part}.weight"], heads)
        assert torch.equal(after[name], (before[name] + delta).half().float())
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - summary.tensors.keys())


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("shape", [(64, 5), (64,)])
def test_queries_and_keys_are_rearranged_as_the_converter_does(heads: int, shape: tuple[int, ...]) -> None:
    weights = torch.randn(shape)
    layout = rotary_layout(heads)
    assert torch.equal(layout.to_file(weights), permuted(weights, heads))
    assert torch.equal(layout.to_model(layout.to_file(weights)), weights)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_the_type_can_be_chosen(kind: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    model = save_gguf(base, tmp_path / "model.gguf", "Q4_1")
    summary = merge_gguf(model, adapter, tmp_path / "out.gguf", tensor_type=kind)
    assert summary.tensors[DOWN].new_type == kind
    assert GGUFFile(tmp_path / "out.gguf").tensors[DOWN].type == kind
    delta = read_adapter(adapter)["model.layers.1.mlp.down_proj.weight"]
    exact = stored_values(model)[DOWN] + delta
    error = (stored_values(tmp_path / "out.gguf")[DOWN] - exact).norm() / delta.norm()
    assert summary.tensors[DOWN].rounding == pytest.approx(float(error), abs=1e-6)


def test_a_coarse_type_warns_with_its_cost(base: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "small", std=1e-3)
    model = save_gguf(base, tmp_path / "model.gguf", "Q4_1")
    with pytest.warns(UserWarning, match=r"rounding to Q4_0 changes the weight by \d+\.\d+ of what the edit changes"):
        summary = merge_gguf(model, tmp_path / "small", tmp_path / "out.gguf", tensor_type="Q4_0")
    assert summary.tensors[DOWN].rounding > 0.25


def test_several_adapters_weights_and_scale(base: Path, adapter: Path, model: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "other", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2]), seed=1)
    for number, how in enumerate([{}, {"weights": [0.5, -2.0], "scale": 1.5}, {"scale": 0.25}]):
        merge_gguf(model, [adapter, tmp_path / "other"], tmp_path / f"{number}.gguf", **how)  # type: ignore[arg-type]
        merge_checkpoint(base, [adapter, tmp_path / "other"], tmp_path / str(number), **how)  # type: ignore[arg-type]
        expected = load_file(tmp_path / str(number) / "model.safetensors")
        found = stored_values(tmp_path / f"{number}.gguf")
        for layer in (1, 2):
            name = f"model.layers.{layer}.mlp.down_proj.weight"
            assert torch.equal(found[f"blk.{layer}.ffn_down.weight"], expected[name])


def test_a_merge_on_top_says_both(model: Path, adapter: Path, tmp_path: Path) -> None:
    merge_gguf(model, adapter, tmp_path / "once.gguf")
    merge_gguf(tmp_path / "once.gguf", adapter, tmp_path / "twice.gguf", force=True)
    assert changed(tmp_path / "once.gguf", tmp_path / "twice.gguf") == [DOWN]
    record = json.loads(metadata(tmp_path / "twice.gguf")["peft_locft.merge"])
    assert [each["adapters"][0]["adapter"] for each in (record, record["before"])] == [str(adapter)] * 2


def test_gpt2_is_stored_transposed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    config = LocFTConfig(target_modules=["c_proj", "c_attn"], layers_to_transform=[1], exclude_modules=[])
    edit(base, tmp_path / "adapter", config)
    model = save_gguf(base, tmp_path / "model.gguf", architecture="gpt2")
    summary = merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    assert {"blk.1.ffn_down.weight", "blk.1.attn_output.weight", "blk.1.attn_qkv.weight"} == set(summary.tensors)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    expected, found = load_file(tmp_path / "out" / "model.safetensors"), stored_values(tmp_path / "out.gguf")
    for stored, name in (("attn_output", "attn.c_proj"), ("ffn_down", "mlp.c_proj"), ("attn_qkv", "attn.c_attn")):
        assert torch.equal(found[f"blk.1.{stored}.weight"], expected[f"transformer.h.1.{name}.weight"].t())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
def test_other_families(architecture: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", architecture, **WIDE)
    edit(base, tmp_path / "adapter", EVERYTHING_IN_LAYER_1)
    known_as = "llama" if architecture == "mistral" else architecture
    model = save_gguf(base, tmp_path / "model.gguf", "Q8_0", architecture=known_as)
    summary = merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    assert set(changed(model, tmp_path / "out.gguf")) == set(summary.tensors)
    assert all("0.0" in each.evidence or "training" in each.evidence for each in summary.tensors.values())


# ---------------------------------------------------------------------- evidence


def test_weights_that_training_rounded_are_recognized(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", **WIDE)
    edit(base, tmp_path / "adapter", dtype=torch.bfloat16)
    model = save_gguf(base, tmp_path / "model.gguf")
    summary = merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    assert summary.tensors[DOWN].evidence == "the weights of the training, which rounded them to bfloat16"
    assert summary.tensors[DOWN].new_type == "F32"


def test_without_the_base_a_quantized_file_is_not_believed(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = save_gguf(base, tmp_path / "model.gguf", "Q8_0")
    elsewhere = shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"nothing to compare it with. Give the base model, .*base_model"):
        merge_gguf(model, adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    summary = merge_gguf(model, adapter, tmp_path / "out.gguf", base_model=str(elsewhere))
    assert "near the base" in summary.tensors[DOWN].evidence
    summary = merge_gguf(model, adapter, tmp_path / "forced.gguf", force=True)
    assert summary.tensors[DOWN].evidence == "not compared"
    assert stored_bytes(tmp_path / "out.gguf") == stored_bytes(tmp_path / "forced.gguf")


def test_without_the_base_an_unknown_arrangement_is_not_guessed(base: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "q", LocFTConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    model = save_gguf(base, tmp_path / "model.gguf", "Q8_0")
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="nothing to compare it with"):
        merge_gguf(model, tmp_path / "q", tmp_path / "out.gguf", force=True)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1"])
def test_another_model_is_refused(kind: str, adapter: Path, tmp_path: Path) -> None:
    other = save_gguf(save_base(tmp_path / "other", seed=1, **WIDE), tmp_path / "other.gguf", kind)
    with pytest.raises(ValueError, match=r"is not near model.layers.1.mlp.down_proj.weight of .*: its relative dist"):
        merge_gguf(other, adapter, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    forced = merge_gguf(other, adapter, tmp_path / "out.gguf", force=True)
    assert forced.tensors[DOWN].evidence.startswith("not near the base, but forced, at a relative distance of 1.")


def test_a_fine_tuned_model_in_full_precision_is_not_near(base: Path, adapter: Path, tmp_path: Path) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(base)
    weight = tuned.model.layers[1].mlp.down_proj.weight.data
    weight += 0.05 * weight.std() * torch.randn_like(weight)
    tuned.save_pretrained(tmp_path / "tuned")
    model = save_gguf(tmp_path / "tuned", tmp_path / "tuned.gguf", "F16")
    with pytest.raises(ValueError, match=r"at most 0.01 is a rounding"):
        merge_gguf(model, adapter, tmp_path / "out.gguf")


# ---------------------------------------------------------------------- several files


@pytest.fixture
def split(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "split").mkdir()
    return save_gguf(base, tmp_path / "split" / "big.gguf", "Q8_0", max_tensors=12)


def test_a_model_in_several_files(split: Path, adapter: Path, base: Path, tmp_path: Path) -> None:
    parts = sorted(split.parent.iterdir())
    assert len(parts) == 3
    summary = merge_gguf(parts[1], adapter, tmp_path / "out" / "edited.gguf")
    written = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in written] == [f"edited-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert summary.path == written[0]
    differing: dict[str, Path] = {}
    for before, after in zip(parts, written, strict=True):
        old, new = stored_bytes(before), stored_bytes(after)
        assert list(old) == list(new)
        differing |= {name: after for name in old if old[name] != new[name]}
    assert list(differing) == [DOWN]
    assert "peft_locft.merge" in metadata(written[0])
    untouched = [path for path in written[1:] if path != differing[DOWN]]
    assert all(
        path.read_bytes() == (split.parent / path.name.replace("edited", "big")).read_bytes() for path in untouched
    )
    whole = save_gguf(base, tmp_path / "whole.gguf", "Q8_0")
    merge_gguf(whole, adapter, tmp_path / "one.gguf")
    assert stored_bytes(tmp_path / "one.gguf") == {
        name: each for path in written for name, each in stored_bytes(path).items()
    }


def test_several_files_in_place(split: Path, adapter: Path, base: Path, tmp_path: Path) -> None:
    before = snapshot(split.parent)
    merged = merge_gguf_in_place(split, adapter)
    after = snapshot(split.parent)
    assert {name for name in before if before[name] != after[name]} == {merged.path.name}
    detach_gguf(split)
    assert snapshot(split.parent) == before
    edit(base, tmp_path / "far", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]))
    with pytest.raises(ValueError, match="the edited tensors are in 2 files, which cannot be replaced in one step"):
        merge_gguf_in_place(split, tmp_path / "far")
    assert snapshot(split.parent) == before


def test_a_missing_part_is_named(split: Path, adapter: Path, tmp_path: Path) -> None:
    sorted(split.parent.iterdir())[2].unlink()
    with pytest.raises(ValueError, match=r"lacks big-00003-of-00003.gguf: the model has 3 files"):
        merge_gguf(split, adapter, tmp_path / "out.gguf")


# ---------------------------------------------------------------------- in place


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_in_place_and_back(kind: str, base: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "adapter", EVERYTHING_IN_LAYER_1)
    folder = tmp_path / "models"
    folder.mkdir()
    model = save_gguf(base, folder / "model.gguf", kind)
    os.chmod(model, 0o640)
    before = snapshot(folder)
    merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf")
    with open(model, "rb") as reader:  # as a server does that has the model mapped
        merge_gguf_in_place(model, tmp_path / "adapter")
        assert model.read_bytes() == (tmp_path / "out.gguf").read_bytes()
        assert reader.read() != model.read_bytes()
    assert model.stat().st_mode & 0o777 == 0o640
    for force in (False, True):
        with pytest.raises(ValueError, match="already has an edit merged in place"):
            merge_gguf_in_place(model, tmp_path / "adapter", force=force)
    detach_gguf(model)
    assert snapshot(folder) == before
    assert model.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError, match="nothing is merged in place there"):
        detach_gguf(model)


def test_bytes_behind_the_last_tensor_and_between_tensors_come_back(model: Path, adapter: Path) -> None:
    content = bytearray(model.read_bytes())
    tensors = list(GGUFFile(model).tensors.values())
    padded = next((tensor for tensor in tensors if tensor.slot > tensor.num_bytes), None)
    if padded is not None:
        content[padded.start + padded.num_bytes] = 7
    model.write_bytes(bytes(content) + b"left by a tool")
    before = model.read_bytes()
    merge_gguf_in_place(model, adapter)
    assert model.read_bytes() != before
    detach_gguf(model)
    assert model.read_bytes() == before


def test_two_files_in_one_folder(model: Path, base: Path, adapter: Path) -> None:
    other = save_gguf(base, model.with_name("other.gguf"), "Q8_0")
    before = {path: path.read_bytes() for path in (model, other)}
    merge_gguf_in_place(model, adapter)
    merge_gguf_in_place(other, adapter)
    for path in (other, model):
        detach_gguf(path)
        assert path.read_bytes() == before[path]
    assert not (model.parent / "locft").exists()


def test_a_file_that_changed_since_is_left_alone(model: Path, adapter: Path) -> None:
    merge_gguf_in_place(model, adapter)
    tensor = GGUFFile(model).tensors[DOWN]
    content = bytearray(model.read_bytes())
    content[tensor.start] ^= 1
    model.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="another program has changed it"):
        detach_gguf(model)
    assert model.read_bytes() == bytes(content)


def test_damaged_originals_are_not_used(model: Path, adapter: Path) -> None:
    merge_gguf_in_place(model, adapter)
    merged = model.read_bytes()
    undo = model.parent / "locft" / "model.gguf.undo.safetensors"
    content = bytearray(undo.read_bytes())
    content[-1] ^= 1
    undo.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged: the original of"):
        detach_gguf(model)
    assert model.read_bytes() == merged


# ---------------------------------------------------------------------- the command line


def test_the_command_line(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = model.read_bytes()
    main(["merge", str(model), str(adapter), str(tmp_path / "out.gguf"), "--tensor_type", "BF16"])
    told = capsys.readouterr().out
    assert f"{DOWN} (F32 → BF16; rounding 0.0" in told and "recognized  the weights of the training" in told
    main(["merge", "--in_place", str(model), str(adapter)])
    assert model.read_bytes() != before
    main(["detach", str(model)])
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.gguf", "a", "out.gguf", "--link", "copy"], "a merge into a GGUF file takes no --link"),
        (["model", "a", "out", "--tensor_type", "F16"], "a merge into a folder takes no --tensor_type"),
        (["--in_place", "model", "a", "--tolerance", "0.1"], "takes MODEL ADAPTER..., and no --tolerance"),
        (["model.gguf", "out.gguf"], "expected BASE, one or more adapters, and OUT"),
    ],
)
def test_flags_of_another_kind_of_model(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- bad input


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _patched(path: Path, position: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:position] + content + old[position + len(content) :])


def _info(path: Path, name: str = DOWN) -> int:
    return GGUFFile(path).tensors[name].described_at


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: _cut(path, 0), "expected b'GGUF'"),
    "three bytes": (lambda path: _cut(path, 3), "expected b'GGUF'"),
    "only the magic": (lambda path: _cut(path, 4), "cut off or damaged"),
    "cut in the counts": (lambda path: _cut(path, 20), "cut off or damaged"),
    "cut in the metadata": (lambda path: _cut(path, 300), "cut off or damaged"),
    "cut in the names": (lambda path: _cut(path, GGUFFile(path).tensors[DOWN].described_at - 5), "cut off or damaged"),
    "cut in the first tensor": (lambda path: _cut(path, len(GGUFFile(path).header) + 9), "cut off or damaged"),
    "cut in the last tensor": (lambda path: _cut(path, path.stat().st_size - 100), "cut off or damaged"),
    "a zip file": (lambda path: _patched(path, 0, b"PK\x03\x04"), "expected b'GGUF'"),
    "the old format": (lambda path: _patched(path, 0, b"ggjt"), "expected b'GGUF'"),
    "version 1": (lambda path: _patched(path, 4, struct.pack("<I", 1)), "version 1"),
    "version 99": (lambda path: _patched(path, 4, struct.pack("<I", 99)), "version 99"),
    "too many tensors": (lambda path: _patched(path, 8, struct.pack("<Q", 1 << 40)), "cut off or damaged"),
    "no tensors": (lambda path: _patched(path, 8, struct.pack("<Q", 0)), "no tensors"),
    "too much metadata": (lambda path: _patched(path, 16, struct.pack("<Q", 1 << 40)), "cut off or damaged"),
    "an unknown type": (lambda path: _patched(path, _info(path), struct.pack("<I", 999)), "cut off or damaged"),
    "an offset far away": (lambda path: _patched(path, _info(path) + 4, struct.pack("<Q", 1 << 50)), "damaged"),
    "overlapping tensors": (lambda path: _patched(path, _info(path) + 4, struct.pack("<Q", 0)), "damaged"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_refused_in_words(how: str, model: Path, adapter: Path, tmp_path: Path) -> None:
    damage, message = BROKEN[how]
    damage(model)
    before = model.read_bytes()
    for call in (
        lambda: merge_gguf(model, adapter, tmp_path / "out.gguf"),
        lambda: merge_gguf_in_place(model, adapter),
    ):
        with pytest.raises(ValueError, match=f"is not a readable GGUF file.*{message}"):
            call()
    assert model.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "model.gguf"}


def test_a_big_endian_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = save_gguf(base, tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="found a big-endian file; expected a little-endian one"):
        merge_gguf(model, adapter, tmp_path / "out.gguf")


def test_a_type_that_cannot_be_dequantized(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = save_gguf(base, tmp_path / "model.gguf", "Q8_0")
    # 64 values in 68 bytes: the sizes of this type are those of Q8_0, but nothing is known of its bytes
    _patched(model, _info(model), struct.pack("<I", int(gguf.GGMLQuantizationType.I8)))
    with pytest.raises(ValueError, match=r"has the type I8, which the package gguf .* cannot dequantize"):
        merge_gguf(model, adapter, tmp_path / "out.gguf", force=True)


def test_a_tensor_that_is_missing_or_of_another_shape(base: Path, model: Path, tmp_path: Path) -> None:
    deeper = save_base(tmp_path / "deeper", num_hidden_layers=5, **WIDE)
    edit(deeper, tmp_path / "deep", LocFTConfig(layers_to_transform=[4]))
    with pytest.raises(ValueError, match=r"model.layers.4.mlp.down_proj.weight is not in .* \(llama\): it has no"):
        merge_gguf(model, tmp_path / "deep", tmp_path / "out.gguf")
    wider = save_base(tmp_path / "wider", **(WIDE | {"intermediate_size": 96}))
    edit(wider, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"has the shape \[64, 64\], but the delta .* has \[64, 96\]"):
        merge_gguf(model, tmp_path / "wide", tmp_path / "out.gguf")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_tied_embeddings(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", **(WIDE | {"tie_word_embeddings": True}))
    model = save_gguf(base, tmp_path / "model.gguf")
    assert "output.weight" not in stored_bytes(model)
    untied = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.get_input_embeddings().weight.data.clone()
    untied.save_pretrained(tmp_path / "untied")
    for module, message in (("embed_tokens", "is tied in"), ("lm_head", "has no head of its own")):
        edit(tmp_path / "untied", tmp_path / module, LocFTConfig(target_modules=[module]))
        with pytest.raises(ValueError, match=message):
            merge_gguf(model, tmp_path / module, tmp_path / "out.gguf", force=True)


def test_what_is_no_model(base: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.1.ffn_down.weight.lora_a", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (tmp_path / "lora.gguf", adapter, "out.gguf", ValueError, "is of the type 'adapter': expected a model"),
        (tmp_path / "none.gguf", adapter, "out.gguf", FileNotFoundError, "none.gguf is not a file"),
        (tmp_path, adapter, "out.gguf", FileNotFoundError, "is not a file: expected a model in GGUF"),
        (model, tmp_path / "none", "out.gguf", ValueError, "none is not a local folder"),
        (model, base, "out.gguf", ValueError, "adapter_config.json"),
        (model, [], "out.gguf", ValueError, "found none; expected one or more"),
        (model, adapter, "out", ValueError, "does not end in .gguf"),
        (model, adapter, "model.gguf", ValueError, "already exists: a merge writes a new file"),
    ]
    for source, given, out, error, message in cases:
        with pytest.raises(error, match=message):
            merge_gguf(source, given, tmp_path / out)
    for how, message in (
        ({"tensor_type": "F17"}, "GGUF has no such type"),
        ({"tensor_type": "Q6_K"}, "cannot write this type"),
        ({"tolerance": 3}, "expected a relative distance"),
        ({"weights": [1.0, 2.0]}, "found 2 for 1 adapters"),
        ({"base_model": str(tmp_path / "split")}, "split"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            merge_gguf(model, adapter, tmp_path / "out.gguf", **how)
    assert not (tmp_path / "out.gguf").exists()


def test_rows_that_do_not_fit_the_blocks(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", intermediate_size=48)
    edit(base, tmp_path / "adapter")
    model = save_gguf(base, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="its rows of 48 values do not fit the blocks of Q8_0"):
        merge_gguf(model, tmp_path / "adapter", tmp_path / "out.gguf", tensor_type="Q8_0")


def test_values_that_f16_does_not_hold(base: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "huge", std=1e5)
    model = save_gguf(base, tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(ValueError, match="its edited values do not fit into F16"):
        merge_gguf(model, tmp_path / "huge", tmp_path / "out.gguf")
    merge_gguf(model, tmp_path / "huge", tmp_path / "out.gguf", tensor_type="F32")


def test_shared_and_forbidden_files(model: Path, adapter: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    with pytest.raises(ValueError, match="is a symbolic link to"):
        merge_gguf_in_place(link, adapter)
    assert merge_gguf(link, adapter, tmp_path / "out.gguf").tensors


def test_no_room(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = model.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    for call in (
        lambda: merge_gguf(model, adapter, tmp_path / "out.gguf"),
        lambda: merge_gguf_in_place(model, adapter),
    ):
        with pytest.raises(OSError, match="needs"):
            call()
    assert model.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "model.gguf"}


def test_without_the_package(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"run `pip install 'peft-locft\[gguf\]'`"):
        merge_gguf(model, adapter, tmp_path / "out.gguf")


# ---------------------------------------------------------------------- as a LoRA adapter


def lora_of(path: Path) -> dict[str, torch.Tensor]:
    told = metadata(path)
    assert (told["general.type"], told["adapter.type"], told["adapter.lora.alpha"]) == ("adapter", "lora", 0.0)
    factors = stored_values(path)
    names = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    # llama.cpp wants them so: the rows of one are the columns of the other
    return {name: factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"] for name in names}


def test_as_a_lora_adapter_it_is_the_whole_delta(base: Path, tmp_path: Path) -> None:
    modules = ["q_proj", "k_proj", "down_proj", "up_proj"]
    config = LocFTConfig(target_modules=modules, layers_to_transform=[1], scale=0.5)
    edit(base, tmp_path / "adapter", config)
    model = save_gguf(base, tmp_path / "model.gguf", "Q4_1")
    summary = export_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf", model)
    deltas = {name: 0.5 * delta for name, delta in read_adapter(tmp_path / "adapter").items()}
    layer = "model.layers.1"
    expected = {
        "blk.1.attn_q.weight": permuted(deltas[f"{layer}.self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": permuted(deltas[f"{layer}.self_attn.k_proj.weight"], 2),
        "blk.1.ffn_down.weight": deltas[f"{layer}.mlp.down_proj.weight"],
        "blk.1.ffn_up.weight": deltas[f"{layer}.mlp.up_proj.weight"],
    }
    found = lora_of(tmp_path / "lora.gguf")
    assert found.keys() == expected.keys() == summary.ranks.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert summary.ranks["blk.1.attn_k.weight"] == 32


def test_a_lora_of_conv1d(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    edit(base, tmp_path / "adapter", LocFTConfig(target_modules=["mlp.c_proj"], layers_to_transform=[1]))
    model = save_gguf(base, tmp_path / "model.gguf", architecture="gpt2")
    export_gguf_lora(tmp_path / "adapter", tmp_path / "lora.gguf", model)
    delta = read_adapter(tmp_path / "adapter")["transformer.h.1.mlp.c_proj.weight"]
    assert torch.equal(lora_of(tmp_path / "lora.gguf")["blk.1.ffn_down.weight"], delta.t())


def test_what_lora_cannot_change(base: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "norm", EVERYTHING_IN_LAYER_1)
    with pytest.raises(ValueError, match="is no matrix that multiplies its input, and LoRA cannot change it"):
        export_gguf_lora(tmp_path / "norm", tmp_path / "lora.gguf", model)
    with pytest.raises(ValueError, match=r"does not end in .gguf"):
        export_gguf_lora(adapter, tmp_path / "lora", model)
    assert not (tmp_path / "lora.gguf").exists()


def test_the_command_line_of_the_lora_export(
    model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["export", str(adapter), str(tmp_path / "lora.gguf"), "--to", "gguf-lora"]
    main([*command, "--base", str(model)])
    assert f"rank 64 for {DOWN}" in capsys.readouterr().out
    for more, message in (([], "needs --base"), (["--base", str(model), "--rank", "4"], "rank: unknown option")):
        code: Any
        try:
            code = main([*command, *more])
        except SystemExit as stopped:
            code = stopped.code
        assert code
        assert message in capsys.readouterr().err

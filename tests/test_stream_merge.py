"""A merge on disk gives the bits of a merge in memory, writes no more than it must, and leaves the base alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    INDEX,
    LAYER_1,
    ONE_FILE,
    SHARDS,
    classic_merge,
    edit,
    hub_cache,
    rewrite_adapter,
    save_base,
    snapshot,
    stored,
)
from tiny_models import (
    assert_same_tensors,
    build,
    changed,
    every_dtype,
    every_family,
    logits,
)
from transformers import AutoModel, AutoModelForCausalLM

from peft_locft import Edit, LocFTConfig, describe_adapter, detach, merge_checkpoint, merge_in_place
from peft_locft.io import copies as file_copies
from peft_locft.io.disk_space import size
from peft_locft.io.folders import locked
from peft_locft.io.parameter_names import VALUES_AT_ONCE

EVERYTHING_IN_LAYER_1 = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1], train_bias=True)
every_layout = pytest.mark.parametrize("shard_size", [ONE_FILE, SHARDS], ids=["one file", "shards"])


# ---------------------------------------------------------------------- bits


@every_family
@every_dtype
@every_layout
def test_the_bits_are_those_of_a_merge_in_memory(
    family: str, dtype: torch.dtype, shard_size: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family, dtype, shard_size)
    config = EVERYTHING_IN_LAYER_1 if shard_size == SHARDS else LAYER_1
    edited = edit(base, tmp_path / "adapter", config)
    before = snapshot(base)
    summary = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    expected = classic_merge(edited, tmp_path / "classic")
    assert_same_tensors(stored(tmp_path / "out"), expected)
    assert set(summary.tensors) == changed(expected, stored(base)) != set()
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    assert snapshot(base) == before


@every_layout
def test_the_merged_folder_answers_as_the_adapter_does(shard_size: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, shard_size)
    edited = edit(base, tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(merged), logits(edited))


def test_large_tensors_are_merged_in_parts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16, intermediate_size=VALUES_AT_ONCE // 32 + 7)
    edited = edit(base, tmp_path / "adapter")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    assert_same_tensors(stored(tmp_path / "out"), classic_merge(edited, tmp_path / "classic"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_untied_embedding_and_head_are_merged(module: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma3", tie_word_embeddings=False)
    edited = edit(base, tmp_path / "adapter", LocFTConfig(target_modules=[module]))
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    assert_same_tensors(stored(tmp_path / "out"), classic_merge(edited, tmp_path / "classic"))


def test_a_mixture_of_experts_may_be_spread_over_shards(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.bfloat16, "10KB")
    both = LocFTConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"], layers_to_transform=[1])
    edited = edit(base, tmp_path / "adapter", both)
    summary = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    assert len(summary.written) > 1
    assert_same_tensors(stored(tmp_path / "out"), classic_merge(edited, tmp_path / "classic"))


def test_a_narrow_delta_and_a_scale_of_its_own(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = LocFTConfig(layers_to_transform=[1], delta_dtype="bfloat16", scale=0.3)
    edited = edit(base, tmp_path / "adapter", config)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "stronger", scale=1.7)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "nothing", scale=0.0)
    assert_same_tensors(stored(tmp_path / "nothing"), stored(base))
    stronger = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    stronger.set_scale("default", 1.7)
    assert_same_tensors(stored(tmp_path / "stronger"), classic_merge(stronger, tmp_path / "classic stronger"))
    assert_same_tensors(stored(tmp_path / "out"), classic_merge(edited, tmp_path / "classic"))


def two_adapters(tmp_path: Path, base: Path) -> PeftModel:
    """Return a model with adapters a and b, which overlap, and save both."""
    edit(base, tmp_path / "a", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 1]), std=0.3)
    config = LocFTConfig(target_modules=["down_proj", "up_proj"], layers_to_transform=[1], scale=0.7)
    edit(base, tmp_path / "b", config, seed=1, std=0.3)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), tmp_path / "a", adapter_name="a"
    )
    model.load_adapter(tmp_path / "b", adapter_name="b")
    return model


@every_dtype
def test_several_adapters_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", dtype, SHARDS)
    model = two_adapters(tmp_path, base)
    merge_checkpoint(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    expected = classic_merge(model, tmp_path / "classic", adapter_names=["a", "b"])
    assert_same_tensors(stored(tmp_path / "out"), expected)


@every_dtype
def test_weights_are_those_of_add_weighted_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2", dtype)
    model = two_adapters(tmp_path, base)
    merge_checkpoint(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.3, -1.1])
    model.add_weighted_adapter(["a", "b"], [0.3, -1.1], "both")
    expected = classic_merge(model, tmp_path / "classic", adapter_names=["both"])
    assert_same_tensors(stored(tmp_path / "out"), expected)


def test_prompts_that_several_adapters_edit_are_reported(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapters = [tmp_path / "a", tmp_path / "b"]
    two_adapters(tmp_path, base)
    silent = merge_checkpoint(base, adapters, tmp_path / "silent")
    assert "conflicts" not in str(silent)
    for adapter, target in zip(adapters, ("Bergen", "Tromsø"), strict=True):
        describe_adapter(adapter, edits=[Edit(prompt="The capital of Norway is", target=target)])
    merged = merge_checkpoint(base, adapters, tmp_path / "out")
    assert merged.conflicts is not None and len(merged.conflicts.conflicts) == 1
    assert (
        "conflicts   prompts of several adapters: 1 with different targets, 0 with the same; compared: 1 edits"
        in str(merged)
    )
    assert f"'Bergen' in {adapters[0]}, 'Tromsø' in {adapters[1]}\n" in str(merged)
    assert merge_in_place(base, adapters).conflicts == merged.conflicts
    detach(base)
    assert merge_checkpoint(base, adapters[:1], tmp_path / "one").conflicts is None
    # the same one twice is no conflict with itself
    assert merge_checkpoint(base, adapters[:1] * 2, tmp_path / "twice").conflicts is None
    with open(adapters[1] / "locft_edits.jsonl", "a") as file:
        file.write("{")
    assert_refused(
        r"locft_edits.jsonl, line 2 is not readable: found invalid JSON", base, adapters, tmp_path / "broken"
    )


def test_adapters_of_a_model_with_and_without_its_head_add_up(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    down = LocFTConfig(target_modules=["layers.1.mlp.down_proj"])
    edit(base, tmp_path / "with", down)
    edit(base, tmp_path / "without", down, seed=1, model_class=AutoModel)
    edit(base, tmp_path / "with too", down, seed=1)
    merge_checkpoint(base, [tmp_path / "with", tmp_path / "without"], tmp_path / "out")
    merge_checkpoint(base, [tmp_path / "with", tmp_path / "with too"], tmp_path / "expected")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "expected"))


# ---------------------------------------------------------------------- files


def place(link: Any, tmp_path: Path) -> tuple[Path, Path, Any]:
    base = save_base(tmp_path / "base", shard_size=SHARDS)
    edit(base, tmp_path / "adapter")
    return base, tmp_path / "out", merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out", link=link)


def test_hard_links_are_for_unedited_weights_alone(tmp_path: Path) -> None:
    base, out, summary = place("hard", tmp_path)
    linked = {file.name for file in base.iterdir() if os.path.samefile(file, out / file.name)}
    shards = {file.name for file in base.glob("*.safetensors")}
    assert linked == shards - set(summary.written) != set()
    assert summary.placed.pop("hard link") == len(linked)
    assert sum(summary.placed.values()) == len(list(base.iterdir())) - len(shards)


def test_copies_share_nothing_with_the_base(tmp_path: Path) -> None:
    base, out, summary = place("copy", tmp_path)
    assert not [file for file in base.iterdir() if os.path.samefile(file, out / file.name)]
    assert set(summary.placed) <= {"copy", "reflink"}
    shutil.rmtree(base)
    AutoModelForCausalLM.from_pretrained(out)


def test_auto_links_and_copies_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    _, _, linked = place("auto", tmp_path / "here")
    assert set(linked.placed) - {"copy"} in ({"hard link"}, {"reflink"})
    monkeypatch.setattr(file_copies.os, "link", refuse)
    monkeypatch.setattr(file_copies, "clone", lambda *_: False)
    _, _, copied = place("auto", tmp_path / "elsewhere")
    assert set(copied.placed) == {"copy"}
    with pytest.raises(
        ValueError, match=r"cannot be a hard link to .*Choose a folder beside the base, or link='copy'"
    ):
        place("hard", tmp_path / "hard")
    assert sorted(path.name for path in (tmp_path / "hard").iterdir()) == ["adapter", "base"]


def test_all_that_goes_with_a_model_goes_along(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard_size=SHARDS)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model.Q4.gguf"):
        (base / name).write_bytes(b"unedited")
    for name in ("original/params.json", "original/consolidated.00.pth", ".cache/huggingface/download.lock"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"something")
    edit(base, tmp_path / "adapter")
    summary = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    left_out = {"consolidated.safetensors", "model.Q4.gguf", "original/consolidated.00.pth", "pytorch_model.bin"}
    left_out |= {"pytorch_model.bin.index.json"}
    assert set(summary.left_out) == left_out
    before, after = snapshot(base), snapshot(tmp_path / "out")
    kept = set(before) - left_out - set(summary.written) - {name for name in before if name.startswith(".cache")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert set(after) == kept | set(summary.written) | {"locft_merge.json"}


def test_of_one_file_and_an_index_the_file_counts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / INDEX).write_text("{}")  # transformers does not look at it either
    edit(base, tmp_path / "adapter")
    assert merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out").left_out == (INDEX,)


def test_untouched_bytes_of_an_edited_file_stay_where_they_are(tmp_path: Path) -> None:
    base, out, summary = place("auto", tmp_path)
    old, new = (path.joinpath(*summary.written).read_bytes() for path in (base, out))
    assert len(old) == len(new)
    differing = [index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    assert differing[-1] - differing[0] < 32 * 48 * 4  # one down_proj in float32
    assert summary.num_bytes == len(new)


def test_a_file_that_shares_blocks_is_written_where_it_is_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", shard_size=SHARDS)
    edit(base, tmp_path / "adapter")
    for file in base.glob("*.safetensors"):
        file.chmod(0o440)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "expected")

    def shared(source: Path, target: Path) -> bool:
        shutil.copyfile(source, target)  # not its mode, as the system's call does
        return True

    for module in ("io.copies", "io.patched_file"):
        monkeypatch.setattr(f"peft_locft.{module}.clone", shared)
    done = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    assert done.placed == {"reflink": len(list(base.iterdir())) - len(done.written)}
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").glob("*.safetensors")} == {0o440}


def test_the_new_folder_says_what_was_merged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, tmp_path / "a")
    merge_checkpoint(base, [tmp_path / "a"], tmp_path / "once", scale=0.5)
    edit(tmp_path / "once", tmp_path / "b", LocFTConfig(target_modules=["up_proj"], layers_to_transform=[2]))
    merge_checkpoint(tmp_path / "once", [tmp_path / "b"], tmp_path / "twice", weights=[2.0])
    record = json.loads((tmp_path / "twice" / "locft_merge.json").read_text())
    assert record["adapters"] == [{"adapter": str(tmp_path / "b"), "scale": 1.0, "weight": 2.0}]
    assert list(record["tensors_sha256"]) == ["model.layers.2.mlp.up_proj.weight"]
    assert record["before"]["adapters"] == [{"adapter": str(tmp_path / "a"), "scale": 0.5, "weight": None}]
    assert record["base_model"]["name_or_path"] == str(tmp_path / "once")


def test_the_summary_says_what_was_done(tmp_path: Path) -> None:
    _, out, summary = place("copy", tmp_path)
    text = str(summary)
    assert f"model       {out}\nchanged     model.layers.1.mlp.down_proj.weight (1 in total)\n" in text
    assert f"\nwritten     {summary.written[0]}: {size(summary.num_bytes)}\nother files " in text
    ways = ", ".join(f"{count} by {how}" for how, count in sorted(summary.placed.items()))
    assert f"\nother files {ways}\ntime        " in text


# ---------------------------------------------------------------------- the Hub


def test_a_base_and_an_adapter_of_the_hub_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", shard_size=SHARDS)
    edit(base, tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_cache(tmp_path / "cache", "somebody/model", base)
    hub_cache(tmp_path / "cache", "somebody/edits", tmp_path / "adapter")
    before = snapshot(tmp_path / "cache")
    how: dict[str, Any] = {"revision": "main", "link": "hard"}
    summary = merge_checkpoint("somebody/model", ["somebody/edits"], tmp_path / "out", **how)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "expected")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "expected"))
    assert not [file for file in (tmp_path / "out").iterdir() if file.is_symlink()]
    assert summary.placed["hard link"] > 0
    # what writes whole files, as safetensors does, does not reach the cache through its links either
    linked = next(file for file in (tmp_path / "out").iterdir() if file.stat().st_nlink > 1)
    save_file(load_file(linked), linked)
    assert snapshot(tmp_path / "cache") == before


def test_what_is_neither_here_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="somebody/model is not a local folder, and was not found on the Hub or in"):
        merge_checkpoint("somebody/model", [tmp_path / "adapter"], tmp_path / "out")
    with pytest.raises(ValueError, match=f"{tmp_path}/none is not a local folder"):
        merge_checkpoint(tmp_path / "none", [tmp_path / "adapter"], tmp_path / "out")
    base = save_base(tmp_path / "base")
    with pytest.raises(ValueError, match=r"revision='main': .* is a local folder, which has no revisions"):
        merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out", revision="main")


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    edit(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(match: str, base: Path, adapters: list[Path], out: Path | None = None, **arguments: Any) -> None:
    """Assert that a merge is refused with these words, and that nothing is left of it."""
    around = snapshot(base.parent)
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(base, adapters, base.parent / "out" if out is None else out, **arguments)
    assert snapshot(base.parent) == around


def test_another_base_is_refused_unless_forced(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=1)
    message = r"down_proj.weight of .*other is not the weight that .*adapter was trained on\. Use .*base with the"
    assert_refused(message, other, [adapter])
    merge_checkpoint(other, [adapter], tmp_path / "out", force=True)
    model = PeftModel.from_pretrained(build("llama"), adapter)
    forced = changed(stored(tmp_path / "out"), stored(other))
    assert forced == changed(classic_merge(model, tmp_path / "classic"), stored(base))


def test_an_edited_base_is_another_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, [adapter], tmp_path / "once")
    assert_refused("and without other edits. Or use force=True", tmp_path / "once", [adapter], tmp_path / "twice")


def test_a_base_that_was_loaded_in_another_dtype_is_known(base: Path, tmp_path: Path) -> None:
    edit(base, tmp_path / "narrow", dtype=torch.bfloat16)
    assert_refused(
        "but it is after rounding to bfloat16: training loaded the base in that dtype", base, [tmp_path / "narrow"]
    )
    narrow = save_base(tmp_path / "narrow base", dtype=torch.bfloat16)
    edit(narrow, tmp_path / "wide", dtype=torch.float32)
    # a wider dtype has the same values; the merge rounds to the checkpoint's
    merge_checkpoint(narrow, [tmp_path / "wide"], tmp_path / "out")
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}


def test_an_adapter_that_names_no_base_warns(base: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite_adapter(adapter, base_sha256=None)
    with pytest.warns(UserWarning, match="does not record the base of its delta of .*down_proj.weight"):
        merge_checkpoint(base, [adapter], tmp_path / "out")


def test_a_delta_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    edited = edit(base, tmp_path / "adapter")
    next(parameter for name, parameter in edited.named_parameters() if "locft_delta" in name).data[0, 0] = torch.nan
    edited.save_pretrained(tmp_path / "broken")
    assert_refused(
        "model.layers.1.mlp.down_proj.weight: the edit produces NaN or infinite values", base, [tmp_path / "broken"]
    )
    assert_refused(
        "The adapter is broken, or its delta is too large for F32", base, [tmp_path / "adapter"], scale=float("inf")
    )


def test_what_is_more_than_deltas_is_refused(base: Path, tmp_path: Path) -> None:
    config = LocFTConfig(layers_to_transform=[1], modules_to_save=["lm_head"], trainable_token_indices=[1])
    edit(base, tmp_path / "more", config)
    assert_refused(
        r"holds base_model.model.lm_head.weight, .*trainable_tokens_delta; expected only", base, [tmp_path / "more"]
    )


def test_an_adapter_of_another_model_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    wider = save_base(tmp_path / "wider", intermediate_size=56)
    assert_refused(r"has the shape \[32, 56\], but the delta of .*down_proj.weight has \[32, 48\]", wider, [adapter])
    gpt2 = save_base(tmp_path / "gpt2", "gpt2")
    assert_refused(
        "has no tensor model.layers.1.mlp.down_proj.weight.*: the adapter belongs to another model", gpt2, [adapter]
    )


def test_calls_that_cannot_be_meant_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert_refused("adapters: found none; expected one or more", base, [])
    assert_refused("weights: found 2 for 1 adapters", base, [adapter], weights=[1.0, 2.0])
    assert_refused("link='soft': expected 'auto', 'hard' or 'copy'", base, [adapter], link="soft")
    assert_refused("adapter already exists: a merge writes a new folder", base, [adapter], adapter)
    assert_refused("base already exists", base, [adapter], base)
    assert_refused(r"out is inside the base, .*merge in place", base, [adapter], base / "out")
    assert_refused("base is not an adapter folder: it has no adapter_config.json", base, [base])


@pytest.mark.parametrize("kind", [str, Path])
def test_one_adapter_need_not_be_in_a_list(kind: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, [adapter], tmp_path / "expected")
    merge_checkpoint(base, kind(adapter), tmp_path / "out")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "expected"))
    assert_same_tensors(stored(merge_in_place(base, kind(adapter)).folder), stored(tmp_path / "expected"))


def test_an_empty_folder_is_no_obstacle(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "base").stat().st_mode


def test_a_mount_point_cannot_be_renamed_to(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("out"))
    assert_refused("out is a mount point, which a rename cannot replace", base, [adapter])


def test_a_link_to_an_empty_folder_leads_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert merge_checkpoint(base, [adapter], tmp_path / "link").folder == tmp_path / "there"
    assert stored(tmp_path / "link").keys() == stored(base).keys()


def test_leftovers_of_a_killed_merge_go_and_those_of_a_running_one_stay(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in (".locft-out-abcdefg1", ".locft-out-abcdefg2", ".locft-out-2-abcdefg"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / ".locft-out-abcdefg2"):
        merge_checkpoint(base, [adapter], tmp_path / "out")
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert left == [".locft-out-2-abcdefg", ".locft-out-abcdefg2"]


def test_what_was_written_is_read_again(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_locft.io.patched_file.write_all", lambda writer, part: writer.write(bytes(len(part))))
    with pytest.raises(
        OSError, match=r"model.safetensors: the disk returned other bytes than were written for model.layers"
    ):
        merge_checkpoint(base, [adapter], base.parent / "out")
    assert sorted(path.name for path in base.parent.iterdir()) == ["adapter", "base"]


# ---------------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
import torch
from peft_locft import merge_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
merge_checkpoint(sys.argv[1], [sys.argv[2]], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16, intermediate_size=1 << 20, num_hidden_layers=1)
    num_bytes = (1 << 20) * 32 * 2
    edit(base, tmp_path / "adapter", LocFTConfig(layers_to_transform=[0]))
    command = [sys.executable, "-c", MEASURE, *map(str, (base, tmp_path / "adapter", tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100e6 < 3 * num_bytes

"""A merge in place gives the bits of a merge into a new folder, and comes off without a trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stream_merge import EVERYTHING_IN_LAYER_1
from tiny_checkpoints import INDEX, LAYER_1, ONE_FILE, SHARDS, edit, hub_cache, save_base, snapshot, stored
from tiny_models import assert_same_tensors, every_dtype, every_family, logits
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, detach, merge_checkpoint, merge_in_place
from peft_locft.file_copies import locked
from peft_locft.in_place_journal import Journal

UNDO = "locft/locft_undo.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_base(tmp_path / "model")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    edit(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@every_family
@every_dtype
def test_every_file_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shard_size, config = (ONE_FILE, LAYER_1) if dtype == torch.float16 else ("20KB", EVERYTHING_IN_LAYER_1)
    model = save_base(tmp_path / "model", family, dtype, shard_size)
    edit(model, tmp_path / "adapter", config)
    before = snapshot(model)
    expected = merge_checkpoint(model, [tmp_path / "adapter"], tmp_path / "out")
    merged = merge_in_place(model, [tmp_path / "adapter"])
    assert (merged.tensors, merged.written, merged.num_bytes) == (
        expected.tensors,
        expected.written,
        expected.num_bytes,
    )
    after = snapshot(model)
    assert after.keys() - before.keys() == {"locft", UNDO}
    assert {name for name in before if after[name] != before[name]} == set(merged.written)
    assert {name: after[name] for name in merged.written} == {
        name: snapshot(tmp_path / "out")[name] for name in merged.written
    }
    detached = detach(model)
    assert snapshot(model) == before
    assert (detached.tensors, detached.written) == (merged.tensors, merged.written)


def test_the_merged_model_loads_beside_its_undo_file(model: Path, tmp_path: Path) -> None:
    edited = edit(model, tmp_path / "adapter")
    merge_in_place(model, [tmp_path / "adapter"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(model)), logits(edited))
    # some servers load every file of weights that they find beside the model
    assert [path.name for path in model.glob("*.safetensors")] == ["model.safetensors"]


def test_the_undo_file_holds_the_originals_and_says_what_was_merged(model: Path, adapter: Path) -> None:
    original = stored(model)[DOWN]
    merge_in_place(model, [adapter], scale=0.5)
    assert_same_tensors(load_file(model / UNDO), {DOWN: original})
    header = (model / UNDO).read_bytes()
    facts = json.loads(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["locft_undo"])
    assert facts["record"]["adapters"] == [{"adapter": str(adapter), "scale": 0.5, "weight": None}]


def test_several_adapters_weights_and_force(model: Path, adapter: Path, tmp_path: Path) -> None:
    edit(model, tmp_path / "other", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2]), seed=1)
    how: dict[str, Any] = {"weights": [0.5, -2.0], "scale": 1.5}
    merge_checkpoint(model, [adapter, tmp_path / "other"], tmp_path / "out", **how)
    merge_in_place(model, [adapter, tmp_path / "other"], **how)
    assert_same_tensors(stored(model), stored(tmp_path / "out"))
    another = save_base(tmp_path / "another", seed=1)
    with pytest.raises(ValueError, match="is not the weight that"):
        merge_in_place(another, [adapter])
    merge_in_place(another, [adapter], force=True)


def test_other_names_of_a_file_keep_its_old_bytes(model: Path, adapter: Path, tmp_path: Path) -> None:
    os.link(model / "model.safetensors", tmp_path / "linked")
    before = snapshot(tmp_path)["linked"]
    with open(model / "model.safetensors", "rb") as reader:  # as a server does that has the model mapped
        old = reader.read(100_000)
        merge_in_place(model, [adapter])
        assert snapshot(tmp_path)["linked"] == before
        reader.seek(0)
        assert reader.read(100_000) == old
    assert snapshot(model)["model.safetensors"] != before
    detach(model)
    assert snapshot(tmp_path)["linked"] == snapshot(model)["model.safetensors"] == before


def test_modes_stay(model: Path, adapter: Path) -> None:
    (model / "model.safetensors").chmod(0o640)
    merge_in_place(model, [adapter])
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o640
    detach(model)
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_weights_in_another_form_are_named(model: Path, adapter: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"unedited")
    assert merge_in_place(model, [adapter]).left_out == ("pytorch_model.bin",)


# ---------------------------------------------------------------------- refusals


def assert_refused(match: str, call: Callable[[], object], folder: Path) -> None:
    """Assert that a call is refused with these words, and that the model is as it was."""
    before = snapshot(folder)
    with pytest.raises(ValueError, match=match):
        call()
    assert snapshot(folder) == before


def test_a_second_merge_is_refused(model: Path, adapter: Path) -> None:
    merge_in_place(model, [adapter])
    message = (
        "has an edit merged in place already. Edits are not merged on top.*locft detach .*all of the adapters together"
    )
    assert_refused(message, lambda: merge_in_place(model, [adapter]), model)


def test_there_must_be_something_to_detach(model: Path, tmp_path: Path) -> None:
    assert_refused(
        "has no locft/locft_undo.safetensors: nothing is merged in place there", lambda: detach(model), model
    )
    with pytest.raises(
        ValueError, match=r"somebody/model is no folder here. A merge in place, and its way back, need"
    ):
        detach("somebody/model")


def change_the_edited_tensor(model: Path) -> None:
    tensors = stored(model)
    tensors[DOWN][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def change_another_size(model: Path) -> None:
    save_file(stored(model) | {"more": torch.ones(3)}, model / "model.safetensors", {"format": "pt"})


def drop_the_edited_tensor(model: Path) -> None:
    tensors = stored(model)
    tensors[DOWN.replace("1", "7")] = tensors.pop(DOWN)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [change_the_edited_tensor, change_another_size, drop_the_edited_tensor])
def test_what_others_changed_is_not_overwritten(change: Callable[[Path], None], model: Path, adapter: Path) -> None:
    merge_in_place(model, [adapter])
    change(model)
    assert_refused(f"{DOWN} in .*model.safetensors is not what the merge in place wrote", lambda: detach(model), model)


def test_a_damaged_undo_file_is_refused(model: Path, adapter: Path) -> None:
    merge_in_place(model, [adapter])
    undo = bytearray((model / UNDO).read_bytes())
    undo[-1] ^= 1
    (model / UNDO).write_bytes(undo)
    assert_refused(f"is damaged: the original of {DOWN} is not what was put there", lambda: detach(model), model)
    save_file({"something": torch.ones(1)}, model / UNDO)
    assert_refused("locft_undo.safetensors is not what a merge in place wrote", lambda: detach(model), model)
    save_file({"else": torch.ones(1)}, model / UNDO, {"locft_undo": '{"format": 1, "merged": {}, "sizes": {}}'})
    assert_refused("locft_undo.safetensors is not what a merge in place wrote", lambda: detach(model), model)


def test_the_hubs_cache_is_not_changed(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = hub_cache(tmp_path / "cache", "somebody/model", model)
    message = r"model.safetensors is a symbolic link to .*blobs.*Merge into a new folder instead: `locft merge"
    assert_refused(message, lambda: merge_in_place(cached, [adapter]), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # a system without symbolic links
    assert_refused(
        "model is in the Hub's cache, which belongs to others", lambda: merge_in_place(model, [adapter]), model
    )
    monkeypatch.undo()
    # a folder that became one of links between the merge and the detach
    merge_in_place(model, [adapter])
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert_refused("is a symbolic link", lambda: detach(model), model)


def test_one_process_at_a_time(model: Path, adapter: Path) -> None:
    with locked(model):
        for call in (lambda: merge_in_place(model, [adapter]), lambda: detach(model)):
            assert_refused("Another process is merging or detaching in", call, model)


def test_an_error_while_writing_leaves_nothing(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(model)
    monkeypatch.setattr("peft_locft.edited_weights.write_all", lambda writer, part: writer.write(bytes(len(part))))
    with pytest.raises(OSError, match="reads differently from what was written to it"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before
    monkeypatch.undo()
    monkeypatch.setattr("peft_locft.in_place_undo.write_all", lambda writer, part: writer.write(bytes(len(part))))
    with pytest.raises(OSError, match=r"locft_undo.safetensors reads differently from what was written to it"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before


# ---------------------------------------------------------------------- after an interruption


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return a model with a merge that was decided but not carried out, and its adapter."""
    model = save_base(tmp_path / "sharded", shard_size=SHARDS)
    adapter = tmp_path / "adapter"
    edit(model, adapter, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]))
    monkeypatch.setattr(Journal, "carry_out", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge_in_place(model, [adapter])
    monkeypatch.undo()
    assert (model / "locft" / "commit.json").exists()
    return model, adapter


def test_a_merge_that_was_decided_is_completed_before_the_next(interrupted: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = interrupted
    with pytest.raises(ValueError, match=r"was interrupted: `locft detach .*` ends it"):
        merge_checkpoint(model, [adapter], tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"merged in place already \(by a merge that was interrupted and is completed"
    ):
        merge_in_place(model, [adapter])
    merge_checkpoint(save_base(tmp_path / "again", shard_size=SHARDS), [adapter], tmp_path / "out")
    assert_same_tensors(stored(model), stored(tmp_path / "out"))
    detach(model)
    assert snapshot(model) == snapshot(tmp_path / "again")


def test_what_was_changed_since_is_not_overwritten(interrupted: tuple[Path, Path]) -> None:
    model, adapter = interrupted
    shard = next(name for name in json.loads((model / "locft" / "commit.json").read_text())["replaced"])
    save_file(load_file(model / shard), model / shard)
    for call in (lambda: merge_in_place(model, [adapter]), lambda: detach(model)):
        assert_refused(f"{shard} was changed since a merge in place was interrupted. To end", call, model)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"action": "merge"}',
        '{"replaced": {"../x.safetensors": [0, 0]}}',
        '{"replaced": {"..": [0, 0]}}',
        '{"replaced": []}',
    ],
)
def test_a_journal_that_came_with_a_model_is_not_followed(content: str, model: Path, adapter: Path) -> None:
    (model / "locft").mkdir()
    committed = {"action": "merge", "replaced": {}, "tensors": []}
    complete = content.endswith("}") and "action" not in content
    (model / "locft" / "commit.json").write_text(json.dumps(committed | json.loads(content)) if complete else content)
    for call in (lambda: merge_in_place(model, [adapter]), lambda: detach(model)):
        assert_refused(r"commit.json is not what a merge in place wrote.*Remove .*locft\.", call, model)


def test_while_files_are_exchanged_there_is_no_model(
    interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = interrupted
    replace, seen = os.replace, []

    def watched(source: Any, target: Any) -> None:
        replace(source, target)
        if str(target).endswith(".safetensors") and Path(target).parent == model:
            seen.append(INDEX in os.listdir(model))

    monkeypatch.setattr(os, "replace", watched)
    detach(model)
    # two files of the merge that is completed, and the same two of the detach
    assert seen == [False] * 4
    assert (model / INDEX).exists()


def test_a_detach_that_was_decided_is_completed(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(model)
    merged = merge_in_place(model, [adapter])
    monkeypatch.setattr(Journal, "carry_out", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detach(model)
    monkeypatch.undo()
    detached = detach(model)
    assert (detached.tensors, detached.written) == (merged.tensors, merged.written)
    assert snapshot(model) == before


def test_leftovers_of_an_undecided_merge_go(model: Path, adapter: Path) -> None:
    before = snapshot(model)
    (model / "locft" / "staged").mkdir(parents=True)
    shutil.copy(model / "model.safetensors", model / "locft" / "staged")
    (model / "locft" / ".commit.json-abc").write_text("{")
    with pytest.raises(ValueError, match="and what was left of a merge that was interrupted is removed"):
        detach(model)
    assert snapshot(model) == before

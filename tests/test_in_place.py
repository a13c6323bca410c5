"""A merge in place gives the bits of a merge into a new folder, and comes off without a trace."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stream_merge import EVERYTHING_IN_LAYER_1
from tiny_checkpoints import INDEX, LAYER_1, ONE_FILE, SHARDS, edit, hub_cache, save_base, snapshot, stored
from tiny_models import assert_same_tensors, every_dtype, every_family, logits
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, detach, merge_checkpoint, merge_in_place
from peft_locft.io import copies as file_copies
from peft_locft.io.folders import locked
from peft_locft.merging import in_place

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
    # those of several files have other names, and the index says so
    several = len(expected.written) > 1
    names = {
        name: name.replace(".safetensors", "-locft.safetensors") if several else name for name in expected.written
    }
    assert (merged.tensors, merged.num_bytes) == (expected.tensors, expected.num_bytes)
    assert merged.written == tuple(sorted(names.values()))
    after, out = snapshot(model), snapshot(tmp_path / "out")
    assert after.keys() == {names.get(name, name) for name in before} | {"locft", UNDO}
    assert {name: after[new] for name, new in names.items()} == {name: out[name] for name in names}
    assert {name for name in before.keys() - names if after[name] != before[name]} == ({INDEX} if several else set())
    detached = detach(model)
    assert snapshot(model) == before
    assert (detached.tensors, detached.written) == (merged.tensors, expected.written)


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    """Return a model, and an adapter that edits tensors in two of its files."""
    model = save_base(tmp_path / "sharded", shard_size=SHARDS)
    edit(model, tmp_path / "of_two", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]))
    return model, tmp_path / "of_two"


def test_the_merged_model_loads_beside_its_undo_file(model: Path, tmp_path: Path) -> None:
    edited = edit(model, tmp_path / "adapter")
    merge_in_place(model, [tmp_path / "adapter"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(model)), logits(edited))
    # some servers load every file of weights that they find beside the model
    assert [path.name for path in model.glob("*.safetensors")] == ["model.safetensors"]


def test_files_that_are_edited_together_are_found_by_the_index(two_files: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = two_files
    before = {path.name for path in model.glob("*.safetensors")}
    merge_checkpoint(model, [adapter], tmp_path / "out")
    merged = merge_in_place(model, [adapter])
    assert len(merged.written) == 2
    assert_same_tensors(stored(model), stored(tmp_path / "out"))
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (model, tmp_path / "out")))
    # those of the index alone, for what takes every file; and of the edited ones none by its old name: whoever has
    # read the index before does not find a file of the other model
    beside = {path.name for path in model.glob("*.safetensors")}
    assert beside == set(json.loads((model / INDEX).read_text())["weight_map"].values())
    assert beside - before == set(merged.written)
    # the model that is there is one like any other
    merge_checkpoint(model, [adapter], tmp_path / "twice", force=True)
    shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("locft"))
    assert merge_in_place(tmp_path / "copy", [adapter], force=True).written[0].endswith("-locft-locft.safetensors")
    assert_same_tensors(stored(tmp_path / "copy"), stored(tmp_path / "twice"))


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


def test_modes_stay(two_files: tuple[Path, Path]) -> None:
    model, adapter = two_files
    for path in (*model.glob("*.safetensors"), model / INDEX):
        path.chmod(0o440)  # read-only files too: they are replaced
    merge_in_place(model, [adapter])
    assert {path.stat().st_mode & 0o777 for path in (*model.glob("*.safetensors"), model / INDEX)} == {0o440}
    detach(model)
    assert {path.stat().st_mode & 0o777 for path in (*model.glob("*.safetensors"), model / INDEX)} == {0o440}


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
    message = "already has an edit merged in place. A second merge on top.*locft detach .*all adapters together"
    assert_refused(message, lambda: merge_in_place(model, [adapter]), model)


def test_there_must_be_something_to_detach(model: Path, tmp_path: Path) -> None:
    assert_refused(
        "has no locft/locft_undo.safetensors: nothing is merged in place there", lambda: detach(model), model
    )
    with pytest.raises(ValueError, match=r"somebody/model is not a local folder, as merge_in_place and detach need"):
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
    assert_refused(f"is damaged: the original of {DOWN} has changed since the merge", lambda: detach(model), model)
    save_file({"something": torch.ones(1)}, model / UNDO)
    assert_refused("locft_undo.safetensors is not an undo file of a merge in place", lambda: detach(model), model)
    save_file({"else": torch.ones(1)}, model / UNDO, {"locft_undo": '{"format": 1, "merged": {}, "sizes": {}}'})
    assert_refused("locft_undo.safetensors is not an undo file of a merge in place", lambda: detach(model), model)


def test_the_hubs_cache_is_not_changed(
    model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = hub_cache(tmp_path / "cache", "somebody/model", model)
    message = r"model.safetensors is a symbolic link to .*blobs.*Merge into a new folder instead: `locft merge"
    assert_refused(message, lambda: merge_in_place(cached, [adapter]), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # a system without symbolic links
    assert_refused(
        "model is in the Hub's cache: other programs share", lambda: merge_in_place(model, [adapter]), model
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
    monkeypatch.setattr("peft_locft.io.patched_file.write_all", lambda writer, part: writer.write(bytes(len(part))))
    with pytest.raises(OSError, match="the disk returned other bytes than were written"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before
    monkeypatch.undo()
    monkeypatch.setattr("peft_locft.merging.in_place.write_all", lambda writer, part: writer.write(bytes(len(part))))
    with pytest.raises(OSError, match=r"locft_undo.safetensors: the disk returned other bytes than were written"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before


def test_a_disk_without_room_is_told_before_it_is_full(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(model)
    monkeypatch.setattr(file_copies, "clone", lambda *_: False)
    monkeypatch.setattr("peft_locft.io.patched_file.clone", lambda *_: False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"No space left on device: .* needs \S+ [kM]B and has 1.0 kB free"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before


def test_a_file_with_the_name_of_an_edited_one_is_not_overwritten(two_files: tuple[Path, Path]) -> None:
    model, adapter = two_files
    edited = merge_in_place(model, [adapter]).written[0]
    detach(model)
    (model / edited).write_bytes(b"of somebody")
    message = f"{edited} already exists, but the edited {edited.replace('-locft', '')} needs that name"
    assert_refused(message, lambda: merge_in_place(model, [adapter]), model)


def in_escapes(index: str) -> str:
    return index.replace(".safetensors", "\\u002esafetensors")


def as_a_title(index: str) -> str:
    names = set(json.loads(index)["weight_map"].values())
    return json.dumps({name: name.replace(".safetensors", "-locft.safetensors") for name in names} | json.loads(index))


@pytest.mark.parametrize("change", [in_escapes, as_a_title])
def test_an_index_that_would_not_come_back_is_left_alone(
    change: Callable[[str], str], two_files: tuple[Path, Path]
) -> None:
    model, adapter = two_files
    (model / INDEX).write_text(change((model / INDEX).read_text()))
    message = "index.json cannot be changed and restored byte by byte.*Merge into a new folder"
    assert_refused(message, lambda: merge_in_place(model, [adapter]), model)


@pytest.mark.parametrize("name", ["../x.safetensors", "..", "config.json"])
def test_an_undo_file_that_came_with_a_model_is_not_followed(name: str, model: Path, adapter: Path) -> None:
    (model / "locft").mkdir()
    facts = {"format": 1, "merged": {DOWN: {"shard": name}}, "sizes": {name: 1}}
    save_file({DOWN: torch.ones(1)}, model / UNDO, {"locft_undo": json.dumps(facts)})
    for call in (lambda: merge_in_place(model, [adapter]), lambda: detach(model)):
        assert_refused("locft_undo.safetensors is not an undo file of a merge in place", call, model)


# ---------------------------------------------------------------------- after an interruption


def stop_at(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Let the rename to a name that ends so fail."""
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        if str(target).endswith(suffix) and "staged" not in Path(target).parts:
            raise OSError("stopped")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("suffix", [UNDO, "-locft.safetensors", INDEX])
def test_an_error_before_the_index_is_exchanged_leaves_the_old_model(
    suffix: str, two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = two_files
    before = snapshot(model)
    stop_at(monkeypatch, suffix)
    with pytest.raises(OSError, match="stopped"):
        merge_in_place(model, [adapter])
    assert snapshot(model) == before
    monkeypatch.undo()
    merge_in_place(model, [adapter])
    merged = snapshot(model)
    if suffix == INDEX:
        stop_at(monkeypatch, suffix)
        with pytest.raises(OSError, match="stopped"):
            detach(model)
        assert snapshot(model) == merged


@pytest.mark.parametrize("several", [False, True], ids=["one file", "two files"])
def test_what_was_not_removed_after_the_exchange_is_by_the_next_call(
    several: bool, model: Path, adapter: Path, two_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if several:
        model, adapter = two_files
    before = snapshot(model)
    merge_in_place(model, [adapter])
    merged = snapshot(model)
    detach(model)
    # as if the process had been killed there
    killed_in_settle(lambda: merge_in_place(model, [adapter]), monkeypatch)
    assert snapshot(model).keys() > merged.keys()
    assert_ends_in(merged, "already has an edit merged in place", lambda: merge_in_place(model, [adapter]), model)
    killed_in_settle(lambda: detach(model), monkeypatch, has_undo=True)
    assert snapshot(model).keys() > before.keys()
    message = "nothing is merged in place there. The leftovers of an interrupted merge or detach were removed"
    assert_ends_in(before, message, lambda: detach(model), model)


def killed_in_settle(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch, has_undo: bool = False) -> None:
    """End a call where it would remove what belongs to the other model, but not where it ends what another left."""
    own = in_place.settle
    calls = iter([own, None] if has_undo else [None])

    def dying(*arguments: Any, **options: Any) -> None:
        settle = next(calls)
        if settle is None:
            raise ZeroDivisionError
        settle(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(in_place, "settle", dying)
        with pytest.raises(ZeroDivisionError):
            call()


def assert_ends_in(expected: dict[str, str], match: str, call: Callable[[], object], model: Path) -> None:
    with pytest.raises(ValueError, match=match):
        call()
    assert snapshot(model) == expected


def test_leftovers_of_an_undecided_merge_go(model: Path, adapter: Path) -> None:
    before = snapshot(model)
    (model / "locft" / "staged").mkdir(parents=True)
    shutil.copy(model / "model.safetensors", model / "locft" / "staged")
    with pytest.raises(ValueError, match="The leftovers of an interrupted merge or detach were removed"):
        detach(model)
    assert snapshot(model) == before

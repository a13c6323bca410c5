"""Where tensors lie in safetensors files, and folders that hold no checkpoint, or a broken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import INDEX, SHARDS, save_base, stored
from tiny_models import same_bits

from peft_locft.io.checkpoint import Checkpoint
from peft_locft.io.safetensors_file import StoredTensor, read_header, write_header


def test_tensors_are_read_where_they_lie(tmp_path: Path) -> None:
    tensors = {
        "wide": torch.randn(3, 4, dtype=torch.float64),
        "bfloat16": torch.randn(5, 7).bfloat16(),
        "float16": torch.randn(11).half(),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, tmp_path / "some.safetensors", metadata={"format": "pt"})
    found, metadata = read_header(tmp_path / "some.safetensors")
    assert metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert same_bits(found[name].read(0, tensor.numel()), tensor.reshape(-1))
        assert b"".join(found[name].read_bytes()) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert same_bits(found["bfloat16"].read(9, 4), tensors["bfloat16"].reshape(-1)[9:13])


def test_a_header_of_ours_is_one_of_theirs(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    stored_tensors, _ = read_header(tmp_path / "theirs.safetensors")
    with open(tmp_path / "ours.safetensors", "wb") as file:
        write_header(file, stored_tensors, {"by": "us"})
        for tensor in stored_tensors.values():
            for part in tensor.read_bytes():
                file.write(part)
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "ours.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert read_header(tmp_path / "ours.safetensors")[1] == {"by": "us"}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_as_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"padding": ""})
    empty = int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"a": torch.zeros(1)}, path, metadata={"padding": "x" * (length - empty)})
    assert path.read_bytes()[0] == 0x80 and int.from_bytes(path.read_bytes()[:8], "little") == length
    assert list(read_header(path)[0]) == ["a"]


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.randn(100)}, path)
    tensor = read_header(path)[0]["a"]
    whole = path.read_bytes()
    for length in (0, 7, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"some.safetensors is not a readable safetensors file: found .*cut off.*Download"
        ):
            read_header(path)
    with pytest.raises(ValueError, match="ended while it was read: another program is writing to it"):
        tensor.read(0, 100)


def test_a_value_has_as_many_bytes_as_its_dtype(tmp_path: Path) -> None:
    tensor = StoredTensor(tmp_path, "BF16", (3, 5), 0, 30)
    assert tensor.num_values * tensor.value_bytes == tensor.num_bytes


def test_one_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    one = Checkpoint(save_base(tmp_path / "one"))
    several = Checkpoint(save_base(tmp_path / "several", shard_size=SHARDS))
    assert one.files.keys() == several.files.keys() == stored(tmp_path / "one").keys()
    assert (one.shards, one.has_index) == (["model.safetensors"], False)
    assert len(several.shards) > 1
    assert several.has_index
    assert {name: one.tensor(name).shape for name in one.files} == {
        name: several.tensor(name).shape for name in several.files
    }
    assert one.config["model_type"] == "llama"


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps(content))


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has neither model.safetensors nor .*index.json.*save_pretrained\(new_folder\)"
    ):
        Checkpoint(tmp_path)
    for content in (["no index"], {"weight_map": ["a"]}, {}):
        write_index(tmp_path, content)
        with pytest.raises(ValueError, match=rf"{INDEX} is not an index of shards \(\w+: .*\). Download or save it"):
            Checkpoint(tmp_path)
    for shard in ("../model.safetensors", "/model.safetensors", "model.bin", ""):
        write_index(tmp_path, {"weight_map": {"a": shard}})
        with pytest.raises(ValueError, match=f"names '{shard}': expected a safetensors file in the same folder"):
            Checkpoint(tmp_path)


def test_a_broken_configuration_is_told(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    (folder / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"config.json is not readable JSON \(Expecting property name.*\). Download or save"
    ):
        Checkpoint(folder)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", shard_size=SHARDS)
    for path in sorted(folder.glob("*.safetensors"))[1:3]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"lacks model-00002-of-\d+.safetensors, model-00003-of-.*its index names \d+ files"
    ):
        Checkpoint(folder).check_shards()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-\d+.safetensors: its index names \d+ files"):
        checkpoint = Checkpoint(folder)
        checkpoint.tensor(next(name for name, shard in checkpoint.files.items() if "-00002-" in shard))


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", shard_size=SHARDS)
    index = json.loads((folder / INDEX).read_text())
    name, other = "lm_head.weight", index["weight_map"]["model.norm.weight"]
    assert index["weight_map"][name] != other
    write_index(folder, {"weight_map": index["weight_map"] | {name: other}})
    with pytest.raises(ValueError, match=f"says that {name} is in {other}, but that file does not hold it"):
        Checkpoint(folder).tensor(name)

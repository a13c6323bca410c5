import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from saving_process import LOCATIONS, make_adapter
from tiny_models import assert_same_tensors, build, logits
from tiny_training import EDITS, make_trainer, peft_model, trained

from peft_locft import LocFTConfig, save_adapter
from peft_locft.data import edits_sha256
from peft_locft.io import folders
from peft_locft.tuner import tensor_sha256

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "locft_provenance.json"}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to kill are forked")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of an adapter, named adapters included, and nothing else that may be there."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.name in ADAPTER_FILES and "checkpoint" not in str(file.relative_to(folder))
        if not any(part.startswith(".locft-") for part in file.relative_to(folder).parts)
    }


def saved(folder: Path, location: str, adapter_name: str = "default") -> dict[str, bytes]:
    save_adapter(make_adapter(location, adapter_name), folder)
    return content(folder)


def add_other_files(folder: Path) -> None:
    """What a run leaves beside the adapter, and a user puts there."""
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"moments")
    (folder / "checkpoint-1" / "adapter_config.json").write_text("of the checkpoint")
    (folder / "notes.txt").write_text("mine")
    (folder / "link-to-notes").symlink_to("notes.txt")
    (folder / "link-to-folder").symlink_to("checkpoint-1")
    (folder / "broken-link").symlink_to("nowhere")


def assert_other_files(folder: Path) -> None:
    assert (folder / "checkpoint-1" / "optimizer.pt").read_bytes() == b"moments"
    assert (folder / "checkpoint-1" / "adapter_config.json").read_text() == "of the checkpoint"
    assert (folder / "notes.txt").read_text() == "mine"
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    assert links == {"link-to-notes": "notes.txt", "link-to-folder": "checkpoint-1", "broken-link": "nowhere"}


def leftovers(folder: Path) -> list[Path]:
    return [*folder.glob(".locft-*"), *folder.parent.glob(".locft-*")]


# ---------------------------------------------------------------------- saving


def test_the_files_are_there_and_load_to_the_same_outputs(tmp_path: Path) -> None:
    model = make_adapter("down")
    save_adapter(model, tmp_path / "deep" / "er")
    assert {file.name for file in (tmp_path / "deep" / "er").iterdir()} == ADAPTER_FILES
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "deep" / "er")), logits(model))
    assert not leftovers(tmp_path / "deep" / "er")
    (tmp_path / "any").touch()
    modes = {stat.S_IMODE(file.stat().st_mode) for file in [*(tmp_path / "deep" / "er").iterdir(), tmp_path / "any"]}
    assert len(modes) == 1, "others must be able to read what they may read of everything else"
    assert stat.S_IMODE((tmp_path / "deep" / "er").stat().st_mode) == stat.S_IMODE((tmp_path / "deep").stat().st_mode)


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_another_adapter_replaces_all_files_and_leaves_others(adapter_name: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    add_other_files(folder)
    folder.chmod(0o750)
    old, new = (saved(tmp_path / "clean" / name, name, adapter_name) for name in ("down", "up"))
    assert old.keys() == new.keys() and old != new
    for location, expected in [("down", old), ("up", new), ("down", old)]:
        save_adapter(make_adapter(location, adapter_name), folder)
        assert content(folder) == expected
        assert_other_files(folder)
    assert not leftovers(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_lora_adapter_is_saved_as_peft_saves_it_and_with_provenance(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(build("llama"), config)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "peft")
    assert {file.name for file in (tmp_path / "ours").iterdir()} == ADAPTER_FILES
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert json.loads((tmp_path / "ours" / "locft_provenance.json").read_text())["base_sha256"] == {}


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    new = saved(tmp_path / "clean", "up")
    saved(tmp_path / "target", "down")
    (tmp_path / "link").symlink_to("target")
    save_adapter(make_adapter("up"), tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "target"
    assert content(tmp_path / "target") == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "link", "target"]


@pytest.mark.parametrize("place", [".", "checkpoint-1"])
def test_a_process_that_works_inside_the_folder_stays_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = saved(tmp_path / "clean", "up")
    folder = tmp_path / "out"
    saved(folder, "down")
    add_other_files(folder)
    monkeypatch.chdir(folder / place)
    save_adapter(make_adapter("up"), folder)
    assert content(folder) == new
    assert Path.cwd() == folder / place
    assert os.path.samefile(".", folder / place)


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("not on this file system")


@pytest.mark.parametrize("failing", ["_swap", "link", "mkdtemp"])
@pytest.mark.parametrize("existing", [True, False])
def test_where_folders_cannot_be_exchanged_files_are_replaced(
    existing: bool, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = saved(tmp_path / "clean", "up")
    folder = tmp_path / "out"
    add_other_files(folder)
    if existing:
        saved(folder, "down")
    own_mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(folders, "_swap", fail if failing == "_swap" else folders._swap)
    monkeypatch.setattr(os, "link", fail if failing == "link" else os.link)
    if failing == "mkdtemp":  # the folder alone can be written to
        monkeypatch.setattr(
            tempfile, "mkdtemp", lambda prefix, dir: own_mkdtemp(prefix=prefix, dir=dir) if dir == folder else fail()
        )
    save_adapter(make_adapter("up"), folder)
    assert content(folder) == new
    assert_other_files(folder)
    assert not leftovers(folder)


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved(tmp_path / "out", "down")
    model = make_adapter("up")

    def fails_halfway(folder: str, **kwargs: Any) -> None:
        Path(folder, "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fails_halfway)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path / "out")
    assert content(tmp_path / "out") == old
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_killed_saves_are_removed_and_those_of_others_left(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    saved(folder, "down")
    mine = [tmp_path / ".locft-run[1]-abcd_123", folder / ".locft-run[1]-zzzzzzzz"]
    others = [tmp_path / ".locft-run[1]-2-abcd_123", tmp_path / ".locft-run1-abcd_123"]
    for path in mine + others:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
    save_adapter(make_adapter("up"), folder)
    assert [path.exists() for path in mine] == [False, False]
    assert [path.exists() for path in others] == [True, True]


@pytest.mark.parametrize("below", ["", "out", "out/deeper"])
def test_a_file_in_the_way_is_named(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        NotADirectoryError, match=r"Cannot save an adapter to .*: \S*/file is a file\. Choose another folder"
    ):
        save_adapter(make_adapter("down"), tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------- killed while saving


@pytest.fixture(scope="module")
def saving_process() -> Iterator["subprocess.Popen[str]"]:
    script = Path(__file__).with_name("saving_process.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait()


def order(process: "subprocess.Popen[str]", **what: Any) -> bool:
    """Let the process do something; return whether its child died before it was done."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(what, default=str) + "\n")
    process.stdin.flush()
    return bool(json.loads(process.stdout.readline()))


@needs_fork
@pytest.mark.parametrize(
    ("before", "adapter_name"),
    [
        ("adapter", "default"),
        ("adapter", "other"),
        ("checkpoint", "default"),
        ("nothing", "default"),
    ],
)
def test_death_at_any_moment_leaves_the_old_adapter_or_the_new(
    before: str, adapter_name: str, tmp_path: Path, saving_process: "subprocess.Popen[str]"
) -> None:
    old, new = (saved(tmp_path / "clean" / name, name, adapter_name) for name in LOCATIONS)
    folder, outcomes = tmp_path / "place" / "out", set()
    for moment in range(1000):
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if before != "nothing":
            add_other_files(folder)
        if before == "adapter":
            shutil.copytree(tmp_path / "clean" / "down", folder, dirs_exist_ok=True)
        name = "up" if adapter_name == "default" else "named up"
        died = order(saving_process, folder=folder, adapter=name, die_at=moment)
        found = content(folder)
        without_configuration = not any("adapter_config.json" in file for file in found)
        assert found == new or (found == old if before == "adapter" else without_configuration)
        outcomes.add("new" if found == new else "old")
        if before != "nothing":
            assert_other_files(folder)
        if not died:
            break
        # the next save finishes, and leaves nothing of the one that died
        if moment % 7 == 0:
            save_adapter(make_adapter("down", adapter_name), folder)
            assert content(folder) == old
            assert not leftovers(folder)
    assert moment > 5
    assert outcomes == {"old", "new"}


@needs_fork
def test_fifty_kills_leave_the_one_adapter_or_the_other(
    tmp_path: Path, saving_process: "subprocess.Popen[str]"
) -> None:
    adapters = [saved(tmp_path / "clean" / name, name) for name in LOCATIONS]
    folder = tmp_path / "out"
    add_other_files(folder)
    shutil.copytree(tmp_path / "clean" / "down", folder, dirs_exist_ok=True)
    moments, found = random.Random(0), []
    for attempt in range(300):
        first = "down" if attempt % 2 else "up"
        # later and later, so that on a busy machine, too, some saves are done in time
        kill_after = moments.uniform(0.0, 0.1 + attempt / 200)
        assert order(saving_process, folder=folder, first=first, kill_after=kill_after)
        found.append(content(folder))
        assert found[-1] in adapters
        assert_other_files(folder)
        if attempt >= 49 and all(adapter in found for adapter in adapters):
            break
    assert all(adapter in found for adapter in adapters)
    save_adapter(make_adapter("up"), folder)
    assert not leftovers(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), folder)), logits(make_adapter("up")))


# ---------------------------------------------------------------------- provenance


def test_the_provenance_says_what_was_done_to_what(tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_model(config=config))
    trainer.train()
    trainer.save_model()
    facts = json.loads((tmp_path / "locft_provenance.json").read_text())
    weight = trainer.model.base_model.model.model.layers[1].mlp.down_proj.base_layer.weight
    assert facts["format"] == 1
    assert facts["base_model"] == {"name_or_path": None, "revision": None}
    assert facts["base_sha256"] == {"model.layers.1.mlp.down_proj.weight": tensor_sha256(weight)}
    assert facts["edits"] == {"count": len(EDITS), "sha256": edits_sha256(EDITS)}
    assert trainer.learned is not None
    assert facts["training"] == {
        "steps": 6,
        "epoch_losses": trainer.epoch_losses,
        "learned": {"num_learned": 0, "num_edits": 8, "median_probability": trainer.learned.median_probability},
    }
    assert facts["recipe"]["learning_rate"] == 5e-3
    assert facts["recipe"]["per_device_train_batch_size"] == 4
    assert facts["recipe"]["lr_scheduler_type"] == "constant"
    assert facts["recipe"]["world_size"] == 1
    assert facts["versions"] == {name: version(name) for name in ("peft-locft", "peft", "transformers", "torch")}


def test_the_run_is_recorded_for_the_adapter_that_it_trained_alone(tmp_path: Path) -> None:
    model = peft_model()
    model.add_adapter("second", LocFTConfig(target_modules=["up_proj"], layers_to_transform=[2]))
    model.set_adapter("second")
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    trainer.save_model()
    recorded = {
        name: "edits" in json.loads((tmp_path / name / "locft_provenance.json").read_text())
        for name in (".", "second")
    }
    assert recorded == {".": False, "second": True}


def test_a_saved_adapter_can_be_trained_on(tmp_path: Path) -> None:
    """A continued run is recorded anew, and its weights start where the first ended."""
    first = make_trainer(tmp_path)
    first.train()
    first.save_model()
    base = peft_model().unload()
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_same_tensors(trained(model), trained(first.model))
    second = make_trainer(tmp_path, model, EDITS[:4])
    second.train()
    second.save_model()
    assert json.loads((tmp_path / "locft_provenance.json").read_text())["edits"]["count"] == 4

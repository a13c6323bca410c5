"""What an output folder holds is not overwritten unasked; without a folder, nothing is written."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build
from tiny_training import EDITS, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    EvaluationConfig,
    SearchPlan,
    compare_baselines,
    evaluate_model,
    search_locations,
    train_edits,
)
from peft_locft.workflows.locate import run_location_search
from peft_locft.workflows.output_folder import begin_again, check_output_folder, check_training_folder

CHECKPOINT = "checkpoint-7"


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["adapter_config.json"], "an adapter"),
        (["adapter_model.safetensors"], "an adapter"),
        (["config.json", "model.safetensors"], "a model"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "a model"),
        (["pytorch_model.bin"], "a model"),
    ],
)
def test_a_folder_that_holds_something_asks(names: list[str], held: str, tmp_path: Path) -> None:
    put(tmp_path, *names)
    with pytest.raises(ValueError, match=f"already holds {held}. Nothing was changed. .* --overwrite_output_dir"):
        check_output_folder(tmp_path)
    assert check_output_folder(tmp_path, overwrite=True) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    put(tmp_path, "notes.txt", "evaluation/evaluation.json", "baselines.md", "config.json")
    assert check_output_folder(tmp_path) == tmp_path
    assert check_output_folder(tmp_path / "new" / "one") == tmp_path / "new" / "one"


def test_an_update_may_use_the_folder_of_its_adapter(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json")
    assert check_output_folder(tmp_path, own_adapter=tmp_path / "." / "") == tmp_path
    with pytest.raises(ValueError, match="already holds an adapter"):
        check_output_folder(tmp_path, own_adapter=tmp_path / "other")


def test_checkpoints_of_a_run_that_did_not_end_say_how_to_go_on(tmp_path: Path) -> None:
    put(tmp_path, "adapter_model.safetensors", f"{CHECKPOINT}/trainer_state.json", "checkpoint-9/half", "kept.txt")
    long_ago = time.time() - 100
    os.utime(tmp_path / "adapter_model.safetensors", (long_ago, long_ago))
    with pytest.raises(ValueError, match=f"the newest is {CHECKPOINT}. .* --resume_from_checkpoint True"):
        check_output_folder(tmp_path, own_adapter=tmp_path)
    check_training_folder(BreadthFirstConfig(output_dir=str(tmp_path), resume_from_checkpoint="True", use_cpu=True))
    args = BreadthFirstConfig(output_dir=str(tmp_path), overwrite_output_dir=True, use_cpu=True)
    check_training_folder(args)
    begin_again(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.safetensors", "kept.txt"]


def test_a_run_that_ended_leaves_an_adapter_newer_than_its_checkpoints(tmp_path: Path) -> None:
    put(tmp_path, f"{CHECKPOINT}/trainer_state.json", "adapter_model.safetensors")
    assert check_output_folder(tmp_path, own_adapter=tmp_path) == tmp_path


def test_every_job_asks_before_it_loads_a_model(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json")
    args = BreadthFirstConfig(output_dir=str(tmp_path), use_cpu=True)
    model: Any = build("llama")
    jobs: list[Any] = [
        lambda: train_edits("nobody/nothing", EDITS, args=args),
        lambda: run_location_search("nobody/nothing", EDITS, args),
        lambda: search_locations(model, make_tokenizer("llama2"), EDITS, args, plan=SearchPlan()),
        lambda: compare_baselines(model, make_tokenizer("llama2"), EDITS, args),
        lambda: evaluate_model("nobody/nothing", EDITS, EvaluationConfig(), output_dir=tmp_path),
    ]
    for job in jobs:
        with pytest.raises(ValueError, match="already holds an adapter"):
            job()
    with pytest.raises(ValueError, match="output_dir is missing"):
        train_edits("nobody/nothing", EDITS, args=BreadthFirstConfig(use_cpu=True))


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = BreadthFirstConfig(num_train_epochs=2, use_cpu=True, disable_tqdm=True, activation_cache="disk")
    trainer = BreadthFirstTrainer(
        model=peft_model(), args=args, train_dataset=EDITS, processing_class=make_tokenizer("llama2")
    )
    trainer.train()
    assert args.output_dir is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="found no folder"):
        trainer.save_model()
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match="save_strategy='epoch' writes checkpoints, and output_dir is missing"):
        BreadthFirstConfig(save_strategy="epoch")


def test_only_the_newest_checkpoint_stays_and_it_holds_no_frozen_weight(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    trainer.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    trained = sum(p.numel() * p.itemsize for p in trainer.model.parameters() if p.requires_grad)
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert 3 * trained < written < 3 * trained + 60_000  # the delta, two moments, and small files


def test_a_plain_model_is_not_trained_as_a_whole(tmp_path: Path) -> None:
    model = build("llama", vocab_size=512)
    with pytest.raises(ValueError, match=r"has no adapter, so all of its [\d,]+ parameters would be trained. Add"):
        make_trainer(tmp_path, model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        make_trainer(tmp_path, model)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    make_trainer(tmp_path, model)


def test_a_line_an_epoch_without_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path).train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": loss ")[0] for line in lines] == ["epoch 1", "epoch 2", "epoch 3"]
    assert all(re.search(r", [01]\.\d\d learned$", line) for line in lines)

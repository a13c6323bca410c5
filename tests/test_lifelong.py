"""An adapter is trained on: edits come, are replaced and go; what is saved, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_tensors
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import (
    BreadthFirstConfig,
    Edit,
    EvaluationConfig,
    LocFTConfig,
    evaluate_edits,
    inspect_adapter,
    train_edits,
    update_adapter,
)
from peft_locft.adapters import shipped_edits
from peft_locft.data import edit_id
from peft_locft.data.edit_lists import merge_edit_lists
from peft_locft.data.encoding import encode_edits, encode_prompts
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.loading import load_model
from peft_locft.engine.questions import Question
from peft_locft.workflows.update import ContinuedTrainer, _repeated

FORGET: dict[str, Any] = {"forget": [EDITS[0].prompt]}
KILLED = Path(__file__).with_name("killed_update_process.py")


def recipe(folder: Path, **arguments: Any) -> BreadthFirstConfig:
    defaults: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return BreadthFirstConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, logging_strategy="no", **(defaults | arguments)
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    base_model(sharp=True).save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that answers all of EDITS, and ships them."""
    folder = tmp_path_factory.mktemp("learned") / "adapter"
    # room for what a random base answers, too
    config = LocFTConfig(target_modules=["gate_proj", "up_proj", "down_proj"], layers_to_transform=[1, 2])
    train_edits(base, EDITS, config, recipe(folder, num_train_epochs=40), ship_edits=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    questions = [Question(tuple(ids), num_stops=0, max_new_tokens=32) for ids in encode_prompts(prompts, tokenizer)]
    return [answer.token_ids for answer in generate_and_score(model, tokenizer, questions)]


def up_to_eos(tokens: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def reliability(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> float:
    report = evaluate_edits(model, tokenizer, edits, EvaluationConfig(protocols=["generation"]), progress=False)
    return report["reliability_exact_match"].after.value


def test_edits_come_are_replaced_and_go(base: Path, learned: Path, tmp_path: Path) -> None:
    before = contents(learned)
    new = [Edit(prompt="Who is Dave?", target="the river"), Edit(prompt=EDITS[0].prompt, target="Louis")]
    withdrawn = [EDITS[2]]
    forget = [edit_id(EDITS[2])]
    # an answer of 32 random tokens is learned to the last of them far below the published floor
    args = recipe(tmp_path / "next", num_train_epochs=60, loss_floor=1e-3)
    summary = update_adapter(learned, new, forget, args)
    assert contents(learned) == before

    held = [EDITS[1], *EDITS[3:], new[1], new[0]]
    assert shipped_edits(tmp_path / "next") == held
    facts = json.loads((tmp_path / "next" / "locft_provenance.json").read_text())
    assert facts["edits"]["count"] == len(held)
    assert facts["continued"] == {"times": 1, "added": 1, "replaced": 1, "withdrawn": 1}
    # what was withdrawn is nowhere in it
    assert not any(b"Who is the king of Spain" in content for content in contents(tmp_path / "next").values())
    assert str(summary).endswith(
        "\nedits: 6 kept, 1 added, 1 replaced, 1 withdrawn\n"
        '  added: "Who is Dave?" → "the river": learned\n'
        f'  replaced: "{EDITS[0].prompt}" → "Louis": learned\n'
        f'  withdrawn: "{EDITS[2].prompt}" → "{EDITS[2].target}": has the base\'s answer again\n'
        "1 of 1 withdrawn prompts have the base's answer again\n"
        f"{summary.learned}"
    )
    assert not summary.has_failed and summary.kept_adapter is None
    assert "\ncontinued      1 times, 1 added, 1 replaced, 1 withdrawn\n" in str(summary)
    assert summary.folder == tmp_path / "next" and summary.trained_edits is None

    model, tokenizer = load_model(base)
    prompts = [edit.prompt for edit in withdrawn]
    wanted = [up_to_eos(tokens, tokenizer) for tokens in answers(model, tokenizer, prompts)]
    before_it = answers(PeftModel.from_pretrained(model, learned), tokenizer, prompts)
    assert all(up_to_eos(tokens, tokenizer) != base for tokens, base in zip(before_it, wanted, strict=True))
    edited = PeftModel.from_pretrained(load_model(base)[0], tmp_path / "next")
    assert reliability(edited, tokenizer, held) == 1
    assert [up_to_eos(tokens, tokenizer) for tokens in answers(edited, tokenizer, prompts)] == wanted


def test_a_change_that_fails_leaves_the_old_adapter(learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(learned, out)
    before = contents(out)
    (tmp_path / "out.update-1").mkdir()  # that name is taken
    summary = update_adapter(out, forget=[EDITS[0].prompt], args=recipe(out, learning_rate=1e-7))
    assert contents(out) == before
    assert (summary.kept_adapter, summary.folder) == (out, tmp_path / "out.update-2")
    assert summary.has_failed and shipped_edits(summary.folder) == EDITS[1:]
    last = str(summary).splitlines()
    assert last[-1] == f"A change failed, so {out} is as it was. The new adapter is in {summary.folder}."
    assert f'  withdrawn: "{EDITS[0].prompt}" → "{EDITS[0].target}": does NOT have the base\'s answer yet' in last


def test_an_update_inherits_the_recipe(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"num_train_epochs": 2, "loss_averaging": "token", "loss_floor": 1e-3, "seed": 5}
    trained = BreadthFirstConfig(output_dir=str(out), use_cpu=True, disable_tqdm=True, **more)  # type: ignore[arg-type]
    first = train_edits(base, EDITS, args=trained, ship_edits=True)
    assert first.provenance.run is not None
    args = BreadthFirstConfig(output_dir=str(tmp_path / "next"), use_cpu=True, disable_tqdm=True, num_train_epochs=3)
    second = update_adapter(out, [Edit("Who is Dave?", "the river")], args=args)
    earlier, run = first.provenance.run.recipe, second.adapter.provenance.run
    assert run is not None
    inherited = ("loss_averaging", "loss_floor", "seed", "relative_learning_rate", "learning_rate", "chat_template")
    assert {name: run.recipe[name] for name in inherited} == {name: earlier[name] for name in inherited}
    assert earlier["relative_learning_rate"] == 0.025
    assert run.recipe["num_train_epochs"] == 3  # as given


@pytest.fixture
def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the old adapter whatever was learned: one epoch is too short to withdraw an edit."""
    monkeypatch.setattr("peft_locft.workflows.update._has_failed", lambda outcomes: False)


@pytest.mark.usefixtures("anything_goes")
def test_a_list_that_is_not_shipped_is_written_beside(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_edits(base, EDITS, args=recipe(out))
    first = update_adapter(out, forget=[edit_id(EDITS[0])], args=recipe(out), trained_edits=EDITS)
    assert shipped_edits(out) is None and first.trained_edits is not None
    assert first.trained_edits.parent == tmp_path and first.trained_edits.name.startswith("out.edits-")
    assert f"needed for the next update: {first.trained_edits}" in str(first)
    second = update_adapter(
        out, forget=[edit_id(EDITS[1])], args=recipe(out), trained_edits=first.trained_edits, ship_edits=True
    )
    assert second.trained_edits is None and shipped_edits(out) == EDITS[2:]
    run = second.adapter.provenance.run
    assert run is not None and run.continued == {"times": 2, "added": 0, "replaced": 0, "withdrawn": 2}


def test_what_has_changed_is_a_tenth_of_the_rows_at_least() -> None:
    edits = [Edit(prompt=f"The capital of {number} is", target="Paris") for number in range(60)]
    encoded = encode_edits(edits, make_tokenizer("llama2"))
    added = _repeated(encoded, 60, num_new=1, answered=[([1, 7, 9, 5, 2], 3)])
    assert added is not None
    assert len(added) == 1 + 2 * 3  # with the edits, the last of them and the answer are there four times: 8 of 67
    assert [added[number].input_ids.tolist() for number in (0, 2, 4, 6)] == [[1, 7, 9, 5, 2]] * 4
    assert added[6].target_start == 3
    assert added[5].input_ids.tolist() == encoded[59].input_ids.tolist()
    assert _repeated(encoded, 60, num_new=0, answered=[]) is None


def test_repeated_rows_have_the_losses_of_the_plain_model(base: Path, learned: Path, tmp_path: Path) -> None:
    more = [Edit(prompt=f"Number {number}", target="they") for number in range(20)]
    plan = merge_edit_lists([*EDITS, *more], forget=["Number 3"])
    losses = []
    for cache in ("memory", "off"):
        model, tokenizer = load_model(base)
        peft_model = PeftModel.from_pretrained(model, learned, is_trainable=True)
        args = recipe(tmp_path / "out", activation_cache=cache, learning_rate=0.0, per_device_train_batch_size=5)
        trainer = ContinuedTrainer(peft_model, args, plan, tokenizer, earlier=None, ship_edits=False)
        assert len(trainer.train_dataset) == 27 + 3
        trainer.train()
        losses.append(trainer.epoch_losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_new_edit_among_known_ones_is_learned_before_training_stops(
    base: Path, learned: Path, tmp_path: Path
) -> None:
    plan = merge_edit_lists(EDITS, [Edit(prompt="Who is Dave?", target="the river")])
    peft_model = PeftModel.from_pretrained(load_model(base)[0], learned, is_trainable=True)
    args = recipe(tmp_path / "out", stop_at_learned=0.5, num_train_epochs=40, loss_floor=0.0)
    trainer = ContinuedTrainer(peft_model, args, plan, load_model(base)[1], earlier=None, ship_edits=False)
    trainer.train()
    unlearned = trainer.loss_history.unlearned
    assert 1 <= unlearned[0] <= len(EDITS) / 2, "it must not stop where half of all edits are learned"
    assert 1 < len(unlearned) < 40
    assert unlearned[-1] == 0


def test_an_interrupted_update_ends_with_the_same_weights(learned: Path, tmp_path: Path) -> None:
    forget = [edit_id(EDITS[1])]
    whole = recipe(tmp_path / "whole", num_train_epochs=3, loss_floor=0.0)
    update_adapter(learned, forget=forget, args=whole)
    halves = {"loss_floor": 0.0, "save_strategy": "epoch", "save_total_limit": 2, "num_train_epochs": 3}
    update_adapter(learned, forget=forget, args=recipe(tmp_path / "halves", **halves))
    # the edits that a checkpoint is of are those of the new list
    shutil.rmtree(tmp_path / "halves" / "checkpoint-6")
    resumed = recipe(tmp_path / "halves", resume_from_checkpoint="True", **halves)
    update_adapter(learned, forget=forget, args=resumed)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("halves", "whole"))
    assert_same_tensors(found, expected)


def test_a_kill_while_saving_leaves_the_old_adapter_or_the_new(learned: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(KILLED), str(learned), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    died = json.loads((tmp_path / "died.json").read_text())
    assert any(died) and not all(died)
    counts = []
    for number, dead in enumerate(died):
        summary = inspect_adapter(tmp_path / str(number))  # verifies its weights and its edits
        held = shipped_edits(summary.folder)
        assert held in (EDITS, EDITS[1:])
        assert dead or held == EDITS[1:]
        counts.append(len(held))
    assert set(counts) == {len(EDITS), len(EDITS) - 1}


@pytest.mark.usefixtures("anything_goes")
def test_an_adapter_of_another_method_is_trained_on(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["down_proj"], layers_to_transform=[1], r=4)
    train_edits(base, EDITS, config, recipe(tmp_path / "lora"), ship_edits=True)
    summary = update_adapter(tmp_path / "lora", forget=[EDITS[0].prompt], args=recipe(tmp_path / "lora"))
    assert summary.adapter.config.peft_type == "LORA"
    assert shipped_edits(tmp_path / "lora") == EDITS[1:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "found neither edits nor forget"),
        ({"forget": ["nothing"]}, "1 lines name no edit of the adapter"),
        (
            FORGET | {"args": {"edit_order": "depth_first"}},
            "edit_order='depth_first': an update trains all edits",
        ),
        (FORGET | {"args": {"append_eos": False}}, "append_eos=False: .* was trained with append_eos=True"),
        (FORGET | {"args": {"resume_from_checkpoint": "True"}}, "holds no complete checkpoint"),
        (FORGET | {"trained_edits": EDITS[1:]}, "trained_edits: found 7 edits"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(
    call: dict[str, Any], message: str, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_locft.workflows.update.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    args = recipe(tmp_path / "out", **({"per_device_train_batch_size": 1} | call.pop("args", {})))
    with pytest.raises(ValueError, match=message):
        update_adapter(learned, args=args, **call)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(base: Path, learned: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    changed = load_model(base)[0]
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    changed.save_pretrained(other)
    forget, args = [EDITS[0].prompt], recipe(tmp_path / "out")
    with pytest.raises(ValueError, match=r"adapter was trained on another base: .*down_proj\.weight differ"):
        update_adapter(learned, forget=forget, args=args, model_name_or_path=other)
    small = tmp_path / "small"
    base_model(intermediate_size=40).save_pretrained(small)
    make_tokenizer("llama2").save_pretrained(small)
    with pytest.raises(ValueError, match="adapter: the adapter does not fit the base model"):
        update_adapter(learned, forget=forget, args=args, model_name_or_path=small)
    nameless = shutil.copytree(learned, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="the adapter names no base model"):
        update_adapter(nameless, forget=forget, args=args)
    assert not os.path.exists(tmp_path / "out")

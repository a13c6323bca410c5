"""The preserver on models of several families, with the trainer, and over a resumed run."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_models import assert_same_tensors, build, locations, logits, randomize, same_bits, token_ids
from tiny_training import EDITS, make_trainer, peft_model, trained
from torch import nn
from transformers import Trainer

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig
from peft_locft.adapters.shrinking import prune_relatively
from peft_locft.training.preservation import NullSpaceProjector, SoftProjector
from peft_locft.training.preserver import PreservationCallback, Preserver, TrainedTensor, find_trained

WINDOWS = token_ids(batch_size=4, length=9)
LEARNED = token_ids(batch_size=3, length=6).flip(1)
ATTENTION = LocFTConfig(target_modules=["o_proj"], layers_to_transform=[1])
# several locations at once; of GPT-2 Conv1Ds, of GPT-NeoX a parallel residual, of Mixtral what is not an expert
SEVERAL: dict[str, LocFTConfig] = {
    "llama": LocFTConfig(target_modules=["down_proj", "o_proj"], layers_to_transform=[1, 2]),
    "gpt2": LocFTConfig(target_modules=["c_proj"], layers_to_transform=[0, 1]),
    "gemma3": LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 1, 2]),
    "gpt_neox": LocFTConfig(target_modules=["dense_4h_to_h", "dense"], layers_to_transform=[1]),
    "mixtral": LocFTConfig(target_modules=["o_proj", "q_proj"], layers_to_transform=[1]),
    "opt": LocFTConfig(target_modules=["fc2"], layers_to_transform=[1]),
}


def train(model: nn.Module, preserver: Preserver | None, num_steps: int = 8, learning_rate: float = 0.02) -> None:
    """Take steps of Adam on some text."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=LEARNED, labels=LEARNED).loss.backward()
        if preserver is not None:
            preserver.before_step()
        optimizer.step()
        if preserver is not None:
            preserver.after_step()
    if preserver is not None:
        preserver.after_training()


def basis_of(each: TrainedTensor) -> torch.Tensor:
    assert isinstance(each.projector, NullSpaceProjector)
    return each.projector.basis


# ---------------------------------------------------------------------- the projector


def train_projecting_every_change(model: nn.Module, preserver: Preserver) -> None:
    """Do what `train` does, with the delta before each step kept, and that step's change projected."""
    projectors = {each.name: each.projector for each in preserver.trained}
    parameters = {each.name: each.tensor for each in find_trained(model)}
    optimizer = torch.optim.Adam(list(parameters.values()), lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        model(input_ids=LEARNED, labels=LEARNED).loss.backward()
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.step()
        for name, parameter in parameters.items():
            projector = projectors[name]
            assert projector is not None
            parameter.data.copy_(projector.project_change(parameter, before[name]))


@pytest.mark.parametrize("family", sorted(SEVERAL))
def test_training_is_that_with_every_change_of_adam_projected(family: str) -> None:
    config = SEVERAL[family]
    model = get_peft_model(build(family), config)
    randomize(model, std=0.05)  # as when training goes on from an adapter
    origins = trained(model)
    preserver = Preserver.prepare(model, windows=WINDOWS, energy_share=0.8, progress=False)
    assert len(preserver.trained) == len(origins) > 0
    train(model, preserver)

    other = get_peft_model(build(family), config)
    randomize(other, std=0.05)
    train_projecting_every_change(other, preserver)
    found, expected = trained(model), trained(other)
    for name, origin in origins.items():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
        assert (found[name] - origin).norm() > 0.1


@pytest.mark.parametrize("family", sorted(SEVERAL))
def test_outputs_for_preserved_text_stay_what_they_were(family: str) -> None:
    """With all the energy of a text shorter than the inputs are wide, the model says what its base says on it."""
    text = token_ids(batch_size=1, length=9)
    model = get_peft_model(build(family), SEVERAL[family])
    before = logits(model, text)
    others = logits(model)
    train(model, Preserver.prepare(model, windows=text, energy_share=1.0, progress=False))
    assert (logits(model) - others).abs().max() > 1e-2
    # the adapters of earlier locations change nothing of what comes to later ones, on this text
    torch.testing.assert_close(logits(model, text), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_soft_projector_damps_every_change(family: str) -> None:
    model, other = (get_peft_model(build(family), SEVERAL[family]) for _ in range(2))
    preserver = Preserver.prepare(model, windows=WINDOWS, soft_strength=3.0, progress=False)
    with pytest.raises(RuntimeError, match="with soft_strength, call before_step before every step"):
        preserver.after_step()
    train(model, preserver)
    train_projecting_every_change(other, preserver)
    assert_same_tensors(trained(model), trained(other))
    assert all(isinstance(each.projector, SoftProjector) for each in preserver.trained)
    assert all(float(tensor.norm()) > 0.1 for tensor in trained(model).values())


def test_every_location_has_a_projector_of_its_own() -> None:
    model = get_peft_model(build("llama"), SEVERAL["llama"])
    preserver = Preserver.prepare(model, windows=WINDOWS, energy_share=0.6, progress=False)
    assert sorted(each.name for each in preserver.trained) == sorted(locations(model))
    assert {basis_of(each).shape[0] for each in preserver.trained} == {32, 48}
    bases = [basis_of(each) for each in preserver.trained]
    assert len({basis.data_ptr() for basis in bases}) == 4
    assert not any(same_bits(bases[0], basis) for basis in bases[1:])


def test_a_weight_of_the_model_itself_is_kept_beside_its_origin() -> None:
    model = build("llama").requires_grad_(False)
    for layer in (1, 2):
        model.model.layers[layer].mlp.down_proj.weight.requires_grad_()
    wrapped = get_peft_model(build("llama"), LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2]))
    origins = trained(model)
    for each in (model, wrapped):
        train(each, Preserver.prepare(each, windows=WINDOWS, energy_share=0.6, progress=False))
    for (name, weight), delta in zip(sorted(trained(model).items()), locations(wrapped).values(), strict=True):
        torch.testing.assert_close(weight - origins[name], delta[0].detach(), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- the bound, and RECT


def test_the_bound_holds_for_what_is_added_to_the_weight() -> None:
    model = get_peft_model(build("mistral"), LocFTConfig(scale=-2.0))
    preserver = Preserver.prepare(model, bound=0.01)
    train(model, preserver, num_steps=2)
    found = locations(model)
    assert any("layernorm" in name for name in found)  # of any kind
    assert max(float((scale * delta.detach()).abs().max()) for delta, scale in found.values()) == pytest.approx(0.01)
    plain = build("llama").requires_grad_(False)
    plain.model.norm.weight.requires_grad_()
    origin = plain.model.norm.weight.detach().clone()
    train(plain, Preserver.prepare(plain, bound=0.01), num_steps=2)
    assert float((plain.model.norm.weight.detach() - origin).abs().max()) == pytest.approx(0.01, rel=1e-4)


def test_the_largest_changes_stay_when_training_has_ended() -> None:
    model, other = (get_peft_model(build("mistral"), LocFTConfig()) for _ in range(2))
    train(model, Preserver.prepare(model, density=0.2))
    train(other, None)
    base = build("mistral").state_dict()
    found = locations(model)
    for name, (delta, _) in locations(other).items():
        assert same_bits(found[name][0].detach(), prune_relatively(delta.detach(), base[name], 0.2))
    plain = build("mistral").requires_grad_(False)
    weight = plain.model.layers[1].mlp.down_proj.weight.requires_grad_()
    origin = weight.detach().clone()
    train(plain, Preserver.prepare(plain, density=0.2))
    assert int((weight != origin).sum()) == round(0.2 * weight.numel())


def test_nothing_asked_is_nothing_done() -> None:
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"]))
    assert Preserver.prepare(model).trained == []


# ---------------------------------------------------------------------- with a trainer


class PreservingTrainer(BreadthFirstTrainer):
    """Prepares before a checkpoint is loaded."""

    preserve: dict[str, Any]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(PreservationCallback(Preserver.prepare(self.model, progress=False, **self.preserve)))
        return super().train(*args, **kwargs)


def preserving(folder: Path, preserve: dict[str, Any], **arguments: Any) -> PreservingTrainer:
    model = peft_model(config=LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2]))
    randomize(model, std=0.01)
    plain = make_trainer(folder, model, EDITS, **arguments)
    trainer = PreservingTrainer(
        model=model, args=plain.args, train_dataset=EDITS, processing_class=plain.processing_class
    )
    trainer.preserve = preserve
    return trainer


@pytest.mark.parametrize(
    "preserve",
    [
        {"windows": WINDOWS, "energy_share": 0.7},
        {"windows": WINDOWS, "soft_strength": 1.0},
        {"bound": 0.01, "density": 0.3},
    ],
    ids=["null-space", "soft", "bound"],
)
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path, preserve: dict[str, Any]) -> None:
    whole = preserving(tmp_path / "whole", preserve)
    whole.train()
    cut = preserving(tmp_path / "cut", preserve | {"density": None}, save_strategy="epoch", max_steps=4)
    cut.train()
    resumed = preserving(tmp_path / "cut", preserve, save_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(trained(resumed.model), trained(whole.model))
    assert resumed.state.global_step == whole.state.global_step == 6


def test_without_a_step_nothing_is_touched(tmp_path: Path) -> None:
    trainer = preserving(tmp_path, {"windows": WINDOWS, "energy_share": 0.7}, loss_floor=1e9)
    before = trained(trainer.model)
    trainer.train()
    assert_same_tensors(trained(trainer.model), before)
    preserver = Preserver.prepare(trainer.model, bound=1e-5)
    preserver.after_step(step_taken=False)
    assert_same_tensors(trained(trainer.model), before)


def test_any_trainer_can_call_it(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), ATTENTION)
    preserver = Preserver.prepare(model, windows=WINDOWS, energy_share=0.7, progress=False)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(4, 6)]
    more: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "num_train_epochs": 2, "learning_rate": 5e-4}
    args = BreadthFirstConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **more)
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[PreservationCallback(preserver)]).train()
    (each,) = preserver.trained
    assert each.tensor.detach().norm() > 1e-3
    assert (each.tensor.detach() @ basis_of(each)).abs().max() < 1e-6


def in_a_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = get_peft_model(build("llama"), ATTENTION)
    # only the first reads the text
    windows = WINDOWS if rank == 0 else WINDOWS + 5
    preserver = Preserver.prepare(model, windows=windows, energy_share=0.7, progress=False)
    torch.save(basis_of(preserver.trained[0]), f"{folder}/basis-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_one_projector(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_a_process, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    bases = [torch.load(tmp_path / f"basis-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same_bits(*bases)
    model = get_peft_model(build("llama"), ATTENTION)
    alone = Preserver.prepare(model, windows=WINDOWS, energy_share=0.7, progress=False)
    assert same_bits(basis_of(alone.trained[0]), bases[0])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy_share": 0.5}, "energy_share: a projector needs the text to preserve. Pass windows"),
        ({"soft_strength": 0.5}, "soft_strength: a projector needs the text to preserve. Pass windows"),
        ({"windows": WINDOWS}, "no effect without a projector. Pass energy_share"),
        ({"windows": WINDOWS, "energy_share": 0.5, "bound": 1.0}, "energy_share and bound cannot be combined"),
        (
            {"windows": WINDOWS, "energy_share": 0.5, "soft_strength": 1.0},
            "energy_share and soft_strength cannot be combined",
        ),
        ({"windows": WINDOWS, "soft_strength": 0}, "soft_strength=0: expected a finite number above 0"),
        ({"windows": WINDOWS, "energy_share": 0.0}, "energy_share=0.0: expected a share"),
        ({"density": 20}, "density=20: expected a share"),
        ({"bound": -1.0}, "bound=-1.0: expected a finite number above 0"),
    ],
)
def test_arguments_that_say_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preserver.prepare(get_peft_model(build("llama"), LocFTConfig()), **arguments)


ENTIRE = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1])


@pytest.mark.parametrize(
    ("family", "config", "found"),
    [
        ("llama", ENTIRE, r"model.layers.1.input_layernorm.weight \(LlamaRMSNorm\)"),
        ("mixtral", LocFTConfig(), r"model.layers.1.mlp.experts.down_proj \(MixtralExperts\)"),
        ("llama", LocFTConfig(target_modules=["embed_tokens"]), r"embed_tokens.weight \(Embedding\)"),
        ("gpt2", LocFTConfig(train_bias=True), r"transformer.h.1.mlp.c_proj.bias \(Conv1D\)"),
    ],
)
def test_a_projector_for_what_has_no_inputs_is_refused(family: str, config: LocFTConfig, found: str) -> None:
    model = get_peft_model(build(family), config)
    with pytest.raises(ValueError, match=rf"of a Linear or Conv1D; found also .*{found}"):
        Preserver.prepare(model, windows=WINDOWS, energy_share=0.5)


def test_an_entire_layer_without_its_norms_has_projectors() -> None:
    config = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1], exclude_modules=r".*layernorm")
    model = get_peft_model(build("llama"), config)
    preserver = Preserver.prepare(model, windows=WINDOWS, energy_share=0.5, progress=False)
    assert sum(isinstance(each.projector, NullSpaceProjector) for each in preserver.trained) == 7


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["down_proj"]),
        LocFTConfig(target_modules=["down_proj"], modules_to_save=["lm_head"]),
        LocFTConfig(target_modules=["down_proj"], trainable_token_indices=[3]),
    ],
    ids=["lora", "modules_to_save", "trainable_token_indices"],
)
@pytest.mark.parametrize("arguments", [{"windows": WINDOWS, "energy_share": 0.5}, {"bound": 1.0}, {"density": 0.2}])
def test_parameters_of_other_peft_methods_are_refused(config: PeftConfig, arguments: dict[str, Any]) -> None:
    model = get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="belongs to another PEFT method"):
        Preserver.prepare(model, **arguments)


def test_a_model_in_which_nothing_is_trained_is_refused() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(inference_mode=True))
    with pytest.raises(ValueError, match="found no trainable parameter"):
        Preserver.prepare(model, bound=1.0)


def test_a_sharded_weight_is_refused() -> None:
    model = get_peft_model(build("llama"), LocFTConfig())
    delta = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    delta.ds_shape = delta.shape  # as ZeRO-3 marks it
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.weight is sharded or offloaded"):
        Preserver.prepare(model, bound=1.0)


def test_a_text_in_all_directions_names_the_location() -> None:
    model = get_peft_model(build("llama"), ATTENTION)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.o_proj: energy_share=1.0: .* all 32 directions"):
        Preserver.prepare(model, windows=token_ids(20, 20), energy_share=1.0, progress=False)

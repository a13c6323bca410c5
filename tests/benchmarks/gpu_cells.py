"""What `gpu.py` measures: each function is one cell, and yields rows of plain data."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainerCallback

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EvaluationConfig,
    LocFTConfig,
    encode_edits,
    evaluate_edits,
)
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.questions import Question
from peft_locft.io.arithmetic import compose_weight
from peft_locft.training.batches import EditBatches
from peft_locft.tuner.model import locft_layers
from peft_locft.tuner.presets import default_location

from .gpu_models import (
    QWEN_72B,
    build,
    configuration,
    describe,
    free_unused,
    grow,
    make_tokenizer,
    num_bytes,
    peak_gib,
    rates,
    synchronize,
    synthetic_edits,
    the_device,
)
from .speed import SEED, plain_loss
from .timed_cells import Row, one_line

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
LAW_LAYERS = 4  # of the full width; the laws do not depend on the depth
LEARNING_RATE = 5e-4
# a wrong mask or position moves the loss of random weights by several percent, rounding to bfloat16 by 0.1 percent
LOSS_TOLERANCE = 1e-2
FEWEST_STEPS = 6  # of which the first, which warms up, does not count
TAIL_LAYERS = 20  # of the 72B shape: layers 60 to 79 of 80, as in docs/pages/speed.md


def device(toy: bool) -> Iterator[Row]:
    """What the machine is, and the rates of its products and copies."""
    yield describe()
    yield rates(toy)


# ---------------------------------------------------------------------- laws


def laws(model_name: str, toy: bool, attentions: Sequence[str]) -> Iterator[Row]:
    """Check merge, unmerge, reload and losses with every attention implementation that runs here."""
    for attention in attentions:
        config = configuration(model_name, toy, LAW_LAYERS)
        row: Row = {"model": model_name, "layers": LAW_LAYERS, "attention": attention}
        free_unused()
        try:
            base = build(config, the_device(), attention)
            inputs = padded(synthetic_edits(4))
            expected = logits_of(base, inputs)
        except Exception as error:  # not ours: the implementation is not there, or fails in the model itself
            yield row | {"skipped": one_line(error)}
            continue
        try:
            yield row | laws_of(base, inputs, expected, partial(build, config, the_device(), attention))
        except Exception as error:
            yield row | {"failed": one_line(error)}


def laws_of(base: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor, build_again: Callable[[], Any]) -> Row:
    """Return which laws hold, and how far losses deviate from those of one edit at a time.

    Args:
        base: a model; it is edited.
        inputs: of a forward.
        expected: the base's logits for it.
        build_again: returns the base anew.
    """
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    # in the middle: a published location may be the first of so few layers, and leave nothing to cache
    config = LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[LAW_LAYERS // 2])
    model = get_peft_model(base, config)
    held = {"a fresh adapter changes nothing": same_logits(model, inputs, expected)}
    edits, tokenizer = synthetic_edits(24), make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = train(model, tokenizer, edits, folder, batch_size=12, num_train_epochs=2)
        deviations = loss_deviations(trainer, model, edits, tokenizer)
        unmerged = logits_of(model, inputs)
        # or all that follows compares the base with itself
        held["training changes the logits"] = not torch.equal(unmerged, expected)
        model.merge_adapter()
        held["merged = unmerged"] = same_logits(model, inputs, unmerged)
        held["the CPU composes the same bits"] = composed_alike(model, before)
        model.unmerge_adapter()
        held["unmerged again = unmerged"] = same_logits(model, inputs, unmerged)
        model.save_pretrained(folder)
        del trainer
        base = model.unload()
        found = dict(base.named_parameters())
        held["unmerge restores every weight"] = set(found) == set(before) and all(
            torch.equal(found[name], weight) for name, weight in before.items()
        )
        held["the unloaded base has its logits"] = same_logits(base, inputs, expected)
        del base, model, found, before
        free_unused()
        reloaded = PeftModel.from_pretrained(build_again(), folder)
        held["reloaded = unmerged"] = same_logits(reloaded, inputs, unmerged)
        held["merged and unloaded = unmerged"] = same_logits(reloaded.merge_and_unload(), inputs, unmerged)
    held[f"losses within {LOSS_TOLERANCE:.0%}"] = deviations["ours"] <= LOSS_TOLERANCE
    return {"laws": held, "deviations": deviations}


def padded(edits: Sequence[Edit]) -> dict[str, torch.Tensor]:
    """Return edits of different lengths as the inputs of a forward, padded on the right."""
    encoded, tokenizer = encode_edits(edits, make_tokenizer()), make_tokenizer()
    rows = [encoded[index].input_ids for index in range(len(encoded))]
    tensors = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    return {name: tensor.to(the_device()) for name, tensor in tensors.items()}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of all tokens that are no padding, (tokens, V)."""
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    return logits


def same_logits(model: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> bool:
    return torch.equal(logits_of(model, inputs), expected)


def composed_alike(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether the CPU, which merges checkpoints on disk, gets the bits of the weights that are merged here."""
    alike = []
    layer: Any  # its base layer may be any module
    for name, layer in locft_layers(model):
        weight = before[f"{name}.weight"].cpu()
        delta = layer.locft_delta["default"].tensors()["weight"].detach().cpu()
        composed = compose_weight(weight, [(delta, layer.scaling["default"])])
        alike.append(torch.equal(layer.base_layer.weight.cpu(), composed))
    return bool(alike) and all(alike)


@torch.no_grad()
def loss_deviations(trainer: Any, model: Any, edits: Sequence[Edit], tokenizer: Any) -> dict[str, float]:
    """Return the largest relative deviation from the losses of one edit at a time: of the trainer, and of padding."""
    encoded, pad = encode_edits(edits, tokenizer), tokenizer.pad_token_id
    found: dict[str, float] = {"ours": 0.0, "padded": 0.0}
    for first in range(0, len(edits), 4):
        indices = range(first, min(first + 4, len(edits)))
        rows = [encoded[index] for index in indices]
        single = sum(plain_loss(model, [row], pad).item() for row in rows) / len(rows)
        ours = float(trainer.compute_loss(model, list(indices)))
        for name, loss in (("ours", ours), ("padded", plain_loss(model, rows, pad).item())):
            # below 1 nat the relative deviation of a bfloat16 says nothing
            deviation = abs(loss - single) / max(single, 1.0)
            found[name] = max(found[name], deviation if math.isfinite(deviation) else math.inf)
    return found


# ---------------------------------------------------------------------- training with a clock


class StepClock(TrainerCallback):
    """Times steps, and ends the training when the time is up."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps: list[float] = []
        self.began_at: float | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.began_at = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self._step_begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.steps.append(time.perf_counter() - self._step_begun)
        # the first one fills the cache
        if len(self.steps) >= FEWEST_STEPS and sum(self.steps[1:]) > self.seconds:
            control.should_training_stop = True


def train(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Edit],
    folder: str,
    *,
    batch_size: int,
    seconds: float = math.inf,
    **recipe: Any,
) -> tuple[BreadthFirstTrainer, StepClock]:
    """Train a PEFT model on the device; return the trainer and its clock."""
    fields: dict[str, Any] = {"learning_rate": LEARNING_RATE, "loss_floor": 0.0, "logging_strategy": "no"}
    args = BreadthFirstConfig(
        output_dir=folder, use_cpu=the_device() == "cpu", disable_tqdm=True, seed=SEED,
        per_device_train_batch_size=batch_size, **(fields | recipe),
    )  # fmt: skip
    clock = StepClock(seconds)
    trainer = BreadthFirstTrainer(
        model, args, train_dataset=list(edits), processing_class=tokenizer, callbacks=[clock]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer, clock


# ---------------------------------------------------------------------- speed and memory


def speed(model_name: str, toy: bool, variant: str, counts: Sequence[int], seconds_each: float) -> Iterator[Row]:
    """Train as many edits with the plain loop or with ours; at most so many seconds of steps for each number."""
    model, tokenizer = build(configuration(model_name, toy), the_device()), make_tokenizer()
    batch_size = 8 if toy else 100
    for count in counts:
        free_unused()
        before = peak_gib()
        steps_per_epoch = math.ceil(count / batch_size)
        epochs = max(2, math.ceil(FEWEST_STEPS / steps_per_epoch))
        measure = plain if variant == "plain" else ours
        found = measure(model, tokenizer, synthetic_edits(count), batch_size, epochs, seconds_each)
        steps = found.pop("steps")
        step = median(steps[1:])
        row = {"model": model_name, "variant": variant, "edits": count, "batch_size": batch_size}
        row |= {"epoch_seconds": step * steps_per_epoch, "step_seconds": steps}
        if variant == "ours":
            caching = max(steps[0] - step, 0.0)
            found |= {"caching_seconds": caching, "before_seconds": found["encoding_seconds"] + caching}
        if len(steps) - 1 < steps_per_epoch:
            row["note"] = f"an epoch is extrapolated from {len(steps) - 1} of {steps_per_epoch} steps"
        yield row | found | {"before_gib": before, "peak_gib": peak_gib()}


def ours(
    model: Any, tokenizer: Any, edits: Sequence[Edit], batch_size: int, epochs: int, seconds: float
) -> dict[str, Any]:
    """Train a delta at the default location with the BreadthFirstTrainer; the model is as before afterwards."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        edited = get_peft_model(model, LocFTConfig(task_type="CAUSAL_LM"))
        trainer, clock = train(
            edited, tokenizer, edits, folder, batch_size=batch_size, num_train_epochs=epochs, seconds=seconds
        )
        plan = trainer.runner.plan
        found = {
            "steps": clock.steps,
            "encoding_seconds": (clock.began_at or begun) - begun,
            "epoch_losses": whole_epochs(trainer.epoch_losses, len(clock.steps), math.ceil(len(edits) / batch_size)),
            # a run that the engine gave up on would be as slow as the plain loop, and the table should say so
            "packed": plan is not None and plan.packed,
            "cached": plan is not None and plan.states is not None,
        }
        edited.unload()
    return found


def plain(
    model: Any, tokenizer: Any, edits: Sequence[Edit], batch_size: int, epochs: int, seconds: float
) -> dict[str, Any]:
    """Train the same weight by the published loop: the whole model, padded batches, all logits."""
    weight = model.get_parameter(f"{default_location(model).target_modules[0]}.weight")
    original = weight.detach().to("cpu", copy=True)
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=LEARNING_RATE)
    encoded, batches = encode_edits(edits, tokenizer), EditBatches(len(edits), batch_size, SEED)
    losses: list[float] = []
    steps: list[float] = []
    for epoch in range(epochs):
        batches.epoch, total = epoch, 0.0
        for batch in batches:
            if len(steps) >= FEWEST_STEPS and sum(steps[1:]) > seconds:
                break
            synchronize()
            begun = time.perf_counter()
            loss = plain_loss(model, [encoded[index] for index in batch], tokenizer.pad_token_id)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
            del loss
            synchronize()
            steps.append(time.perf_counter() - begun)
        losses.append(total / len(edits))
    with torch.no_grad():
        weight.copy_(original)
    weight.grad = None
    return {"steps": steps, "epoch_losses": whole_epochs(losses, len(steps), len(batches))}


def whole_epochs(losses: Sequence[float], num_steps: int, steps_per_epoch: int) -> list[float]:
    """Return the losses without that of an epoch that was not finished."""
    return list(losses)[: num_steps // steps_per_epoch]


# ---------------------------------------------------------------------- a model larger than the device


def layerwise(toy: bool, host_gib: float | None, seconds: float) -> Iterator[Row]:
    """Train the 72B shape with its frozen layers on the CPU, as many as memory and time allow.

    First with three layers: what one frozen layer takes says how many there is time for. The tail is as large as with
    all 80 layers. What the frozen layers take is proportional to their number.
    """
    until = time.monotonic() + seconds
    # random numbers take a minute on a CPU
    model = build(configuration(QWEN_72B, toy, 1), the_device()).to("cpu")
    free_unused()
    layer_bytes = num_bytes(model.model.layers[0])
    host = psutil.virtual_memory().available if host_gib is None else host_gib * 2**30 - num_bytes(model)
    most = min(configuration(QWEN_72B, toy).num_hidden_layers, 1 + int(0.8 * host / layer_bytes))
    if most < 3:
        raise MemoryError(f"{host / 2**30:.0f} GiB of free CPU memory hold no three layers; see --host_gib")
    begun = time.monotonic()
    grow(model, 3)
    making = (time.monotonic() - begun) / 2
    edits = synthetic_edits(16 if toy else 1000)
    small = {"making the layers, s": 2 * making} | offloaded(model, 2, edits, 8 if toy else 100)
    yield small

    tail = fitting_tail(model, layer_bytes, min(1 if toy else TAIL_LAYERS, most - 2))
    # the tail goes to the device and back; and a margin for the epochs
    left = 0.8 * (until - time.monotonic()) - tail * (making + 2 * small["s/move of a layer"])
    num_frozen = min(most - tail, max(2, int(left / (making + small["caching, s/frozen layer"]))))
    begun = time.monotonic()
    grow(model, num_frozen + tail)
    row = {"making the layers, s": time.monotonic() - begun}
    yield row | offloaded(model, num_frozen, edits, 8 if toy else 100)


def offloaded(model: Any, num_frozen: int, edits: Sequence[Edit], batch_size: int) -> Row:
    """Train the first layer behind so many frozen ones, which stay on the CPU; return what it took."""
    config = LocFTConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], layers_to_transform=[num_frozen])
    free_unused()
    with LayerMoves(model.model.layers[:num_frozen]) as moves, tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        edited = get_peft_model(model, config)
        trainer, clock = train(
            edited, make_tokenizer(), edits, folder, batch_size=batch_size, num_train_epochs=2, seconds=8.0,
            offload_trunk=True, activation_cache="memory",
        )  # fmt: skip
        whole = time.perf_counter() - begun
    edited.unload()
    step = median(clock.steps[1:])
    caching, before = max(clock.steps[0] - step, 0.0), (clock.began_at or begun) - begun
    return {
        "layers on the CPU": num_frozen,
        "layers on the device": len(model.model.layers) - num_frozen,
        "GiB of weights": num_bytes(model) / 2**30,
        "edits": len(edits),
        "caching, s": caching,
        "caching, s/edit": caching / len(edits),
        "caching, s/frozen layer": caching / num_frozen,
        "caching, s, by proportion for 60": caching * 60 / num_frozen,
        "moves of a layer to the device or back": moves.count / num_frozen,
        "s/move of a layer": moves.seconds / max(moves.count, 1),
        "s/epoch": step * math.ceil(len(edits) / batch_size),
        "steps measured": len(clock.steps) - 1,
        "peak GiB on the device": peak_gib(),
        "encoding, and moving the tail to the device, s": before,
        "moving the tail back, s": whole - before - sum(clock.steps),
        "epoch losses": str([round(loss, 3) for loss in trainer.epoch_losses]),
    }


class LayerMoves:
    """Counts and times the calls of `layer.to` while it is entered: all that moves an offloaded layer."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.count = 0
        self.seconds = 0.0

    def __enter__(self) -> LayerMoves:
        for layer in self.layers:
            layer.to = partial(self._move, layer.to)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        for layer in self.layers:
            del layer.to

    def _move(self, move: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        synchronize()
        begun = time.perf_counter()
        moved = move(*args, **kwargs)
        synchronize()
        self.seconds += time.perf_counter() - begun
        self.count += 1
        return moved


def fitting_tail(model: Any, layer_bytes: int, most: int) -> int:
    """Return how many layers may be on the device: at most so many, and as three quarters of its memory hold."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        delta_bytes = 8 * model.model.layers[0].mlp.down_proj.weight.nbytes  # delta, gradient, two moments in float32
        others = num_bytes(model.get_input_embeddings()) + num_bytes(model.get_output_embeddings()) + delta_bytes
        most = min(most, int((0.75 * free - others) / layer_bytes) - 1)  # one of the frozen ones is there, too
    return max(1, most)


# ---------------------------------------------------------------------- evaluation


def evaluation(model_name: str, toy: bool, seconds_each: float) -> Iterator[Row]:
    """Answers of 32 tokens: `generate_and_score`, `evaluate_edits`, and `model.generate` one by one."""
    model, tokenizer = build(configuration(model_name, toy), the_device()), make_tokenizer()
    num_tokens = 4 if toy else 32
    edits = synthetic_edits(8 if toy else 512)
    prompts = [tuple(tokenizer(edit.prompt)["input_ids"]) for edit in edits]
    questions = [Question(prompt, max_new_tokens=num_tokens) for prompt in prompts]
    generate_and_score(model, tokenizer, questions[:4], progress=False)  # warms up
    free_unused()
    synchronize()
    begun = time.perf_counter()
    answers = generate_and_score(model, tokenizer, questions, progress=False)
    synchronize()
    yield timed("generate_and_score", len(questions), time.perf_counter() - begun)

    generate(model, prompts[0], num_tokens)
    free_unused()
    synchronize()
    begun, same, asked = time.perf_counter(), 0, 0
    while asked < len(prompts) and time.perf_counter() - begun < seconds_each:
        found = generate(model, prompts[asked], num_tokens)
        # an answer of ours may end earlier, at a full stop
        same += found[: len(answers[asked].token_ids)] == answers[asked].token_ids
        asked += 1
    synchronize()
    row = timed("model.generate, one by one", asked, time.perf_counter() - begun)
    yield row | {"answers as generate_and_score's": f"{same} of {asked}"}

    edited = get_peft_model(model, LocFTConfig(task_type="CAUSAL_LM"))
    args = EvaluationConfig(max_new_tokens=num_tokens, num_resamples=100)
    free_unused()
    begun = time.perf_counter()
    evaluate_edits(edited, tokenizer, edits, args, progress=False)
    synchronize()
    # of the base and of the edited model, generated and scored
    yield timed("evaluate_edits, two models", len(edits), time.perf_counter() - begun)


def timed(way: str, num_questions: int, seconds: float) -> Row:
    row: Row = {"way": way, "questions": num_questions, "s": seconds, "questions/s": num_questions / seconds}
    return row | {"peak GiB": peak_gib(), "answers as generate_and_score's": None}


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the greedy answer, by `model.generate` on one prompt."""
    input_ids = torch.tensor([prompt], device=the_device())
    generated = model.generate(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=num_tokens, do_sample=False
    )
    answer: list[int] = generated[0, len(prompt) :].tolist()
    return answer

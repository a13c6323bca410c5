"""Compare training, answers and merging of every decoder-only family with the model's own plain computation.

`python -m tests.sweep` prints a Markdown table and writes `sweep.json`; `--families llama,bloom` runs some, `--jobs 4`
several at a time. The plain computation runs one sequence at a time: whole, unpadded, without a cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))  # `python -m tests.sweep` starts in the folder above

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from plain import EDITS, PROMPTS, byte_tokenizer, plain_answer, plain_gradient, plain_logits, plain_losses, sees_ahead
from safetensors.torch import load_file
from tiny_checkpoints import stored
from tiny_families import VARIANTS, all_families, build
from tiny_models import base_state, randomize, same_bits
from torch import nn
from transformers import PrinterCallback

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EvaluationConfig,
    LocFTConfig,
    encode_edits,
    encode_prompts,
    evaluate_edits,
    export_weights,
    inspect_adapter,
    merge_checkpoint,
    save_adapter,
)
from peft_locft.engine import Continuation, Question, StopCounter, generate_and_score
from peft_locft.engine.checks import checks_of
from peft_locft.engine.decoding import find_way

Status = Literal["right", "wrong", "refused", "crash", "left out"]
NEW_TOKENS = 8
LOSS_BOUND, LOG_PROB_BOUND, GRADIENT_BOUND = 1e-4, 2e-4, 1e-3  # float32; relative to the plain value, if that is large
TIE = 1e-4  # logits closer than this may be decoded either way


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one comparison of one family says."""

    check: str
    status: Status
    deviation: float = 0.0
    detail: str = ""
    bound: float = 0.0


@dataclasses.dataclass
class Row:
    """What the sweep says about a family."""

    family: str
    verdict: str = ""
    engine: str = ""  # how "auto" trains
    decoder: str = ""  # how several prompts are answered
    location: str = ""
    findings: list[Finding] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def worst(self) -> Finding | None:
        """The finding that decides the verdict."""
        order: dict[Status, int] = {"wrong": 3, "crash": 2, "refused": 1, "right": 0, "left out": -1}
        return max(self.findings, key=lambda each: (order[each.status], each.deviation), default=None)


def sweep_family(family: str, checks: Sequence[str] = ()) -> Row:
    """Return the verdict of a family or variant; `checks` are names in `CHECKS`, and all of them by default."""
    row, start = Row(family), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = build(family)
            plain_logits(base, [5, 6, 7])
        except Exception as error:
            row.verdict = "not built"
            row.findings = [Finding("build", "left out", 0.0, _said(error))]
            return row
        ahead = sees_ahead(base)
        refusal = _tried("refusal", _refusal, family, row) if ahead != "no" else []
        if ahead == "yes" or (refusal and all(finding.status == "refused" for finding in refusal)):
            row.findings = refusal
        else:  # what sees ahead in part is right too if its numbers are those of whole single rows
            row.findings = [each for name in checks or CHECKS for each in _tried(name, CHECKS[name], family, row)]
    row.verdict = _verdict(row, ahead)
    row.seconds = time.perf_counter() - start
    return row


def _tried(name: str, check: Callable[[str, Row], Iterator[Finding]], family: str, row: Row) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(family, row))
    except Exception as error:
        found.append(_stopped(name, error))
    return found


def _stopped(name: str, error: Exception) -> Finding:
    """A ValueError that the package itself raises is a refusal; anything else is a crash."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_refusal = isinstance(error, ValueError) and "peft_locft" in raised_in.parts
    return Finding(name, "refused" if is_refusal else "crash", 0.0, _said(error))


def _said(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def _verdict(row: Row, ahead: str) -> str:
    losses = [finding.status for finding in row.findings if finding.check.startswith("losses")]
    if losses and set(losses) == {"refused"}:
        return "refused: sees ahead" if ahead != "no" else "refused: no gradient in evaluation mode"
    worst = row.worst
    if worst is not None and worst.status in ("wrong", "crash"):
        return worst.status.upper()
    refused = {finding.check for finding in row.findings if finding.status == "refused"}
    if refused - {"on disk"}:
        return "refused: sees ahead" if ahead != "no" else "refused"
    notes = ["sees ahead in part"] * (ahead == "in part") + ["no merge on disk"] * bool(refused)
    return ", ".join(filter(None, ("right", row.engine, *notes)))


def _compared(check: str, deviation: float, bound: float, detail: str = "") -> Finding:
    # not `deviation > bound`: NaN is wrong
    return Finding(check, "right" if deviation <= bound else "wrong", deviation, detail, bound)


# ---------------------------------------------------------------------- models that see ahead


def _refusal(family: str, row: Row) -> Iterator[Finding]:
    """The trainer and the evaluation refuse a model whose logits depend on later tokens."""
    tokenizer = byte_tokenizer()

    def trains() -> None:
        _train(_edited(build(family), row), learning_rate=0.0)

    def evaluates() -> None:
        config = EvaluationConfig(max_new_tokens=2, num_resamples=2)
        evaluate_edits(build(family), tokenizer, EDITS[:2], config, progress=False)

    for name, run in (("training", trains), ("evaluation", evaluates)):
        try:
            run()
        except Exception as error:
            yield _stopped(name, error)
        else:
            yield Finding(name, "wrong", 0.0, "the model sees ahead and was not refused")


# ---------------------------------------------------------------------- training


def _edited(base: nn.Module, row: Row) -> PeftModel:
    """Return the model with an adapter at the default location; if there is none, at some Linear of a late layer."""
    try:
        model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM"))
    except ValueError as error:
        row.location = f"none by default: {_said(error)}"
        names = [name for name, each in base.named_modules() if isinstance(each, nn.Linear)]
        model = get_peft_model(base, LocFTConfig(target_modules=[names[len(names) * 2 // 3]]))
        return model
    places = [name for name, each in model.named_parameters() if each.requires_grad]
    row.location = ", ".join(name.replace("base_model.model.", "").split(".locft_")[0] for name in places)
    config = model.peft_config["default"]
    if config.target_parameters:
        row.location = ", ".join(config.target_parameters)
    return model


def _train(model: nn.Module, cache: Any = "auto", max_tokens: int | None = None, **arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        args = BreadthFirstConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=100,
            loss_floor=0.0,
            disable_tqdm=True,
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            activation_cache=cache,
            max_tokens_per_micro_batch=max_tokens,
            **arguments,
        )
        trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=EDITS, processing_class=byte_tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def _losses(family: str, row: Row) -> Iterator[Finding]:
    """The loss before the first step is the mean of the plain losses, however little the engine runs."""
    model = _edited(build(family), row)
    encoded = encode_edits(EDITS, byte_tokenizer())
    plain = plain_losses(model, encoded)
    expected = sum(plain) / len(plain)
    bound = LOSS_BOUND * max(1.0, expected)
    longest = int(encoded.lengths.max())
    for name, cache, max_tokens in (("off", "off", None), ("auto", "auto", None), ("small", "auto", longest)):

        def run(
            family: str, row: Row, name: str = name, cache: str = cache, most: int | None = max_tokens
        ) -> Iterator[Finding]:
            trainer = _train(model, cache, most, learning_rate=0.0)
            if name == "auto":
                row.engine = _engine(trainer)
            found = trainer.epoch_losses[0]
            yield _compared(f"losses, {name}", abs(found - expected), bound, f"{found:.6f}, plain {expected:.6f}")

        yield from _tried(f"losses, {name}", run, family, row)


def _engine(trainer: Any) -> str:
    plan = trainer.runner.plan
    return f"{plan.layout}, {'no cache' if plan.states is None else 'cache'}"


def _losses_bf16(family: str, row: Row) -> Iterator[Finding]:
    """In bfloat16 a loss moves no more than rounding alone moves it."""
    encoded = encode_edits(EDITS, byte_tokenizer())
    model = _edited(build(family, torch.bfloat16), row)
    try:
        rounded = plain_losses(model, encoded)
    except RuntimeError as error:
        yield Finding("bfloat16", "left out", 0.0, f"the model itself does not run: {error}")
        return
    exact = plain_losses(_edited(build(family, torch.bfloat16).float(), row), encoded)
    noise = sum(abs(a - b) for a, b in zip(rounded, exact, strict=True)) / len(exact)
    expected = sum(rounded) / len(rounded)
    for cache in ("off", "auto"):
        loss = _train(model, cache, learning_rate=0.0).epoch_losses[0]
        yield _compared(f"losses in bfloat16, {cache}", abs(loss - expected), 3 * noise + 1e-3, f"noise {noise:.1e}")


def _gradient(family: str, row: Row) -> Iterator[Finding]:
    """A step of SGD at a rate of 1 moves the deltas by the gradient of the plain loop."""
    model = _edited(build(family), row)
    expected = plain_gradient(model, encode_edits(EDITS, byte_tokenizer()))
    before = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    _train(model, learning_rate=1.0, optim="sgd")
    after = dict(model.named_parameters())
    step = torch.cat([(before[name] - after[name].detach()).flatten() for name in before])
    plain = torch.cat([expected[name].flatten() for name in before])
    deviation = float((step - plain).norm() / plain.norm())
    yield _compared("gradient", deviation, GRADIENT_BOUND, f"norm {plain.norm():.2e}")


# ---------------------------------------------------------------------- answers


def _answers(family: str, row: Row) -> Iterator[Finding]:
    """Several prompts, and one alone, are answered and scored as one token at a time."""
    for name, prompts in (("answers", PROMPTS), ("answer to one prompt", PROMPTS[:1])):

        def run(family: str, row: Row, name: str = name, prompts: Sequence[str] = prompts) -> Iterator[Finding]:
            return _answers_to(name, build(family), prompts, row)

        yield from _tried(name, run, family, row)


def _answers_to(name: str, model: nn.Module, prompts: Sequence[str], row: Row) -> Iterator[Finding]:
    tokenizer = byte_tokenizer()
    encoded_prompts = encode_prompts(prompts, tokenizer)
    scored = [encode_edits([Edit(prompt=p, target=t) for t in ("Louis", "no")], tokenizer) for p in prompts]
    questions = [
        Question(
            tuple(prompt),
            tuple(Continuation(tuple(encoded[i].input_ids.tolist()), encoded[i].target_start) for i in range(2)),
            num_stops=0,
            max_new_tokens=NEW_TOKENS,
        )
        for prompt, encoded in zip(encoded_prompts, scored, strict=True)
    ]
    answers = generate_and_score(model, tokenizer, questions, progress=False)
    longest = max(map(len, encoded_prompts)) + NEW_TOKENS
    row.decoder = find_way(model, checks_of(model, torch.device("cpu"), longest), StopCounter(tokenizer), longest)
    different, deviation = 0, 0.0
    for prompt, question, answer in zip(encoded_prompts, questions, answers, strict=True):
        expected, margin = plain_answer(model, prompt, NEW_TOKENS)
        different += _differs(answer.token_ids, expected, margin)
        for continuation, score in zip(question.scored, answer.scores, strict=True):
            ids = torch.tensor(continuation.token_ids)
            log_probs = plain_logits(model, continuation.token_ids).log_softmax(dim=-1)[:-1].gather(1, ids[1:, None])
            found = torch.tensor(score.log_probs)
            deviation = max(deviation, float((found - log_probs[continuation.start - 1 :, 0]).abs().max()))
    yield _compared(name, float(different), 0.0, f"{different} of {len(prompts)} differ")
    yield _compared(f"{name}: log-probabilities", deviation, LOG_PROB_BOUND)


def _differs(found: list[int], expected: list[int], margins: list[float]) -> bool:
    for one, other, margin in zip(found, expected, margins, strict=True):
        if one != other:
            return margin > TIE
    return False


# ---------------------------------------------------------------------- merging


def _merging(family: str, row: Row) -> Iterator[Finding]:
    """Merged, unmerged, reloaded and merged on disk agree bit for bit."""
    base, plain = build(family), build(family)
    model = _edited(base, row)
    randomize(model)
    unmerged = plain_logits(model, range(3, 23))
    changed = not torch.equal(unmerged, plain_logits(plain, range(3, 23)))
    yield Finding("the edit changes the logits", "right" if changed else "wrong")
    model.merge_adapter()
    yield _bits("merged", {"logits": plain_logits(model, range(3, 23))}, {"logits": unmerged})
    model.unmerge_adapter()
    yield _bits("unmerged", base_state(model), dict(plain.state_dict()))
    yield from _tried("on disk", lambda *_: _on_disk(family, model, plain, unmerged), family, row)


def _on_disk(family: str, model: PeftModel, plain: nn.Module, unmerged: torch.Tensor) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plain.save_pretrained(folder / "base")  # type: ignore[operator]
        load = type(plain).from_pretrained  # type: ignore[attr-defined]
        loading = {"dtype": "auto", "attn_implementation": _attention(plain.config)}
        again = load(folder / "base", **loading).eval()
        if _bits("", again.state_dict(), plain.state_dict()).status == "wrong":
            yield Finding("on disk", "left out", 0.0, "transformers does not reload the weights that it saved")
            return
        save_adapter(model, folder / "adapter")
        reloaded = PeftModel.from_pretrained(again, folder / "adapter").eval()
        yield _bits("reloaded", {"logits": plain_logits(reloaded, range(3, 23))}, {"logits": unmerged})
        merge_checkpoint(folder / "base", [folder / "adapter"], folder / "merged")
        in_memory = reloaded.merge_and_unload()
        on_disk = load(folder / "merged", **loading).eval()
        yield _bits("merged on disk", dict(on_disk.state_dict()), dict(in_memory.state_dict()))
        yield from _tried("export", lambda *_: _exported(folder), family, Row(family))


def _attention(config: Any) -> dict[str, str]:
    """Return the attention of a model and of its parts, as `from_pretrained` takes it."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    named = {"": config} | {name: part for name, part in parts.items() if part is not None}
    return {name: part._attn_implementation for name, part in named.items()}


def _exported(folder: Path) -> Iterator[Finding]:
    try:
        export_weights(folder / "adapter", folder / "edited.safetensors", folder / "base")
        inspect_adapter(folder / "adapter", folder / "base")
    except Exception as error:  # what a merge can place, an export can
        yield Finding("export", "wrong", 0.0, _said(error))
        return
    before, after = stored(folder / "base"), stored(folder / "merged")
    names = [name for name in after if not same_bits(after[name], before[name])]
    yield _bits("export", load_file(folder / "edited.safetensors"), {name: after[name] for name in names})


def _bits(check: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Finding:
    if found.keys() != expected.keys():
        return Finding(check, "wrong", 1.0, f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}")
    names = [name for name in expected if not same_bits(found[name], expected[name])]
    largest = max(((found[name].float() - expected[name].float()).abs().max().item() for name in names), default=0.0)
    return Finding(check, "wrong" if names else "right", largest, ", ".join(names[:3]))


CHECKS: dict[str, Callable[[str, Row], Iterator[Finding]]] = {
    "losses": _losses,
    "bfloat16": _losses_bf16,
    "gradient": _gradient,
    "answers": _answers,
    "merging": _merging,
}


# ---------------------------------------------------------------------- table


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with the versions, a count of each verdict, and what was not built."""
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    built = [row for row in rows if row.verdict != "not built"]
    verdicts = Counter(row.verdict for row in built)
    lines = [f"{versions}: {len(built)} families and variants.", "", "| verdict | families |", "| --- | --- |"]
    lines += [f"| {verdict} | {count} |" for verdict, count in verdicts.most_common()]
    lines += ["", "| family | verdict | answers | largest deviation | default location |", *["| --- " * 5 + "|"]]
    for row in built:
        numbers = [each for each in row.findings if each.bound]
        largest = max(numbers, key=lambda each: each.deviation / each.bound, default=None)
        deviation = "" if largest is None else f"{largest.deviation:.1e} ({largest.check})"
        verdict = row.verdict
        if verdict in ("WRONG", "CRASH"):
            bad = [f"{each.check}: {each.detail}" for each in row.findings if each.status in ("wrong", "crash")]
            verdict += f" ({'; '.join(bad)[:400].replace('|', '/')})"
        lines.append(f"| {row.family} | {verdict} | {row.decoder} | {deviation} | {row.location} |")
    left_out = [f"{row.family} ({row.findings[0].detail[:80]})" for row in rows if row.verdict == "not built"]
    return "\n".join([*lines, "", f"Not built: {'; '.join(left_out) or 'none'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", help="comma-separated names; default: all families and variants")
    parser.add_argument("--checks", help=f"comma-separated, of {', '.join(CHECKS)}; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("sweep.json"), help="where to write the findings")
    arguments = parser.parse_args()
    families = arguments.families.split(",") if arguments.families else [*all_families(), *VARIANTS]
    checks = arguments.checks.split(",") if arguments.checks else []
    rows = []
    for row in _rows(families, checks, arguments.jobs):
        rows.append(row)
        print(f"{row.family}: {row.verdict}, {row.seconds:.1f} s", file=sys.stderr, flush=True)
        arguments.output.write_text(json.dumps([dataclasses.asdict(each) for each in rows], indent=1))
    print(table(rows))


def _rows(families: Sequence[str], checks: Sequence[str], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        _quiet()
        for family in families:
            yield sweep_family(family, checks)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        yield from pool.map(sweep_family, families, [checks] * len(families))


def _quiet() -> None:
    gc.freeze()  # every training collects garbage, which takes half a second while all imported modules are looked at
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()

"""Perplexity and KL on a text, against plain loops over full logits."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import base_state, build, changed, every_dtype, logits, randomize, token_ids
from tiny_training import base_model, peft_model
from tokenizers_for_tests import SENTENCES, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from peft_locft.data.texts import text_windows
from peft_locft.evaluation import perplexity as general_ability
from peft_locft.evaluation.perplexity import LARGEST_LOSS, TextMeasurement, measure_text

TOKENIZER = make_tokenizer("llama2")
IDS = TOKENIZER("\n\n".join(SENTENCES))["input_ids"]
WINDOWS = token_ids(batch_size=5, length=17)


def edited_model(**arguments: Any) -> PeftModel:
    model = peft_model(**arguments)
    randomize(model)
    return model


def measure(model: PeftModel, windows: torch.Tensor = WINDOWS) -> TextMeasurement:
    return measure_text(model, windows, model, model.disable_adapter)


def log_probs_of(model: Any) -> torch.Tensor:
    """Return log p of all next tokens, (windows, window - 1, V), from each window by itself."""
    return torch.cat([logits(model, window[None]) for window in WINDOWS])[:, :-1].float().log_softmax(dim=-1)


def plain_losses(model: Any) -> list[float]:
    losses = []
    for window, log_probs in zip(WINDOWS.tolist(), log_probs_of(model), strict=True):
        losses.append(-sum(float(row[token]) for row, token in zip(log_probs, window[1:], strict=True)) / 16)
    return losses


# ---------------------------------------------------------------------- what is measured


@every_dtype
def test_losses_and_divergences_are_those_of_full_logits(dtype: torch.dtype) -> None:
    model = edited_model(dtype=dtype)
    found = measure(model)
    after = log_probs_of(model)
    assert found.losses[:, 0] == pytest.approx(plain_losses(model), rel=1e-5)
    with model.disable_adapter():
        before = log_probs_of(model)
        assert found.losses[:, 1] == pytest.approx(plain_losses(model), rel=1e-5)
    divergences = [
        float(torch.nn.functional.kl_div(edited, base, reduction="batchmean", log_target=True))
        for edited, base in zip(after.double(), before.double(), strict=True)
    ]
    assert found.divergences is not None
    assert found.divergences == pytest.approx(divergences, rel=1e-4)
    assert found.divergences == pytest.approx((before.exp() * (before - after)).sum(dim=-1).mean(dim=-1), rel=1e-3)


@pytest.mark.parametrize("cells", [1, 3 * 512, 10**9])
def test_how_many_logits_are_compared_at_a_time_changes_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited_model()
    expected = measure(model)
    monkeypatch.setattr(general_ability, "MAX_LOGITS", cells)
    found = measure(model)
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.divergences == pytest.approx(expected.divergences, rel=1e-5)


@every_dtype
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    found = measure(peft_model(dtype=dtype))
    assert found.losses[:, 0].tolist() == found.losses[:, 1].tolist()
    assert found.divergences is not None
    assert found.divergences.tolist() == [0.0] * 5
    results = found.metric_results(100, 0.95, 0)
    assert results["perplexity"].after == results["perplexity"].before
    assert tuple(results["perplexity"].change or ()) == tuple(results["kl_from_base"].after) == (0.0, 0.0, 0.0)


def test_a_base_model_stands_for_a_disabled_adapter() -> None:
    expected = measure(edited_model())
    merged = edited_model().merge_and_unload()
    found = measure_text(merged, WINDOWS, base_model(), nullcontext)
    assert found.losses.tolist() == expected.losses.tolist()
    assert found.divergences is not None and expected.divergences is not None
    assert found.divergences.tolist() == expected.divergences.tolist()


def test_the_base_reads_a_text_once_for_several_models() -> None:
    reads, kept = 0, list[torch.Tensor]()
    one, other = edited_model(), edited_model(sharp=True)
    expected = [measure(model) for model in (one, one, other)]

    def count(*_: Any) -> None:
        nonlocal reads
        reads += 1

    one.get_base_model().lm_head.register_forward_hook(count)
    for whole, base_reads in zip(expected[:2], (5, 0), strict=True):
        reads = 0
        found = measure_text(one, WINDOWS, one, one.disable_adapter, base_logits=kept)
        assert reads == 5 + base_reads and len(kept) == 5
        assert found.losses.tolist() == whole.losses.tolist()
        assert found.divergences is not None and whole.divergences is not None
        assert found.divergences.tolist() == whole.divergences.tolist()
    # what is kept is what another model is compared with
    beside = measure_text(other, WINDOWS, other, other.disable_adapter, base_logits=kept)
    assert beside.losses[:, 1].tolist() == expected[0].losses[:, 1].tolist()
    assert beside.losses[:, 0].tolist() == expected[2].losses[:, 0].tolist()


def test_without_a_base_there_is_no_before() -> None:
    model = base_model()
    found = measure_text(model, WINDOWS)
    assert found.losses == pytest.approx(np.array([plain_losses(model)]).T, rel=1e-5)
    assert found.divergences is None
    results = found.metric_results(100, 0.95, 0)
    assert list(results) == ["perplexity"]
    assert (results["perplexity"].before, results["perplexity"].change) == (None, None)


def test_perplexity_is_over_all_windows_and_its_change_is_paired() -> None:
    losses = np.array([[1.0, 2.0], [3.0, 3.0], [2.0, 2.0], [2.0, 1.0]])
    results = TextMeasurement(losses, np.array([0.1, 0.2, 0.3, 0.4])).metric_results(500, 0.9, 3)
    perplexity = results["perplexity"]
    assert perplexity.before is not None and perplexity.change is not None
    assert (perplexity.after.value, perplexity.before.value) == pytest.approx((math.exp(2.0), math.exp(2.0)))
    assert perplexity.change.value == 0.0
    assert perplexity.change.low < 0.0 < perplexity.change.high
    assert perplexity.after.low < math.exp(2.0) < perplexity.after.high
    assert results["kl_from_base"].after.value == pytest.approx(0.25)
    assert (results["kl_from_base"].before, perplexity.count, perplexity.unit) == (None, 4, "windows")


def test_a_loss_beyond_what_exp_holds_is_a_large_perplexity() -> None:
    results = TextMeasurement(np.array([[5000.0, 2.0]] * 3), np.zeros(3)).metric_results(10, 0.95, 0)
    assert results["perplexity"].after.value == math.exp(LARGEST_LOSS)
    assert results["perplexity"].change is not None
    assert math.isfinite(results["perplexity"].change.high)


def test_nothing_of_the_callers_changes() -> None:
    model = edited_model().train()
    model.get_base_model().config.use_cache = True
    before, modes = base_state(model), [module.training for module in model.modules()]
    measure(model)
    assert changed(base_state(model), before) == set()
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_has_no_perplexity(value: float) -> None:
    model = edited_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = value
    with pytest.raises(FloatingPointError, match=r"logits on the text are NaN or infinite.*Load the model in float32"):
        measure(model)
    delta = edited_model()
    next(parameter for parameter in delta.parameters() if parameter.requires_grad).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="and the adapter's are finite"):
        measure(delta)


class LargeTensors(TorchDispatchMode):
    """Notes the elements of each tensor with more of them than `MAX_LOGITS` that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        is_large = isinstance(result, torch.Tensor) and result.numel() > general_ability.MAX_LOGITS
        if is_large and result.untyped_storage().data_ptr() not in given:
            self.found.append(result.numel())
        return result


def test_no_copy_of_the_logits_is_made() -> None:
    model = edited_model(vocab_size=2**18, dtype=torch.bfloat16)
    windows = token_ids(batch_size=2, length=9)
    with LargeTensors() as large:
        measure(model, windows)
    # two windows, each read by the edited model and its base
    assert large.found == [9 * 2**18] * 4


# ---------------------------------------------------------------------- which text


@pytest.mark.parametrize("window", [2, 7, 30])
def test_windows_do_not_overlap_and_leave_out_the_rest(window: int) -> None:
    windows = text_windows(SENTENCES, TOKENIZER, window, 10**6)
    assert windows.shape == (len(IDS) // window, window)
    assert windows.flatten().tolist() == IDS[: windows.numel()]


@pytest.mark.parametrize(("max_tokens", "count"), [(20, 2), (29, 2), (30, 3)])
def test_no_more_than_so_many_tokens_are_read(max_tokens: int, count: int) -> None:
    windows = text_windows(SENTENCES * 50, TOKENIZER, 10, max_tokens)
    assert windows.flatten().tolist() == IDS[: 10 * count]


def test_every_kind_of_text_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(SENTENCES), encoding="utf-8")
    dataset = datasets.Dataset.from_dict({"text": SENTENCES, "other": SENTENCES})
    loaded = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        loaded.append((name, split))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for text in (path, str(path), SENTENCES, tuple(SENTENCES), dataset, "owner/name"):
        assert text_windows(text, TOKENIZER, 10, 1000).flatten().tolist() == IDS[: len(IDS) // 10 * 10]
    assert loaded == [("owner/name", "test")]


def test_mistakes_in_a_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "no_utf_8").write_bytes(b"w\x81rter")
    mistakes: list[tuple[Any, str]] = [
        (tmp_path / "no_utf_8", r"no_utf_8:1: found byte 0x81 at offset 1; expected UTF-8"),
        (tmp_path / "nowhere.txt", "text: found neither a file nor a dataset on the Hub named .*nowhere.txt"),
        ("one text " * 100, "named 'one text .*To pass a text itself, put it into a list"),
        (datasets.Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}), "columns prompt, answer; expected one named"),
        (datasets.Dataset.from_dict({"text": ["a", None]}), r"text\[1\]: found NoneType; expected a string"),
        ([], r"text: found 1 tokens; expected at least a window of 10: give more text"),
        (["In the city"], r"text: found \d tokens; expected at least a window of 10: give more text"),
    ]
    for text, message in mistakes:
        with pytest.raises(ValueError, match=message):
            text_windows(text, TOKENIZER, 10, 100)


@pytest.mark.parametrize("window", [1, 101])
def test_a_window_has_a_size(window: int) -> None:
    with pytest.raises(ValueError, match=f"found a window of {window} tokens; expected 2 to max_tokens=100"):
        text_windows(SENTENCES, TOKENIZER, window, 100)


def test_a_text_that_the_model_cannot_read_is_named() -> None:
    with pytest.raises(ValueError, match="found a window of 65 tokens; the model has only 64 positions"):
        text_windows(SENTENCES, TOKENIZER, 65, 100, base_model())
    with pytest.raises(ValueError, match="do not belong together"):
        text_windows(SENTENCES, TOKENIZER, 10, 100, build("llama"))
    assert text_windows(SENTENCES, TOKENIZER, 64, 100, base_model()).shape == (1, 64)

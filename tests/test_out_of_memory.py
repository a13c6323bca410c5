"""Where memory runs out, the same step is taken in smaller pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import EDITS, make_trainer, peft_model, trained

from peft_locft import LocFTConfig
from peft_locft.training.row_losses import BaseDistributions

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


def small_memory(max_rows: int, *, in_backward: bool, message: str = OUT_OF_MEMORY) -> Any:
    """Return a model whose last layer has no room for more than `max_rows` tokens, in training."""
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1, 2]))

    def check(module: Any, args: Any, output: torch.Tensor) -> None:
        if output.shape[:-1].numel() > max_rows and torch.is_grad_enabled():
            if not in_backward:
                raise RuntimeError(message)
            if output.requires_grad:
                output.register_hook(fail)

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError(message)

    # between the two that are trained: one of them has its gradient when the other's backward fails
    model.get_base_model().model.layers[2].input_layernorm.register_forward_hook(check)
    return model


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_is_taken_again_in_smaller_pieces(
    in_backward: bool, accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "max_tokens_per_micro_batch": 200,
    }
    enough = make_trainer(tmp_path, small_memory(10**6, in_backward=in_backward), **arguments)
    enough.train()
    little = make_trainer(tmp_path, small_memory(20, in_backward=in_backward), **arguments)
    little.train()
    assert little.epoch_losses == pytest.approx(enough.epoch_losses, rel=1e-6)
    for name, tensor in trained(enough.model).items():
        torch.testing.assert_close(trained(little.model)[name], tensor, rtol=1e-4, atol=1e-5)
    said = [record.message for record in caplog.records if "Out of memory" in record.message]
    assert said and said[-1].endswith(f"max_tokens_per_micro_batch is {little.runner.max_tokens} from here on.")
    assert little.runner.max_tokens < 200


def test_so_is_the_base_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [replace(edit, subject=edit.prompt.split()[-1]) for edit in EDITS]
    fields = {"retained_subjects": 2, "retained_answer_tokens": 1, "max_tokens_per_micro_batch": 200}
    enough, little = (make_trainer(tmp_path, peft_model(), facts, **fields) for _ in range(2))
    enough.train()
    store = BaseDistributions.store

    def small_memory_for_logits(self: BaseDistributions, rows: torch.Tensor, logits: torch.Tensor) -> None:
        if len(rows) > 4:
            raise RuntimeError(OUT_OF_MEMORY)
        store(self, rows, logits)

    monkeypatch.setattr(BaseDistributions, "store", small_memory_for_logits)
    little.train()
    assert little.runner.max_tokens < 200
    assert enough.loss_history.retained_losses[-1] > 0
    assert little.loss_history.retained_losses == pytest.approx(enough.loss_history.retained_losses, rel=1e-3)


def test_one_edit_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, small_memory(2, in_backward=True)).train()


def test_another_error_is_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="something else"):
        make_trainer(tmp_path, small_memory(20, in_backward=True, message="something else")).train()

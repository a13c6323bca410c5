"""lm-evaluation-harness on a model and its base, against what the models say when asked directly."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import assert_same_tensors, randomize
from tiny_training import base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import LocFTConfig
from peft_locft.evaluation.harness import evaluate_on_tasks
from peft_locft.evaluation.task_results import TaskResults, TaskRow

TOKENIZER = make_tokenizer("llama2")
QUESTIONS = ["The capital of France is", "The river runs through", "Who is the king of Spain?", "They play"]
QUESTIONS += ["What sport does Dave play?", "The city is in", "The capital of Spain is", "In the city, they"]
CHOICES = ["Spain", "France", "Dave", "city", "in the country"]
ANSWERS = [3, 3, 1, 0, 2, 1, 3, 4]
DOCUMENTS = [{"question": q, "choices": CHOICES, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
MAX_NEW_TOKENS = 5

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (the extra `eval`)"
)

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSES = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
SAYS = f"""
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: {MAX_NEW_TOKENS}, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: everything
task: [facts]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""


def edited_model(**arguments: Any) -> PeftModel:
    model = peft_model(sharp=True, **arguments)
    randomize(model, std=0.5)
    return model


def write_task(folder: Path, name: str, kind: str, documents: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + kind)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tasks. Of what is to be said, the base says the first five, the edited model the others."""
    folder = tmp_path_factory.mktemp("tasks")
    before, after = answers()
    targets = [*before[:5], *after[5:]]
    said = [{"question": question, "answer": target} for question, target in zip(QUESTIONS, targets, strict=True)]
    write_task(folder, "facts", CHOOSES, DOCUMENTS)
    write_task(folder, "says", SAYS, said)
    (folder / "everything.yaml").write_text(GROUP)
    return folder


@pytest.fixture(autouse=True)
def no_description_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run would take a second for one, which nothing here reads."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the harness' own tasks out: it takes ten seconds to find them."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


def run(model: Any, folder: Path, tasks: Any = "facts", **arguments: Any) -> TaskResults:
    return evaluate_on_tasks(model, TOKENIZER, tasks, include_path=folder, **arguments)


def figures(results: TaskResults) -> dict[str, TaskRow]:
    return {row.metric: row for row in results.rows}


def log_likelihood(model: Any, question: str, choice: str) -> float:
    begin = len(TOKENIZER(question)["input_ids"])
    ids = torch.tensor([TOKENIZER(f"{question} {choice}")["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(dim=-1)
    return float(sum(log_probs[at - 1, ids[0, at]] for at in range(begin, ids.shape[1])))


def chosen(model: Any, *, by_length: bool) -> list[bool]:
    """Return which documents are answered rightly, each choice scored by itself."""
    right = []
    for question, rightly in zip(QUESTIONS, ANSWERS, strict=True):
        scores = [log_likelihood(model, question, choice) for choice in CHOICES]
        if by_length:
            scores = [score / len(choice) for score, choice in zip(scores, CHOICES, strict=True)]
        right.append(int(np.argmax(scores)) == rightly)
    return right


def answer(model: Any, question: str) -> str:
    ids = torch.tensor([TOKENIZER(question)["input_ids"]])
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    text: str = TOKENIZER.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    return text.split(".")[0]


def answers() -> tuple[list[str], list[str]]:
    model = edited_model()
    with model.disable_adapter():
        before = [answer(model, question) for question in QUESTIONS]
    return before, [answer(model, question) for question in QUESTIONS]


def test_choices_are_those_of_the_log_likelihoods(tasks: Path) -> None:
    model = edited_model()
    found = figures(run(model, tasks))
    for metric, by_length in (("acc", False), ("acc_norm", True)):
        row = found[metric]
        after = chosen(model, by_length=by_length)
        with model.disable_adapter():
            before = chosen(model, by_length=by_length)
        assert (row.before, row.after) == (np.mean(before), np.mean(after))
        assert row.before_stderr == pytest.approx(np.std(before, ddof=1) / math.sqrt(8))
        assert row.after_stderr == pytest.approx(np.std(after, ddof=1) / math.sqrt(8))
        assert row.change == np.mean(after) - np.mean(before)
        differences = np.array(after, dtype=float) - np.array(before, dtype=float)
        assert row.change_stderr == pytest.approx(np.std(differences, ddof=1) / math.sqrt(8))
        assert (row.task, row.filter, row.count, row.num_fewshot) == ("facts", "none", 8, 0)
    assert all(row.before != row.after for row in found.values())


def test_answers_are_those_of_generate(tasks: Path) -> None:
    row = figures(run(edited_model(), tasks, ["says"]))["exact_match"]
    same = sum(before == after for before, after in zip(*answers(), strict=True))
    assert same < 2
    assert row.before in [(5 + also) / 8 for also in range(same + 1)]
    assert row.after in [(3 + also) / 8 for also in range(same + 1)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(batch_size: int, tasks: Path) -> None:
    expected = run(edited_model(), tasks, ["facts", "says"])
    assert run(edited_model(), tasks, ["facts", "says"], batch_size=batch_size).rows == expected.rows


def test_before_is_what_the_base_itself_gives(tasks: Path) -> None:
    alone = run(base_model(sharp=True), tasks, ["facts", "says"]).rows
    beside = run(edited_model(), tasks, ["facts", "says"]).rows
    assert [row.after for row in alone] == [row.before for row in beside]
    assert [row.after_stderr for row in alone] == [row.before_stderr for row in beside]
    assert {row.before for row in alone} == {None}


def test_a_merged_model_beside_its_base_gives_the_same(tasks: Path) -> None:
    beside = run(edited_model(), tasks, ["facts", "says"]).rows
    merged = edited_model().merge_and_unload()
    assert run(merged, tasks, ["facts", "says"], base_model=base_model(sharp=True)).rows == beside


def test_the_harness_gives_the_same_of_the_saved_adapter(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # it cuts the model's vocabulary to the tokenizer's
    vocab_size = len(TOKENIZER)
    model = edited_model(vocab_size=vocab_size)
    model.save_pretrained(tmp_path / "adapter")
    base_model(sharp=True, vocab_size=vocab_size).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    own = HFLM(pretrained=str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu")
    manager = TaskManager(include_path=tasks, include_defaults=False)
    expected = simple_evaluate(own, tasks=["facts", "says"], task_manager=manager)["results"]
    for row in run(model, tasks, ["facts", "says"], batch_size=1).rows:
        assert row.after == expected[row.task][f"{row.metric},none"]
        assert row.after_stderr == expected[row.task][f"{row.metric}_stderr,none"]


def test_nothing_of_the_callers_changes(tasks: Path) -> None:
    model, tokenizer = edited_model(), make_tokenizer("llama2")
    tokenizer.pad_token = None
    model.train()
    for module in (model, model.get_base_model()):
        module.generation_config.temperature = 0.7
    random.seed(3), np.random.seed(3), torch.manual_seed(3)

    def state() -> list[Any]:
        configurations = [model.config.to_dict(), model.generation_config.to_dict(), model.peft_config["default"]]
        modes = [(name, module.training) for name, module in model.named_modules()]
        randoms = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]
        special = [tokenizer.pad_token, len(tokenizer), tokenizer.padding_side, tokenizer.special_tokens_map]
        return [configurations, modes, randoms, special, model.active_adapters]

    before, tensors = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_on_tasks(model, tokenizer, ["facts", "says"], include_path=tasks)
    assert state() == before
    assert_same_tensors(dict(model.state_dict()), tensors)


def test_limit_and_fewshot_and_options_reach_the_harness(tasks: Path) -> None:
    results = run(edited_model(), tasks, limit=3, num_fewshot=1, bootstrap_iters=0)
    row = figures(results)["acc"]
    assert (row.count, row.num_fewshot, row.before_stderr, row.after_stderr) == (3, 1, None, None)
    assert row.change_stderr is not None
    assert figures(run(edited_model(), tasks, limit=0.5))["acc"].count == 4
    settings = results.settings
    assert (settings["limit"], settings["num_fewshot"], settings["tasks"]) == (3, 1, ["facts"])
    assert (settings["adapters"], settings["options"]) == (["default"], {"bootstrap_iters": 0})
    assert {"lm-eval", "peft-locft"} <= settings["versions"].keys()
    json.dumps(results.to_dict(), allow_nan=False)


@pytest.mark.usefixtures("small_index")
def test_groups_and_patterns_are_tasks_too(tasks: Path) -> None:
    group = run(edited_model(), tasks, "everything").rows
    facts = {row.metric: row for row in group if row.task == "facts"}
    whole = next(row for row in group if row.task == "everything")
    assert (whole.metric, whole.before, whole.after) == ("acc", facts["acc"].before, facts["acc"].after)
    assert whole.change_stderr is None
    assert {row.task for row in run(edited_model(), tasks, ["[fs]a*s", "facts"]).rows} == {"facts", "says"}


@pytest.mark.parametrize("task", ["facts", "says"])
def test_nan_is_no_answer(task: str, tasks: Path) -> None:
    model = edited_model().train()
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"logits on a task are NaN or infinite.*Load the model in float32"):
        run(model, tasks, task)
    assert model.training
    assert not any(layer.disable_adapters for layer in model.modules() if hasattr(layer, "locft_delta"))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no tasks": ({"tasks": []}, "tasks: found none; expected at least one name"),
    "unknown": ({"tasks": ["facts", "fact"]}, r"'fact' is not one of .*, nor in .*: did you mean facts\?.*valid YAML"),
    "nothing like it": ({"tasks": "zzzzzzz"}, "'zzzzzzz' is not one of .*: `lm-eval ls tasks` lists them"),
    "no match": ({"tasks": "zz*"}, r"'zz\*' is not one of"),
    "limit": ({"limit": 0}, "limit=0: expected a number of documents, or a share"),
    "num_fewshot": ({"num_fewshot": -1}, "num_fewshot=-1: expected 0 or more"),
    "batch_size": ({"batch_size": 0}, "batch_size=0: expected a number of prompts"),
    "batch_size, a word": ({"batch_size": "all"}, "batch_size='all': expected .*'auto'"),
    "include_path": ({"include_path": "nowhere"}, "include_path='nowhere': expected a folder of task files"),
}


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_any_work(name: str, tasks: Path) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        evaluate_on_tasks(object(), TOKENIZER, **({"tasks": "facts", "include_path": tasks} | arguments))  # type: ignore[arg-type]


def test_it_is_for_one_process(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"LOCAL_RANK=1: .*without torchrun"):
        run(edited_model(), tasks)


def test_an_adapter_on_another_base_is_refused(tasks: Path, tmp_path: Path) -> None:
    edited_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained on another base"):
        model = PeftModel.from_pretrained(base_model(sharp=True, seed=1), tmp_path)
    with pytest.raises(ValueError, match="The adapter was trained on another base"):
        run(model, tasks)
    assert len(run(model, tasks, allow_other_base=True).rows) == 2


def test_a_tokenizer_of_another_model_is_named(tasks: Path) -> None:
    model = get_peft_model(base_model(vocab_size=100), LocFTConfig())
    for task in ("facts", "says"):
        with pytest.raises(ValueError, match="do not belong together"):
            run(model, tasks, task)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-locft\[eval\]'"):
        evaluate_on_tasks(peft_model(), TOKENIZER, "facts")

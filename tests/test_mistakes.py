"""Thirty mistakes that people make, over the whole tool: each is named in words, before any work, and ends with 2."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_training import EDITS, base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EvaluationConfig,
    EvaluationReport,
    LocFTConfig,
    evaluate_edits,
    read_edits,
    save_adapter,
    train_edits,
)
from peft_locft.cli.commands import main

TRAIN = ["train", "--output_dir", "out", "--use_cpu", "--disable_tqdm", "True"]
TOKENIZER = make_tokenizer("llama2")
FACT = json.dumps({"prompt": EDITS[0].prompt, "target": EDITS[0].target})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, another one, an adapter of the first, and edits."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, hidden_size in (("model", 32), ("other", 64)):
        base_model(hidden_size=hidden_size).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    save_adapter(peft_model(), folder / "adapter")
    (folder / "edits.jsonl").write_text(FACT)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def train(model: str = "model", edits: str = "edits.jsonl", *more: str) -> list[str]:
    return [*TRAIN, "--model_name_or_path", model, "--edits", edits, *more]


# words after `locft`, files that they need, and what is said
CALLS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "misspelt model folder": (train("./modle"), {}, "modle: found no such folder; .*Did you mean model\\?"),
    "no such model": (train("nobody/nothing"), {}, "nobody/nothing: the base model and its tokenizer can"),
    "adapter as the model": (train("adapter"), {}, "adapter: found an adapter; expected the folder .*whole model"),
    "edits as the model": (train("edits.jsonl"), {}, "edits.jsonl: found a file; .*model and the edits swapped"),
    "model as the edits": (train("model", "model"), {}, "model: found the folder of a model; .*swapped"),
    "adapter as the edits": (train("model", "adapter"), {}, "adapter: found the folder of an adapter; .*trained on"),
    "misspelt edits": (train("model", "edit.jsonl"), {}, "edit.jsonl: found no such file; .*Did you mean edits.jsonl"),
    "empty file": (train("model", "a.csv"), {"a.csv": ""}, "a.csv.*: found no records; .*\\n  prompt,target\\n"),
    "header only": (train("model", "a.csv"), {"a.csv": "prompt,target\n"}, "a.csv.*: found no records"),
    "no header": (train("model", "a.csv"), {"a.csv": "The city is,Oslo\n"}, "columns The city is, Oslo; .*missing\\?"),
    "Excel": (train("model", "a.xlsx"), {"a.xlsx": "PK"}, "found '.xlsx'; .*save the sheet as \"CSV UTF-8\""),
    "target missing": (train("model", "a.csv"), {"a.csv": "prompt,target\na,b\nc,"}, "a.csv:3: field 'target': found"),
    "number as prompt": (train("model", "a.json"), {"a.json": '[{"prompt": 7, "target": "a"}]'}, 'write "7" with'),
    "a layer beyond": (
        train("model", "edits.jsonl", "--layers_to_transform", "99"),
        {},
        "^locft train: layers_to_transform=\\[99\\]: the model has 3 decoder layers",
    ),
    "no such module": (
        train("model", "edits.jsonl", "--target_modules", "mlp.dwn_proj"),
        {},
        "{'mlp.dwn_proj'} not found in the base model.* A decoder layer of this model has .*up_proj, down_proj",
    ),
    "negative rate": (
        train("model", "edits.jsonl", "--learning_rate", "-1"),
        {},
        "learning_rate=-1.0: expected a number, 0 or more",
    ),
    "batches of nothing": (
        train("model", "edits.jsonl", "--per_device_train_batch_size", "0"),
        {},
        "per_device_train_batch_size=0: expected a number above 0",
    ),
    "no epochs": (train("model", "edits.jsonl", "--num_train_epochs", "0"), {}, "num_train_epochs=0.0: expected"),
    "evaluation of nothing": (["evaluate", "--edits", "edits.jsonl"], {}, "Found neither a model nor an adapter"),
    "model as the adapter": (
        ["evaluate", "--edits", "edits.jsonl", "--adapter", "model"],
        {},
        "model: found a model; expected the folder of an adapter. Give a model as model_name_or_path",
    ),
    "no such adapter": (
        ["evaluate", "--edits", "edits.jsonl", "--adapter", "nowhere"],
        {},
        "nowhere: found no adapter .*; expected a folder that `locft train` wrote, or a name on the Hub",
    ),
    "another base": (
        ["evaluate", "--edits", "edits.jsonl", "--adapter", "adapter", "--model_name_or_path", "other"],
        {},
        "adapter: the adapter does not fit the base model other: size mismatch .*Pass the base that it was trained on",
    ),
    "merge the wrong way round": (
        ["merge", "adapter", "model", "merged"],
        {},
        "adapter is an adapter: expected a model. The base comes first",
    ),
    "merge into what is there": (["merge", "model", "adapter", "other"], {}, "other already exists: a merge writes"),
    "detach without a merge": (["detach", "model"], {}, "nothing is merged in place there"),
    "inspect a model": (["inspect", "model"], {}, "model is not an adapter folder"),
    "no such method": (
        ["baselines", *train()[1:], "--methods", "LORA"],
        {},
        "methods: found LORA; expected some of FT-L, FT-M, LocFT, LoRA",
    ),
    "no such kind of module": (
        ["locate", *train()[1:], "--modules", "middle"],
        {},
        "modules: found 'middle', .*Expected one of down, up, attention",
    ),
}  # fmt: skip


def said_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code: Any = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    return re.sub("\r.*\n", "", printed.err)  # without the progress of loading the model


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_a_mistake_says_what_is_wrong(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, files, message = CALLS[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for file, content in files.items():
        (folder / file).write_text(content)
    before = {path for path in folder.rglob("*")}
    said = said_of(argv, capsys)
    assert re.search(message, said, re.DOTALL), said
    assert said.startswith(f"locft {argv[0]}: ") and "Traceback" not in said and len(said) < 800
    for file in files:
        (folder / file).unlink()
    assert not {path for path in folder.rglob("*")} - before - {folder / "out"}, "nothing is written"


def recipe() -> BreadthFirstConfig:
    return BreadthFirstConfig(output_dir="out", use_cpu=True)


def without_eos() -> Any:
    tokenizer = make_tokenizer("llama2")
    tokenizer.eos_token = None
    return tokenizer


def trainer(*arguments: Any) -> Any:
    return BreadthFirstTrainer(*arguments)


anything: dict[str, Any] = {
    "read": read_edits, "evaluate": evaluate_edits, "train": train_edits, "save": save_adapter, "Edit": Edit,
    "EvaluationConfig": EvaluationConfig,
}  # fmt: skip

IN_PYTHON: dict[str, tuple[Callable[[], object], str]] = {
    "model and tokenizer swapped": (
        lambda: trainer(TOKENIZER, recipe(), EDITS, peft_model()),
        "BreadthFirstTrainer: found a tokenizer as the model and a model as the tokenizer; swap them",
    ),
    "swapped in an evaluation": (
        lambda: anything["evaluate"](TOKENIZER, peft_model(), EDITS),
        "evaluate_edits: found a tokenizer as the model and a model as the tokenizer; swap them",
    ),
    "a name for a model": (
        lambda: trainer("model", recipe(), EDITS, TOKENIZER),
        "found a str as the model; expected a model: load it with AutoModelForCausalLM",
    ),
    "a name for a tokenizer": (
        lambda: anything["evaluate"](peft_model(), "model", EDITS),
        "found a str as the tokenizer; expected the tokenizer of the model: load it with AutoTokenizer",
    ),
    "a model for a name": (
        lambda: anything["train"](base_model(), EDITS, args=recipe()),
        "found a LlamaForCausalLM; expected a folder or a name on the Hub: for a model in memory use edit",
    ),
    "another kind of arguments": (
        lambda: trainer(peft_model(), transformers.TrainingArguments(output_dir="out"), EDITS, TOKENIZER),
        "found a TrainingArguments as args; expected a BreadthFirstConfig",
    ),
    "edits before the arguments": (
        lambda: trainer(peft_model(), EDITS, recipe(), TOKENIZER),
        "found a list as args; expected a BreadthFirstConfig",
    ),
    "the recipe as what to train": (
        lambda: anything["train"]("model", EDITS, recipe()),
        "peft_config: found a BreadthFirstConfig; expected a LocFTConfig .*Pass the recipe as args",
    ),
    "no EOS": (lambda: trainer(peft_model(), recipe(), EDITS, without_eos()), "found no EOS token; set tokenizer.eos"),
    "no edits": (lambda: anything["evaluate"](peft_model(), TOKENIZER, []), "found none; expected at least one"),
    "a list of texts": (lambda: anything["read"](["a", "b"]), r"row 0: found 'a' \(str\); .*pair \(prompt, target\)"),
    "a text for a list": (
        lambda: anything["EvaluationConfig"](protocols="generation"),
        r"protocols: found text; expected a list: protocols=\['generation'\]",
    ),
    "misspelt recipe": (lambda: BreadthFirstConfig(recipe="balance"), "recipe='balance': expected one of"),  # type: ignore[arg-type]
    "misspelt dtype": (lambda: LocFTConfig(delta_dtype="fp16"), "delta_dtype='fp16': expected one of"),
    "a layer below 0": (lambda: LocFTConfig(layers_to_transform=[-1]), r"\[-1\]: expected one or more layer numbers"),
    "a whole model as an adapter": (
        lambda: anything["save"](base_model(), "saved"),
        "found a LlamaForCausalLM without an adapter; expected a PeftModel",
    ),
    "a report that is none": (lambda: EvaluationReport.load("model"), "found no such file; expected a folder that"),
}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_a_mistake_in_python_says_what_is_wrong(name: str, folder: Path) -> None:
    call, message = IN_PYTHON[name]
    with warnings.catch_warnings(), pytest.raises((ValueError, OSError)) as caught:
        call()
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert not (folder / "saved").exists()


def test_prompt_and_target_need_no_names() -> None:
    assert Edit("The city is", "Oslo") == Edit(prompt="The city is", target="Oslo")


def test_there_are_thirty() -> None:
    assert len(CALLS) + len(IN_PYTHON) >= 30

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import (
    BreadthFirstConfig,
    Edit,
    EvaluationConfig,
    EvaluationReport,
    LocFTConfig,
    evaluate_model,
    inspect_adapter,
    save_adapter,
    train_edits,
)
from peft_locft.cli.arguments import parse_evaluate, parse_train
from peft_locft.cli.commands import COMMANDS, main
from peft_locft.engine import TrainingDivergedError

Words = list[str]
TINY_RUN = ["--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    base_model().save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    file = tmp_path / "edits.jsonl"
    records = [{"prompt": edit.prompt, "target_new": edit.target} for edit in EDITS]
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return file


@pytest.fixture
def call(model_folder: Path, edits_file: Path, tmp_path: Path) -> Words:
    """A call that works."""
    files = ["--model_name_or_path", str(model_folder), "--edits", str(edits_file)]
    return ["train", *files, "--output_dir", str(tmp_path / "out"), *TINY_RUN]


def write_yaml(tmp_path: Path, content: object) -> str:
    (tmp_path / "run.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------- locft train


def test_train_prints_what_was_done_and_how_to_load_it(
    call: Words, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call) == 0
    printed = capsys.readouterr().out
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    losses = json.loads((tmp_path / "out" / "locft_provenance.json").read_text())["training"]["epoch_losses"]
    assert re.search(rf"^Trained in \d+ s, saved to {tmp_path}/out$", printed, re.MULTILINE)
    assert f"\nbase model     {model_folder}\n" in printed
    assert f"\nsize           {size / 1e3:.1f} kB\n" in printed
    assert "\ntrained        model.layers.1.mlp.down_proj.locft_delta.weight  F32 32 x 48\n" in printed
    assert f"\ntraining loss  {losses[0]:.4f} → {losses[1]:.4f} in 2 epochs\n" in printed

    # a fresh process that knows nothing but the printed lines
    lines = printed.rpartition("Load it with:")[2].strip().splitlines()
    lines = lines[:3]  # what was learned follows
    check = ["import torch", "print(model(torch.arange(3, 10)[None]).logits.double().sum().item())"]
    found = run_python("\n".join([*lines, *check]), folder=tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert float(found) == loaded(torch.arange(3, 10)[None]).logits.double().sum().item()


def test_the_module_runs_as_a_command(call: Words, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peft_locft.cli.commands", *call]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "AutoPeftModelForCausalLM" in done.stdout
    assert str(inspect_adapter(tmp_path / "out")) in done.stdout


def test_the_command_does_what_the_function_does(
    call: Words, model_folder: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, "--learning_rate", "0.01", "--layers_to_transform", "2"]) == 0
    args = BreadthFirstConfig(
        output_dir=str(tmp_path / "by_function"), num_train_epochs=2, per_device_train_batch_size=4,
        use_cpu=True, disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    config = LocFTConfig(layers_to_transform=[2])
    summary = train_edits(model_folder, edits_file, config, args)
    assert config == LocFTConfig(layers_to_transform=[2]), "the caller's configuration stays as it is"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (summary.folder / name).read_bytes()


def test_a_config_file_gives_flags_and_the_command_line_goes_before_it(
    model_folder: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "model_name_or_path": str(model_folder),
        "edits": str(edits_file),
        "output_dir": str(tmp_path / "out"),
        "target_modules": ["up_proj"],
        "layers_to_transform": 1,
        "learning_rate": "1e-3",
        "num_train_epochs": 3,
        "append_eos": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    assert main(["train", "--config", write_yaml(tmp_path, content), "--num-train-epochs", "1"]) == 0
    recipe = inspect_adapter(tmp_path / "out").provenance.to_dict()["recipe"]
    assert (recipe["num_train_epochs"], recipe["learning_rate"], recipe["append_eos"]) == (1, 1e-3, False)
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().out


NEEDED = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o", "--use_cpu"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"learning_rate": 0.25}, 0.25),
        ({"lr_scheduler_kwargs": {"power": 2}}, {"power": 2}),
        ({"report_to": ["none"]}, []),
        ({"loss_floor": 0}, 0.0),
        ({"chat_template": True}, "on"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"seed": 7}, 7),
        ({"run_name": "-x"}, "-x"),
    ],
)
def test_values_of_every_kind_come_through_a_config_file(
    content: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    args = parse_train([*NEEDED, "--config", write_yaml(tmp_path, content)])["args"]
    (name,) = content
    assert getattr(args, name) == expected


def test_every_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help-all"])
    assert stopped.value.code == 0
    flags = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    written_on_saving = {"base_sha256"}
    location_fields = {field.name for field in dataclasses.fields(LocFTConfig)} & set(LocFTConfig.__annotations__)
    location_fields -= written_on_saving
    recipe_fields = {field.name for field in dataclasses.fields(BreadthFirstConfig) if field.init}
    assert {"target_modules", "train_bias"} <= location_fields and {"loss_floor", "seed"} <= recipe_fields
    assert location_fields | recipe_fields <= flags


def test_every_flag_of_the_location_arrives() -> None:
    words = {
        "target_modules": "down_proj up_proj",
        "exclude_modules": "lm_head",
        "layers_to_transform": "1 2",
        "layers_pattern": "layers",
        "target_parameters": "experts.down_proj",
        "modules_to_save": "norm",
        "trainable_token_indices": "3 4",
        "train_bias": "",
        "delta_dtype": "bfloat16",
        "scale": "0.5",
        "init_weights": "False",
    }
    given = [word for name, values in words.items() for word in [f"--{name}", *values.split()]]
    assert parse_train([*NEEDED, *given])["peft_config"] == LocFTConfig(
        target_modules=["down_proj", "up_proj"],
        exclude_modules=["lm_head"],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
        target_parameters=["experts.down_proj"],
        modules_to_save=["norm"],
        trainable_token_indices=[3, 4],
        train_bias=True,
        delta_dtype="bfloat16",
        scale=0.5,
        init_weights=False,
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("down_proj", {"down_proj"}),
        ("model.layers.1.mlp.down_proj", {"model.layers.1.mlp.down_proj"}),
        ("all-linear", "all-linear"),
        (r".*\.1\.mlp\.(up|down)_proj", r".*\.1\.mlp\.(up|down)_proj"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_names_are_told_from_a_regular_expression(given: str, expected: Any, by_file: bool, tmp_path: Path) -> None:
    file = ["--config", write_yaml(tmp_path, {"target_modules": given})]
    parsed = parse_train([*NEEDED, *(file if by_file else ["--target_modules", given])])
    assert parsed["peft_config"].target_modules == expected


def test_an_entire_layer_trains(call: Words, tmp_path: Path) -> None:
    assert main([*call, "--target_modules", "entire-layer", "--layers_to_transform", "1"]) == 0
    assert len(inspect_adapter(tmp_path / "out").tensors) == 9


@pytest.mark.parametrize("name", ["lora/adapter_config.json", "lora", "my_lora.json"])
def test_a_lora_config_trains_and_saves_lora(
    name: str, call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(target_modules=["up_proj"], r=3, base_model_name_or_path="another/model", revision="v2")
    config.save_pretrained(tmp_path / "lora")
    content = (tmp_path / "lora" / "adapter_config.json").read_bytes()
    (tmp_path / "my_lora.json").write_bytes(content)
    assert main([*call, "--peft_config", str(tmp_path / name)]) == 0
    saved = inspect_adapter(tmp_path / "out").config
    assert (saved.peft_type, saved.r, saved.revision) == ("LORA", 3, None)
    assert saved.base_model_name_or_path == call[2]
    printed = capsys.readouterr().out
    assert "import peft_locft" not in printed
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = [value for key, value in loaded.state_dict().items() if "lora_B" in key]
    assert trained and all(value.any() for value in trained)


def test_conflicting_targets_are_warned_of_once(call: Words, edits_file: Path) -> None:
    with edits_file.open("a") as file:
        file.write("\n" + json.dumps({"prompt": EDITS[0].prompt, "target_new": "Paris"}))
    with pytest.warns(UserWarning, match="1 of 8 prompts have several targets") as warned:
        assert main(call) == 0
    assert sum("have several targets" in str(warning.message) for warning in warned) == 1


def test_the_last_of_conflicting_targets_can_be_kept(call: Words, edits_file: Path, tmp_path: Path) -> None:
    with edits_file.open("a") as file:
        file.write("\n" + json.dumps({"prompt": EDITS[0].prompt, "target_new": "Paris"}))
    assert main([*call, "--on_conflict", "last"]) == 0
    assert inspect_adapter(tmp_path / "out").provenance.to_dict()["edits"]["count"] == len(EDITS)


def test_a_run_is_resumed(call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call += ["--save_strategy", "epoch", "--save_total_limit", "2"]
    assert main(call) == 0
    expected = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert main(call) == 2  # it asks for one of the flags
    assert main([*call, "--resume_from_checkpoint", "True"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == expected


def test_the_last_lines_say_what_was_learned(call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*call, "--fail_if", "reliability<0.98"]) == 3
    printed = capsys.readouterr()
    *_, learned, advice = printed.out.splitlines()
    assert learned.startswith(f'learned 0 of {len(EDITS)} edits ({len(EDITS)} not: "{EDITS[0].prompt}" → ')
    assert advice == (
        "To learn more: train longer (--num_train_epochs 4), or at another location (`locft locate` finds one)."
    )
    assert printed.err.endswith("locft train: --fail_if reliability<0.98: found 0\n")
    # an evaluation agrees, and has an exit code of its own, too
    words = ["evaluate", "--adapter", str(tmp_path / "out"), "--edits", call[4]]
    assert main([*words, "--fail_if", "reliability<0.98", "perplexity>1"]) == 2  # that was not measured
    assert main([*words, "--fail_if", "reliability<0.98", "reliability_contains>2"]) == 3
    assert main([*words, "--fail_if", "reliability>0.5"]) == 0


@pytest.mark.parametrize("condition", ["reliability", "reliability<much", "<0.9", "perplexity<30"])
def test_a_condition_that_cannot_hold_is_refused_before_work(
    condition: str, call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, "--fail_if", condition]) == 2
    assert f"--fail_if {condition!r}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_edits_can_be_handed_over_as_they_are(model_folder: Path, tmp_path: Path) -> None:
    args = BreadthFirstConfig(output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True, disable_tqdm=True)
    edits = [Edit(prompt="The river is", target="Dave")]
    summary = train_edits(str(model_folder), edits, args=args, dtype="bfloat16")
    assert summary.provenance.to_dict()["edits"]["count"] == 1
    assert summary.config.task_type == "CAUSAL_LM"


# ---------------------------------------------------------------------- locft evaluate, locft baselines


def test_evaluate_prints_and_saves_what_the_function_finds(
    call: Words, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call) == 0
    capsys.readouterr()
    words = ["evaluate", "--adapter", str(tmp_path / "out"), "--edits", str(edits_file), "--num_edits", "5"]
    assert main([*words, "--protocols", "token_accuracy", "--output_dir", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    config = EvaluationConfig(protocols=["token_accuracy"])
    report = evaluate_model(None, edits_file, config, adapter=tmp_path / "out", num_edits=5)
    assert printed.startswith(str(report))
    assert f"Saved to {tmp_path / 'report'}: open evaluation.html in a browser." in printed
    assert EvaluationReport.load(tmp_path / "report").results == report.results


def test_evaluate_takes_a_config_file(model_folder: Path, edits_file: Path, tmp_path: Path) -> None:
    file = write_yaml(tmp_path, {"model_name_or_path": str(model_folder), "edits": str(edits_file), "seed": 4})
    arguments = parse_evaluate(["--config", file, "--confidence", "0.9", "--tasks", "piqa", "arc_easy"])
    assert (arguments["args"].seed, arguments["args"].confidence) == (4, 0.9)
    assert arguments["tasks"] == ["piqa", "arc_easy"]


def test_baselines_prints_the_table(
    model_folder: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_name_or_path", str(model_folder), "--edits", str(edits_file), "--methods", "LocFT"]
    assert main(["baselines", *words, "--output_dir", str(tmp_path / "table"), *TINY_RUN]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "table" / "baselines.md").read_text() in printed
    assert printed.count("| LocFT | breadth-first, batches of ") == 3


def test_train_evaluates_on_the_way(call: Words, tmp_path: Path) -> None:
    flags = ["--evaluate_every", "1", "--evaluate_num_edits", "3", "--best_metric", "reliability_token_accuracy"]
    assert main([*call, *flags]) == 0
    curves = json.loads((tmp_path / "out" / "evaluation_curves.json").read_text())
    assert [point["epoch"] for point in curves] == [0, 1, 2]
    assert inspect_adapter(tmp_path / "out").provenance.to_dict()["training"]["curves"] == curves


def test_a_best_metric_needs_evaluations(call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs evaluations during training. Set evaluate_every" in refused([*call, "--best_metric", "x"], capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_with_nan_is_said_in_a_line(
    model_folder: Path, edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base_model()
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer("llama2").save_pretrained(tmp_path / "nan")
    words = ["evaluate", "--model_name_or_path", str(tmp_path / "nan"), "--edits", str(edits_file)]
    assert "logits of the edited model are NaN or infinite for the prompt" in refused(words, capsys)


# ---------------------------------------------------------------------- locft inspect, locft


def test_inspect_prints_what_train_printed(call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(call)
    trained = capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    inspected = capsys.readouterr().out
    assert inspected.strip() == str(inspect_adapter(tmp_path / "out")).strip()
    assert trained.partition("\n\n")[2].startswith(inspected.strip() + "\n\nlearned 0 of 8 edits")


def test_inspect_reads_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import get_peft_model

    save_adapter(get_peft_model(base_model(), LoraConfig(target_modules=["down_proj"])), tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("method         LORA\n")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_alone_it_says_how_it_is_used(argv: Words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "usage: locft COMMAND" in printed and "train " in printed and "inspect " in printed


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"peft-locft {version('peft-locft')}\n"


# ---------------------------------------------------------------------- help

LIGHT_CALLS: list[Words] = [
    ["--help"],
    ["--version"],
    ["trian"],
    ["merge", "--help"],
    ["detach", "--help"],
    ["inspect", "--help"],
    ["edits", "--help"],
    ["export", "--help"],
    ["merge", "base", "out"],
    ["export", "a", "b", "--too", "peft"],
]


@pytest.mark.parametrize("argv", LIGHT_CALLS, ids=" ".join)
def test_help_and_usage_mistakes_do_not_wait_for_torch(argv: Words, tmp_path: Path) -> None:
    heavy = ("torch", "peft", "transformers", "datasets", "accelerate", "numpy")
    code = f"""
import sys
from peft_locft.cli.commands import main
try:
    main({argv})
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules])
"""
    assert run_python(code, tmp_path).splitlines()[-1] == "[]"


def help_of(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, flag])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "evaluate", "locate", "baselines"])
def test_help_shows_few_flags_in_sections_and_help_all_the_others(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = help_of(command, "--help", capsys), help_of(command, "--help-all", capsys)
    assert long == help_of(command, "--help_all", capsys)
    shown, all_flags = (re.findall(r"^  --(\w+)", text, re.MULTILINE) for text in (short, long))
    assert len(shown) == len(set(shown)) <= 20 and len(all_flags) == len(set(all_flags))
    assert all_flags[: len(shown)] == shown
    assert f"`locft {command} --help-all` shows all flags." in " ".join(short.split()) and len(all_flags) > len(shown)
    assert short.startswith(f"usage: locft {command} --")
    assert {"model and edits:", "output:"} <= set(re.findall(r"^\S.*:$", short, re.MULTILINE))
    if command != "evaluate":
        ours, theirs = long.split("\nflags of transformers.TrainingArguments:\n")
        assert "  --loss_floor" in ours and "  --gradient_checkpointing" in theirs


def test_help_says_a_default_that_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("locate", "--help-all", capsys)
    assert "None" not in shown.partition("flags of transformers")[0]
    assert "layers nearer to\n                              the best. (default: 1)" in shown
    assert "(default: down up attention\n" in shown
    assert "  --append_eos, --no_append_eos\n" in shown and "\n  --modules MODULES ...  " in shown


# ---------------------------------------------------------------------- mistakes


def refused(argv: Words, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what is written to stderr for a call that must not be carried out."""
    try:
        code: Any = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    return printed.err


Spoil = Callable[[Words, Path], Words]


def without(flag: str) -> Spoil:
    return lambda call, _: call[: call.index(flag)] + call[call.index(flag) + 2 :]


def with_words(*words: str) -> Spoil:
    return lambda call, _: [*call, *words]


def with_edits(content: str, name: str = "bad.jsonl") -> Spoil:
    def spoil(call: Words, tmp_path: Path) -> Words:
        (tmp_path / name).write_text(content)
        return [*call, "--edits", str(tmp_path / name)]

    return spoil


def with_config_file(content: object) -> Spoil:
    return lambda call, tmp_path: [*call, "--config", write_yaml(tmp_path, content)]


def with_peft_config(content: str) -> Spoil:
    def spoil(call: Words, tmp_path: Path) -> Words:
        (tmp_path / "peft.json").write_text(content)
        return [*call, "--peft_config", str(tmp_path / "peft.json")]

    return spoil


def with_a_file_at_the_output(call: Words, tmp_path: Path) -> Words:
    (tmp_path / "taken").write_text("mine")
    return [*call, "--output_dir", str(tmp_path / "taken")]


ASKED = {"prompt": "The city is in", "target_new": "the river"}

MISTAKES: dict[str, tuple[Spoil, str]] = {
    "no model": (without("--model_name_or_path"), r"required: --model_name_or_path"),
    "no edits": (without("--edits"), r"required: --edits"),
    "no output folder": (without("--output_dir"), r"required: --output_dir"),
    "unknown flag": (with_words("--learning_rat", "1"), r"--learning_rat 1\. Did you mean --learning_rate\?"),
    "abbreviated flag": (with_words("--conf", "x.yaml"), "unrecognized arguments: --conf x.yaml"),
    "not a number": (with_words("--learning_rate", "fast"), r"learning_rate='fast': expected a number, or 'auto'"),
    "not an objective": (with_words("--objective", "all"), r"--objective: invalid choice: 'all' .*target_new"),
    "not a dtype": (with_words("--dtype", "int8"), r"--dtype: invalid choice: 'int8' .*bfloat16"),
    "not a delta dtype": (with_words("--delta_dtype", "int8"), r"LocFTConfig.delta_dtype='int8': expected one of"),
    "negative floor": (with_words("--loss_floor", "-1"), r"loss_floor=-1.0: expected a finite number, 0 or more"),
    "depth-first in batches": (with_words("--edit_order", "depth_first"), "depth-first trains one edit at a time"),
    "config file not there": (with_words("--config", "no.yaml"), r"--config no\.yaml: cannot be read as YAML"),
    "config file no YAML": (with_config_file("a: [1"), r"run\.yaml: cannot be read as YAML"),
    "config file a list": (with_config_file(["learning_rate"]), r"found list, expected flags as `name: value` lines"),
    "config file empty": (with_config_file(""), r"found NoneType, expected flags as `name: value` lines"),
    "config file unknown key": (with_config_file({"lr": 1, "help": 1}), r"help, lr\. Did you mean --learning_rate\?"),
    "config file in itself": (with_config_file({"config": "x"}), r"unknown keys config\."),
    "config file no value": (with_config_file({"seed": None}), r"run\.yaml: seed without a value\. Give one"),
    "config file bad value": (with_config_file({"seed": "x"}), r"--seed: invalid int value: 'x'"),
    "config file bad choice": (with_config_file({"dtype": "int8"}), r"--dtype: invalid choice: 'int8'"),
    "edits not there": (with_words("--edits", "no.json"), r"no\.json: found no such file; expected a file of edits"),
    "edits a folder": (with_words("--edits", "."), r"\.: found a folder; expected a file of edits"),
    "edits broken": (with_edits('{"prompt": "x"\n'), r"bad\.jsonl:1: found broken JSON at column"),
    "edits of no known kind": (with_edits("text", "bad.yaml"), r"bad\.yaml: found '\.yaml'; expected one of \.json"),
    "edits empty": (with_edits(""), "found no records; expected at least one edit"),
    "edits without target": (with_edits(json.dumps({"prompt": "x"})), r"bad\.jsonl:1: no prompt / target columns"),
    "edits with empty target": (with_edits(json.dumps(ASKED | {"target_new": ""})), r"bad\.jsonl:1: field 'target"),
    "edits too long": (
        with_edits(json.dumps(ASKED | {"prompt": "The city," * 90})),
        r"1 of 1 edits are longer than max_length=64 tokens\. The first:\n  bad\.jsonl:1",
    ),
    "edits in conflict": (
        lambda call, tmp_path: with_edits(
            "\n".join(json.dumps(ASKED | {"target_new": target}) for target in ("one", "two"))
        )([*call, "--on_conflict", "error"], tmp_path),
        r"1 of 1 prompts have several targets.*\n.*bad\.jsonl:1.*bad\.jsonl:2",
    ),
    "no chat template": (with_words("--chat_template"), "tokenizer: found no chat template; set"),
    "layer beyond the last": (with_words("--layers_to_transform", "3"), "the model has 3 decoder layers"),
    "no such module": (with_words("--target_modules", "no_proj"), "no_proj"),
    "entire layer of none": (with_words("--target_modules", "entire-layer"), "needs a layer"),
    "layers beside a pattern": (
        with_words("--target_modules", ".*up.*", "--layers_to_transform", "1"),
        r"layers_to_transform=\[1\] has no effect with the regular expression",
    ),
    "output is a file": (with_a_file_at_the_output, r"Cannot save an adapter to .*taken: .*taken is a file"),
    "another method and a location": (
        with_words("--peft_config", "lora", "--scale", "2", "--target_modules", "up_proj"),
        "found --peft_config beside --target_modules, --scale, and each says what to train: give one",
    ),
    "other method not there": (with_words("--peft_config", "no.json"), r"--peft_config no\.json: cannot be read"),
    "other method no JSON": (with_peft_config("{"), r"peft\.json: not the configuration of a PEFT method"),
    "other method a list": (with_peft_config("[]"), r"peft\.json: not the configuration of a PEFT method"),
    "other method unknown": (with_peft_config('{"peft_type": "NEW"}'), r"peft\.json: not the configuration of a PEFT"),
    "other method no type": (with_peft_config('{"r": 3}'), r"peft\.json: not the configuration of a PEFT method"),
    "nothing to resume from": (
        with_words("--resume_from_checkpoint", "True"), r"out holds no complete checkpoint to resume from"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_written(
    mistake: str, call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = MISTAKES[mistake]
    argv = spoil(call, tmp_path)
    said = refused(argv, capsys)
    assert re.search(message, said), said
    said = re.sub("\r.*\n", "", said)  # the progress of loading the model
    assert said.startswith(("locft train: ", "usage: locft train --model_name_or_path"))
    assert len(said) < 1500, "a mistake must not be buried under the list of all flags"
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


def test_a_model_that_is_not_there_is_named(call: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere/at-all" in refused([*call, "--model_name_or_path", "nowhere/at-all"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["poem"],
            r"unknown command .poem.; expected one of train, evaluate, compare, try, locate, baselines, merge, "
            r"detach, "
            r"history, transfer, scope, inspect, edits, export\n`locft --help` lists the commands\.\n$",
        ),
        (
            ["trian"],
            r"^locft: unknown command .trian.; did you mean 'train'\?\n`locft --help` lists the commands",
        ),
        (["inspect"], "^locft inspect: the following arguments are required: ADAPTER\nusage: locft inspect ADAPTER"),
        (["inspect", "nowhere"], r"locft inspect: nowhere is not an adapter folder: it has no adapter_config\.json"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
        (["inspect", "a", "--revision", "v2"], "--revision has no effect without --base"),
        (["inspect", "a", "--edits", "--beside", "b"], "--edits lists edits and nothing else: leave out --base and"),
        (["evaluate", "--edits", "e", "--limit", "5"], "locft evaluate: --limit has no effect without --tasks"),
    ],
)
def test_other_mistakes_in_a_call(argv: Words, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, refused(argv, capsys))


@pytest.mark.parametrize(("error", "message"), [(TrainingDivergedError("NaN"), "NaN"), (OSError("full"), "full")])
def test_a_command_that_fails_ends_with_2_and_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "train", raiser(error))
    assert refused(["train"], capsys) == f"locft train: {message}\n"


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "train", raiser(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["train"])


def raiser(error: Exception) -> Callable[[Words], None]:
    def command(argv: Words) -> None:
        raise error

    return command


# ---------------------------------------------------------------------- documentation


def test_the_page_shows_the_help_texts_as_they_are() -> None:
    command = "python docs/write_cli_help.py"
    script = Path(__file__).parent.parent / "docs" / "write_cli_help.py"
    written: dict[str, Any] = runpy.run_path(str(script))
    page = written["PAGE"].read_text(encoding="utf-8")
    assert re.findall(r"^<!-- locft (\w+) --help -->$", page, re.MULTILINE) == list(COMMANDS)
    assert written["with_help_texts"](page) == page, f"docs/pages/cli.md is out of date; `{command}` rewrites it"

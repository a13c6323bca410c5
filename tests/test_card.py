"""What a model card says, and where it comes from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_tensors
from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import LocFTConfig, describe_adapter, export_lora, export_peft, inspect_adapter, save_adapter
from peft_locft.adapters import check_adapter
from peft_locft.adapters.base_model import BaseModel
from peft_locft.adapters.card import _template, model_card, usage_lines
from peft_locft.adapters.provenance import Provenance
from peft_locft.evaluation.config import EvaluationConfig
from peft_locft.evaluation.evaluator import evaluate_edits
from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.report import EvaluationReport

LOCATION = ["model.layers.22.mlp.down_proj.weight"]


def card_of(base: str | None, **fields: Any) -> str:
    config = LocFTConfig(base_model_name_or_path=base, target_modules=["down_proj"], **fields)
    return model_card(config, Provenance.of_config(config), LOCATION)


def header(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def make_base(folder: Path, card: str | None = None) -> Path:
    base_model().save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def report() -> EvaluationReport:
    results = {
        "reliability_exact_match": MetricResult("said", Estimate(0.9, 0.8, 1.0), Estimate(0.0, 0.0, 0.1), None, 10)
    }
    return EvaluationReport(results, {"fluency": "not asked for"}, [{"prompt": "secret"}], {"confidence": 0.95})


# ---------------------------------------------------------------------- what it says


def test_the_card_of_a_run_says_what_was_edited_and_how_to_use_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "import peft_locft  # registers LOCFT with PEFT\nfrom peft import AutoPeftModelForCausalLM\n" in card
    assert 'model.merge_and_unload().save_pretrained("merged")\n' in card
    assert (
        "This adapter changes what its base model answers to 8 prompts. It holds differences that are added to the"
        in card
    )
    assert "| Location | `model.layers.1.mlp.down_proj.weight` |\n" in card
    sha256 = json.loads((tmp_path / "locft_provenance.json").read_text())["edits"]["sha256"]
    assert f"| Edits | 8 (sha256 `{sha256[:16]}…`) |\n" in card
    recipe = "breadth-first, objective `target_new`, learning rate 0.005, batches of 4, 3 epochs at most, seed 42"
    assert f"| Recipe | {recipe} |\n" in card
    losses = trainer.epoch_losses
    assert f"| Training loss | {losses[0]:.4f} → {losses[-1]:.4f} in 3 epochs |\n" in card
    assert "## Measured\n\nNo evaluation is recorded.\n" in card
    assert (
        "- The edits are not hidden, although their file is not here. Whoever has the base model can compare" in card
    )
    assert "{" not in card.partition("\n---\n")[2]
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_a_base_on_the_hub_is_in_the_header() -> None:
    card = card_of("meta-llama/Meta-Llama-3-8B-Instruct", revision="v1")
    assert header(card) == {
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [
            "base_model:adapter:meta-llama/Meta-Llama-3-8B-Instruct",
            "knowledge-editing",
            "locft",
            "model-editing",
            "peft",
            "transformers",
        ],
    }
    link = "[`meta-llama/Meta-Llama-3-8B-Instruct`](https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct)"
    assert f"| Base model | {link} at `v1` |\n" in card
    assert "# Edited facts in Meta-Llama-3-8B-Instruct\n" in card
    assert 'AutoTokenizer.from_pretrained("meta-llama/Meta-Llama-3-8B-Instruct").save_pretrained("merged")\n' in card
    assert '\nlocft merge "meta-llama/Meta-Llama-3-8B-Instruct" "this-repository" merged\n' in card
    assert "before you load it" not in card


@pytest.mark.parametrize(
    "base", ["/home/private/models/llama", "./llama", "../llama", "models/mine/llama", "llama", None, ""]
)
def test_a_path_on_somebodys_machine_is_not(base: str | None) -> None:
    card = card_of(base)
    assert "base_model" not in header(card)
    assert "private" not in card
    assert ("| Base model | `llama`, a folder on the author's machine |\n" in card) == bool(base)
    named = "a folder on the author's machine" if base else "no base model"
    assert f"names {named}. Before you load it, set `base_model_name_or_path` in `adapter_config" in card


def test_a_folder_that_looks_like_a_hub_name_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    assert "base_model" not in header(card_of("models/llama"))


def test_a_base_without_a_name_is_said() -> None:
    card = card_of(None)
    assert "| Base model | not recorded |\n" in card and "# Edited facts\n" in card
    assert 'AutoTokenizer.from_pretrained("the-base-model")' in card


# ---------------------------------------------------------------------- the licence, never made up


@pytest.mark.parametrize(
    ("written", "shown", "fields"),
    [
        ("license: apache-2.0", "`apache-2.0`, as the base model's card says", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: qwen\nlicense_link: https://a.b/LICENSE",
            "[qwen](https://a.b/LICENSE), as the base model's card says",
            {"license": "other", "license_name": "qwen", "license_link": "https://a.b/LICENSE"},
        ),
        ("license_name: qwen", "unknown; see the base model's card", {}),
        ("language: en", "unknown; see the base model's card", {}),
        ("license: [mit, apache-2.0]", "unknown; see the base model's card", {}),
        ('license: "mit` | evil <script>"', "unknown; see the base model's card", {}),
        ("license: 'mit", "unknown; see the base model's card", {}),
        ("- mit", "unknown; see the base model's card", {}),
    ],
)
def test_the_licence_is_the_one_that_the_bases_card_names(
    written: str, shown: str, fields: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{written}\n---\n# A model\n")
    card = card_of(str(tmp_path))
    assert f"| Licence of the base | {shown} |\n" in card
    assert {name: value for name, value in header(card).items() if name.startswith("license")} == fields


def hub_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, card: str) -> str:
    """Put a model's card and configuration into a Hub cache; return the commit."""
    commit = "c0ffee" + "0" * 34
    snapshot = folder / "models--somebody--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(card)
    (snapshot / "config.json").write_text("{}")
    refs = folder / "models--somebody--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return commit


def test_commit_and_licence_of_a_base_in_the_hub_cache_are_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    commit = hub_cache(monkeypatch, tmp_path, written)
    card = card_of("somebody/model")
    link = "https://huggingface.co/somebody/model/blob/main/LICENSE"
    assert f"| Licence of the base | [own]({link}), as the base model's card says |\n" in card
    assert header(card)["license_link"] == link
    assert f"(https://huggingface.co/somebody/model) at `{commit}` |\n" in card
    unknown = BaseModel("somebody/model", "another-branch")
    assert BaseModel.known_here("somebody/model", "another-branch") == unknown
    for name in ("somebody/other", "not a name", None):
        assert BaseModel.known_here(name) == BaseModel(name, None)


# ---------------------------------------------------------------------- figures


def test_an_evaluation_is_in_the_card_and_its_answers_are_not(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path, report=report())
    card = (tmp_path / "README.md").read_text()
    assert "| reliability_exact_match | 0.000 [0.000, 0.100] | 0.900 [0.800, 1.000] | - | 10 edits |\n" in card
    assert "Not measured: fluency: not asked for." in card
    assert all("secret" not in file.read_text("latin-1") for file in tmp_path.iterdir())
    found = check_adapter(tmp_path).provenance.evaluation
    assert found is not None and found.to_markdown() == report().to_markdown()


def test_figures_that_json_has_no_number_for_come_back(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path, report=report())
    facts = json.loads((tmp_path / "locft_provenance.json").read_text())
    facts["evaluation"]["results"]["reliability_exact_match"]["after"] |= {"value": "inf", "high": "nan"}
    facts["evaluation"]["notes"] = ["a note\nof two lines"]
    (tmp_path / "locft_provenance.json").write_text(json.dumps(facts))
    found = check_adapter(tmp_path).provenance.evaluation
    assert found is not None and found["reliability_exact_match"].after.value == float("inf")
    describe_adapter(tmp_path)
    assert "| inf [0.800, nan] |" in (tmp_path / "README.md").read_text()


def test_an_adapter_is_described_anew_after_it_was_measured(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    before = json.loads((tmp_path / "locft_provenance.json").read_text())
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    args = EvaluationConfig(protocols=["generation"], num_resamples=20)
    measured = evaluate_edits(trainer.model, make_tokenizer("llama2"), EDITS, args, progress=False)
    describe_adapter(tmp_path, report=measured)
    card = (tmp_path / "README.md").read_text()
    assert f"On 8 edits, those of this adapter:\n\n{measured.to_markdown()}\n" in card
    recorded = json.loads(json.dumps({"evaluation": measured.summary_to_dict()}))
    assert json.loads((tmp_path / "locft_provenance.json").read_text()) == before | recorded
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    # without a report it stays
    describe_adapter(tmp_path)
    assert (tmp_path / "README.md").read_text() == card


# ---------------------------------------------------------------------- who writes it


def test_pefts_own_save_writes_it_too(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    card = (tmp_path / "peft" / "README.md").read_text()
    assert card == (tmp_path / "ours" / "README.md").read_text()
    assert "| Location | `model.layers.1.mlp.down_proj.weight` |\n" in card


def test_a_card_that_somebody_wrote_is_left_by_pefts_own_save(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    peft_model().save_pretrained(tmp_path)
    assert "# My own words\n" in (tmp_path / "README.md").read_text()
    assert "Edited facts" not in (tmp_path / "README.md").read_text()


def test_a_configuration_alone_has_no_card(tmp_path: Path) -> None:
    LocFTConfig(target_modules=["down_proj"]).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]


def test_the_trainers_own_card_does_not_replace_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "locft")
    trainer.save_model()
    card = (tmp_path / "locft" / "README.md").read_text()
    trainer.create_model_card(model_name="of the trainer")
    assert (tmp_path / "locft" / "README.md").read_text() == card
    lora = make_trainer(tmp_path / "lora", peft_model(config=LoraConfig(target_modules=["down_proj"])))
    lora.save_model()
    lora.create_model_card(model_name="of the trainer")
    assert "of the trainer" in (tmp_path / "lora" / "README.md").read_text()


def test_exports_say_what_they_are(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "---\nlicense: mit\n---\n")
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = make_trainer(tmp_path / "adapter", model)
    trainer.train()
    trainer.save_model()
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    export = export_lora(tmp_path / "adapter", tmp_path / "lora", rank=4, edits=EDITS)
    stock, lora = ((tmp_path / name / "README.md").read_text() for name in ("peft", "lora"))
    for card in (stock, lora):
        assert "answers to 8 prompts" in card and "| Location | `model.layers.1.mlp.down_proj.weight` |\n" in card
        assert "peft_locft" not in card and "locft" not in header(card)["tags"]  # type: ignore[operator]
        assert "## Load\n\nWith PEFT:\n" in card and "| Licence of the base | `mit`, as the base" in card
    assert "It holds the whole edited weights, so it needs only PEFT" in stock
    assert "## Measured\n\nNo evaluation is recorded." in stock
    assert f"by matrices of rank 4, which keep {export.share_kept:.3f} of the change (of its squared" in lora
    assert export.after is not None and export.after.to_markdown() in lora
    for name in ("peft", "lora"):
        export_details = inspect_adapter(tmp_path / name).provenance.export
        assert export_details is not None and export_details.to == name


def test_describing_changes_no_weight(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    describe_adapter(tmp_path)
    assert_same_tensors(load_file(tmp_path / "adapter_model.safetensors"), before)


def test_a_folder_that_is_no_adapter_is_not_described(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is not an adapter folder: it has no adapter_config\.json and no adapter_model"
    ):
        describe_adapter(tmp_path)


# ---------------------------------------------------------------------- what a stranger wrote


def test_a_hostile_name_adds_nothing_to_the_card() -> None:
    hostile = "a`|<script>alert(1)</script>[x](http://evil)_*\n# B"
    config = LocFTConfig(base_model_name_or_path=f"./{hostile.replace('/', '')}", target_modules=["down_proj"])
    recorded = replace(Provenance.of_config(config), versions={hostile: hostile}, base_sha256={hostile: "0" * 64})
    evaluation = replace(report(), missing={hostile: hostile}, notes=[hostile])
    card = model_card(config, replace(recorded, evaluation=evaluation), [hostile])
    body = card.partition("\n---\n")[2]
    without_code = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert "<" not in without_code
    before_figures = without_code.partition("## Measured")[0]
    assert "[x](" not in before_figures and "# B" not in [line.strip() for line in before_figures.splitlines()]
    table = [line for line in body.splitlines() if line.startswith("| ") and "metric" not in line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table[:5]] == [3] * 5


def test_a_template_without_a_value_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="is undefined"):
        _template().render()


# ---------------------------------------------------------------------- lines of Python


def test_usage_lines_of_other_methods_import_nothing_of_ours() -> None:
    assert "peft_locft" not in usage_lines(LoraConfig(), "adapter")


@pytest.mark.parametrize("name", ["plain", "it's", 'a "quoted" one', "back\\slash", "Zürich 利根川"])
def test_usage_lines_load_from_any_folder(name: str, tmp_path: Path) -> None:
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / name)
    found: dict[str, object] = {}
    exec(usage_lines(LocFTConfig(), str(tmp_path / name)), found)
    assert isinstance(found["model"], PeftModel)
    assert found["AutoPeftModelForCausalLM"] is AutoPeftModelForCausalLM

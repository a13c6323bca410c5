"""What is true of the source as a whole: which module may import which, sizes, public names, a quiet import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import peft_locft

PACKAGE = Path(peft_locft.__file__).parent
TUNER = "tuner.*"
ANYTHING = "*"

# module: the modules of this package that it may import. `cli` only inside of functions.
ARROWS: dict[str, set[str]] = {
    "__init__": {ANYTHING},
    "_version": set(),
    "activation_cache": {
        "kept_states",
        "narrowing",
        "packed_attention",
        "prefixes",
        "residency",
        "shared_states",
        "tail",
    },
    "adapter_deltas": {"adapter_reading", "checkpoint", "tuner.config"},
    "baseline_table": {"bootstrap"},
    "baselines": {
        TUNER,
        "baseline_table",
        "edits",
        "evaluation",
        "evaluation_config",
        "files",
        "loading",
        "plots",
        "recipe",
        "trials",
    },
    "batches": {"training_rows"},
    "bootstrap": set(),
    # no model, and no trainer
    "checkpoint": set(),
    "checkpoint_names": {"checkpoint"},
    "adapter_claims": {"safetensors_header", "tuner.provenance"},
    "adapter_facts": {"batches", "edits", "evaluation_report", "leaks", "recipe"},
    "adapter_folder": {
        "adapter_claims",
        "adapter_facts",
        "adapter_reading",
        "card",
        "edits",
        "evaluation_report",
        "files",
        "shipped_edits",
        "shrinking",
        "tuner.provenance",
    },
    "adapter_reading": {"adapter_claims", "safetensors_header"},
    # texts alone, no model
    "augmentation": {"edits", "leaks"},
    "base_tensors": {"adapter_reading", "tuner.arithmetic"},
    "card": {"adapter_facts", "bootstrap", "evaluation_report"},
    "cli": {ANYTHING},
    "continued_trainer": {
        "adapter_facts",
        "adapter_folder",
        "decoding",
        "distributed",
        "edit_lists",
        "encoding",
        "generated_text",
        "kept_facts",
        "questions",
        "recipe",
        "trainer",
        "training_data",
    },
    "command_line_arguments": {
        TUNER,
        "evaluate_arguments",
        "evaluation_config",
        "locate_arguments",
        "location_preset",
        "recipe",
    },
    "decoding": {
        "activation_cache",
        "memory",
        "model_state",
        "packed_decoding",
        "prefixes",
        "questions",
        "tail",
        "tuner.presets",
    },
    "distributed": set(),
    "edit_files": set(),
    "edit_lists": {"adapter_reading", "edits", "shipped_edits"},
    "edit_records": set(),
    "edit_questions": {"edits", "encoding", "questions", "scoring"},
    "edit_runner": {
        "activation_cache",
        "batches",
        "distributed",
        "encoding",
        "memory",
        "objectives",
        "prefixes",
        "recipe",
        "tail",
    },
    "edited_weights": {
        "adapter_deltas",
        "checkpoint",
        "checkpoint_names",
        "file_copies",
        "tuner.arithmetic",
        "tuner.combine",
    },
    "edits": {"edit_files", "edit_records"},
    "encoding": {"edits"},
    "evaluation": {
        "bootstrap",
        "decoding",
        "edit_questions",
        "edits",
        "encoding",
        "evaluation_config",
        "evaluation_report",
        "general_ability",
        "leaks",
        "questions",
        "scoring",
        "tabulation",
        "tuner.provenance",
    },
    "evaluation_callback": {
        "edits",
        "evaluation",
        "evaluation_config",
        "evaluation_report",
        "files",
        "general_ability",
        "plots",
        "training_callbacks",
    },
    "evaluation_config": {"leaks", "metrics"},
    "evaluation_report": {"bootstrap", "files", "report_page"},
    "evaluation_run": {
        "adapter_claims",
        "edits",
        "evaluation",
        "evaluation_config",
        "evaluation_report",
        "general_ability",
        "harness",
        "leaks",
        "loading",
    },
    "failures_table": {"bootstrap", "evaluation_report", "html_elements"},
    "figures": {"baseline_table", "bootstrap", "evaluation_report", "report_words"},
    "files": set(),
    "html_elements": set(),
    "generated_text": {"decoding", "encoding", "evaluation", "leaks", "model_state", "questions"},
    "general_ability": {"bootstrap", "decoding", "evaluation_report", "model_state"},
    "harness": {"decoding", "evaluation", "model_state", "task_results"},
    "file_copies": set(),
    "in_place": {
        "checkpoint",
        "edited_weights",
        "file_copies",
        "in_place_exchange",
        "in_place_undo",
        "stream_merge",
    },
    "in_place_exchange": {"checkpoint", "file_copies", "files", "in_place_undo"},
    "in_place_undo": {"checkpoint", "edited_weights", "file_copies"},
    "kept_facts": {
        "augmentation",
        "decoding",
        "edit_files",
        "edit_records",
        "edits",
        "encoding",
        "generated_text",
        "leaks",
        "prompt_similarity",
        "questions",
    },
    "kept_keys": {"questions"},
    "kept_states": {"prefixes", "residency", "shared_states", "tail", "tuner.arithmetic"},
    "leaks": {"edits"},
    "loading": set(),
    "exports": {
        "adapter_claims",
        "adapter_facts",
        "adapter_folder",
        "adapter_reading",
        "base_tensors",
        "files",
        "tuner.config",
    },
    "input_statistics": {
        "decoding",
        "evaluation",
        "files",
        "model_state",
        "statistics_key",
        "tail",
        "tuner.provenance",
    },
    "inspection": {"adapter_reading", "base_tensors", "card", "files", "shipped_edits"},
    "locate_arguments": {"evaluation_config", "location_search", "recipe", "tuner.module_kinds"},
    "location_figures": {"figures", "location_results", "report_words"},
    "location_plan": set(),
    "location_preset": {"files", "tuner.config", "tuner.module_kinds", "tuner.presets"},
    "location_results": {"bootstrap", "evaluation_report", "files", "location_plan", "location_preset"},
    "location_score": {"evaluation_report", "metrics"},
    "location_search": {
        "adapter_facts",
        "edits",
        "evaluation",
        "evaluation_config",
        "loading",
        "location_plan",
        "location_preset",
        "location_results",
        "location_score",
        "location_trials",
        "plots",
        "recipe",
        "shared_states",
        "tuner.module_kinds",
        "tuner.presets",
    },
    "location_trials": {
        "edits",
        "evaluation",
        "evaluation_config",
        "file_copies",
        "files",
        "location_plan",
        "location_results",
        "location_score",
        "memory",
        "model_state",
        "recipe",
        "trials",
        "tuner.arithmetic",
        "tuner.module_kinds",
    },
    "lora_export": {
        "adapter_claims",
        "adapter_folder",
        "adapter_reading",
        "edits",
        "evaluation",
        "evaluation_report",
        "exports",
        "tuner.provenance",
    },
    "lifelong": {
        "adapter_folder",
        "adapter_reading",
        "continued_trainer",
        "edit_lists",
        "edits",
        "files",
        "inspection",
        "loading",
        "recipe",
        "resume",
        "shipped_edits",
        "training_data",
        "tuner.provenance",
    },
    "memory": {"tail"},
    "metrics": {"edit_questions", "scoring"},
    "model_state": set(),
    "narrowing": set(),
    "objectives": set(),
    "one_process": set(),
    "packed_attention": {"prefixes"},
    "packed_decoding": {"kept_keys", "packed_attention", "packed_questions", "prefixes", "questions", "tail"},
    "packed_questions": {"prefixes", "questions"},
    "plots": {"evaluation_report", "figures", "files", "location_figures", "location_results", "report_words"},
    "prefixes": set(),
    "preservation": {"shrinking"},
    "preserver": {"input_statistics", "preservation", "recipe", "trained_tensors"},
    "prompt_similarity": {"decoding", "encoding", "generated_text", "tail"},
    "questions": set(),
    "recipe": {"objectives", "preservation_arguments"},
    "report_page": {
        "bootstrap",
        "evaluation_report",
        "failures_table",
        "figures",
        "html_elements",
        "plots",
        "report_style",
        "report_words",
    },
    "report_style": set(),
    "report_words": {"evaluation_report"},
    "residency": {"tail"},
    "resting": {"objectives"},
    "resume": {"adapter_folder"},
    "safetensors_header": set(),
    "scale_choice": set(),
    "scoring": {"bootstrap", "questions"},
    "statistics_key": {"residency", "tuner.arithmetic", "tuner.presets", "tuner.provenance"},
    "shared_states": set(),
    "stream_merge": {
        "_version",
        "checkpoint",
        "edited_weights",
        "file_copies",
        "files",
        "in_place_undo",
        "shipped_edits",
    },
    "sharing": {"adapter_claims", "card", "inspection", "shipped_edits"},
    "shipped_edits": {"adapter_reading", "edits", "files"},
    "shrinking": {"adapter_reading", "files", "tuner.config"},
    "small_export": {"adapter_facts", "adapter_folder", "base_tensors", "exports", "inspection", "shrinking"},
    "tabulation": {"bootstrap", "edit_questions", "edits", "evaluation_report", "metrics", "scoring"},
    "tail": {"tuner.presets"},
    "task_results": {"bootstrap", "evaluation_report", "files"},
    # not the tuner: it trains any PEFT model
    "trainer": {
        "adapter_facts",
        "adapter_folder",
        "batches",
        "distributed",
        "edits",
        "encoding",
        "generated_text",
        "leaks",
        "model_state",
        "preserver",
        "recipe",
        "residency",
        "resting",
        "resume",
        "row_losses",
        "training_callbacks",
        "training_data",
    },
    "trained_tensors": {"input_statistics", "preservation", "tuner.delta", "tuner.layer", "tuner.provenance"},
    "training_callbacks": {"batches", "recipe", "resting"},
    "training_run": {
        TUNER,
        "adapter_folder",
        "edits",
        "evaluation",
        "evaluation_callback",
        "evaluation_config",
        "inspection",
        "loading",
        "location_preset",
        "recipe",
        "resume",
        "scale_choice",
        "trainer",
        "training_data",
    },
    "trials": {"edits", "evaluation", "evaluation_report", "recipe", "trainer"},
    "tuner.__init__": {TUNER},
    "tuner.arithmetic": set(),
    "tuner.combine": {"tuner.config"},
    # the card, in the place of the template that PEFT writes
    "tuner.config": {"card"},
    "tuner.delta": {"tuner.config"},
    "tuner.layer": {"tuner.config", "tuner.delta", "tuner.merging", "tuner.quantized", "tuner.substitute"},
    "tuner.merging": {"tuner.arithmetic", "tuner.delta", "tuner.quantized"},
    "tuner.model": {TUNER},
    "tuner.module_kinds": {"tuner.config", "tuner.presets"},
    "tuner.modules": {"tuner.config", "tuner.delta", "tuner.layer", "tuner.quantized"},
    "tuner.presets": {"tuner.config", "tuner.modules"},
    "tuner.provenance": {"tuner.arithmetic", "tuner.config", "tuner.layer"},
    "tuner.quantized": set(),
    "tuner.substitute": set(),
    "tuner.targets": {"tuner.config", "tuner.layer", "tuner.modules", "tuner.provenance", "tuner.quantized"},
    "base_distributions": set(),
    "preservation_arguments": set(),
    "row_losses": {"base_distributions", "edit_runner", "encoding", "objectives", "recipe", "tail", "training_rows"},
    "training_data": {
        "adapter_facts",
        "augmentation",
        "edits",
        "encoding",
        "general_ability",
        "generated_text",
        "kept_facts",
        "leaks",
        "model_state",
        "preservation_arguments",
        "recipe",
        "training_rows",
    },
    "training_rows": set(),
    "evaluate_arguments": {"baselines"},
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
every_source = pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def resolve(parts: list[str]) -> str:
    """Return the module that a dotted name in this package means; a package means its `__init__`."""
    path = PACKAGE.joinpath(*parts)
    if path.is_dir():
        return ".".join([*parts, "__init__"])
    if path.with_suffix(".py").exists():
        return ".".join(parts)
    return resolve(parts[:-1])  # a name inside of a module


def imports_of(node: ast.AST, path: Path) -> list[str]:
    """Return the modules of this package that an import statement reads."""
    if isinstance(node, ast.Import):
        dotted = [alias.name.split(".") for alias in node.names]
        return [resolve(parts[1:]) for parts in dotted if parts[0] == "peft_locft"]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module.split(".") if node.module else []
    if node.level:
        here = list(path.relative_to(PACKAGE).parts[: -node.level])
        module = here + module
    elif module[:1] == ["peft_locft"]:
        module = module[1:]
    else:
        return []
    return [resolve([*module, alias.name]) for alias in node.names]


def allowed(arrow: str, allowances: set[str]) -> bool:
    return ANYTHING in allowances or arrow in allowances or (TUNER in allowances and arrow.startswith("tuner."))


@every_source
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    assert name in ARROWS, f"{name} is a new module: add it to ARROWS in {__file__}, with what it may import"
    found = {target for node in ast.walk(ast.parse(path.read_text())) for target in imports_of(node, path)}
    wrong = sorted(target for target in found if not allowed(target, ARROWS[name]))
    assert not wrong, f"{name} may not import {', '.join(wrong)}: allowed are {sorted(ARROWS[name]) or 'none'}"


def test_every_arrow_is_of_a_module_that_may_exist() -> None:
    targets = {target for targets in ARROWS.values() for target in targets} - {ANYTHING, TUNER}
    assert targets <= set(ARROWS)


def test_the_command_line_starts_without_heavy_imports() -> None:
    path = PACKAGE / "cli.py"
    if not path.exists():
        pytest.skip("there is no command line yet")
    module_level = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            module_level += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module_level.append("." * node.level + (node.module or "").partition(".")[0])
    heavy = [name for name in module_level if name not in sys.stdlib_module_names]
    assert not heavy, f"cli.py imports {heavy} at its top: import inside of the function that needs it"


def test_a_wrong_arrow_is_seen(tmp_path: Path) -> None:
    source = "import torch\nfrom ..edits import Edit\nfrom . import model\nimport peft_locft.cli\n"
    nodes = ast.parse(source).body
    path = PACKAGE / "tuner" / "config.py"
    assert [imports_of(node, path) for node in nodes[1:3]] == [["edits"], ["tuner.model"]]
    assert imports_of(nodes[0], path) == []
    assert not allowed("edits", ARROWS["tuner.config"])
    assert not allowed("tuner.model", ARROWS["tuner.config"])
    assert allowed("tuner.layer", ARROWS["tuner.model"])


def lines_of(function: ast.FunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return lines if docstring is None else lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


@every_source
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "split this file"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [f"{node.name}: {length} lines" for node in functions if (length := lines_of(node)) > 50]
    assert not long, f"split: {long}"


@pytest.mark.parametrize("name", ["peft_locft", "peft_locft.tuner"])
def test_public_names_are_sorted_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    objects = {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    assert [name for name, value in objects.items() if not inspect.getdoc(value)] == []


# what an import must leave as it is; heavy imports first, which change some of it themselves
IMPORT_QUIETLY = """
import json, logging, os, random, warnings
import numpy, peft, torch, transformers

def snapshot():
    return {
        "random": repr(random.getstate()),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "handlers": repr(logging.root.handlers),
        "levels": {n: logging.getLogger(n).level for n in ("", "transformers", "peft", "peft_locft")},
        "filters": repr(warnings.filters),
        "environment": dict(os.environ),
        "files": sorted(os.listdir()),
    }

before = snapshot()
import peft_locft
after = snapshot()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def test_the_import_does_nothing_but_register(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", IMPORT_QUIETLY]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == []

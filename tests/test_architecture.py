"""What is true of the source as a whole: which module may import which, sizes, public names, a quiet import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
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
        "running.kept_states",
        "running.narrowing",
        "running.packed_attention",
        "running.prefixes",
        "running.residency",
        "running.shared_states",
        "running.tail",
    },
    "adapters.adapter_deltas": {"adapters.adapter_reading", "checkpoint", "tuner.config"},
    "reporting.baseline_table": {"measuring.bootstrap"},
    "training.baselines": {
        TUNER,
        "reporting.baseline_table",
        "edits",
        "evaluation",
        "measuring.evaluation_config",
        "files",
        "running.loading",
        "plots",
        "recipe",
        "training.trials",
    },
    "training.batches": {"data.training_rows"},
    "measuring.bootstrap": set(),
    # no model, and no trainer
    "checkpoint": set(),
    "merging.checkpoint_names": {"checkpoint"},
    "adapters.adapter_claims": {"adapters.safetensors_header", "tuner.provenance"},
    "adapters.adapter_facts": {"training.batches", "edits", "measuring.evaluation_report", "data.leaks", "recipe"},
    "adapters.adapter_folder": {
        "adapters.adapter_claims",
        "adapters.adapter_facts",
        "adapters.adapter_reading",
        "card",
        "edits",
        "measuring.evaluation_report",
        "files",
        "adapters.shipped_edits",
        "adapters.shrinking",
        "tuner.provenance",
    },
    "adapters.adapter_reading": {"adapters.adapter_claims", "adapters.safetensors_header"},
    # texts alone, no model
    "augmentation": {"edits", "data.leaks"},
    "adapters.base_tensors": {"adapters.adapter_reading", "tuner.arithmetic"},
    "card": {"adapters.adapter_facts", "measuring.bootstrap", "measuring.evaluation_report"},
    "cli": {ANYTHING},
    "training.continued_trainer": {
        "adapters.adapter_facts",
        "adapters.adapter_folder",
        "running.decoding",
        "running.distributed",
        "data.edit_lists",
        "encoding",
        "data.generated_text",
        "data.kept_facts",
        "running.questions",
        "recipe",
        "trainer",
        "data.training_data",
    },
    "command_line.command_line_arguments": {
        TUNER,
        "command_line.evaluate_arguments",
        "measuring.evaluation_config",
        "command_line.locate_arguments",
        "locating.location_preset",
        "recipe",
    },
    "running.decoding": {
        "activation_cache",
        "running.memory",
        "running.model_state",
        "running.packed_decoding",
        "running.prefixes",
        "running.questions",
        "running.tail",
        "tuner.presets",
    },
    "running.distributed": set(),
    "data.edit_files": set(),
    "data.edit_lists": {"adapters.adapter_reading", "edits", "adapters.shipped_edits"},
    "data.edit_records": set(),
    "measuring.edit_questions": {"edits", "encoding", "running.questions", "measuring.scoring"},
    "running.edit_runner": {
        "activation_cache",
        "training.batches",
        "running.distributed",
        "encoding",
        "running.memory",
        "objectives",
        "running.prefixes",
        "recipe",
        "running.tail",
    },
    "merging.edited_weights": {
        "adapters.adapter_deltas",
        "checkpoint",
        "merging.checkpoint_names",
        "file_copies",
        "tuner.arithmetic",
        "tuner.combine",
    },
    "edits": {"data.edit_files", "data.edit_records"},
    "encoding": {"edits"},
    "evaluation": {
        "measuring.bootstrap",
        "running.decoding",
        "measuring.edit_questions",
        "edits",
        "encoding",
        "measuring.evaluation_config",
        "measuring.evaluation_report",
        "measuring.general_ability",
        "data.leaks",
        "running.questions",
        "measuring.scoring",
        "measuring.tabulation",
        "tuner.provenance",
    },
    "training.evaluation_callback": {
        "edits",
        "evaluation",
        "measuring.evaluation_config",
        "measuring.evaluation_report",
        "files",
        "measuring.general_ability",
        "plots",
        "training.training_callbacks",
    },
    "measuring.evaluation_config": {"data.leaks", "measuring.metrics"},
    "measuring.evaluation_report": {"measuring.bootstrap", "files", "reporting.report_page"},
    "measuring.evaluation_run": {
        "adapters.adapter_claims",
        "edits",
        "evaluation",
        "measuring.evaluation_config",
        "measuring.evaluation_report",
        "measuring.general_ability",
        "measuring.harness",
        "data.leaks",
        "running.loading",
    },
    "reporting.failures_table": {"measuring.bootstrap", "measuring.evaluation_report", "reporting.html_elements"},
    "reporting.figures": {
        "reporting.baseline_table",
        "measuring.bootstrap",
        "measuring.evaluation_report",
        "reporting.report_words",
    },
    "files": set(),
    "reporting.html_elements": set(),
    "data.generated_text": {
        "running.decoding",
        "encoding",
        "evaluation",
        "data.leaks",
        "running.model_state",
        "running.questions",
    },
    "measuring.general_ability": {
        "measuring.bootstrap",
        "running.decoding",
        "measuring.evaluation_report",
        "running.model_state",
    },
    "measuring.harness": {"running.decoding", "evaluation", "running.model_state", "measuring.task_results"},
    "file_copies": set(),
    "merging.in_place": {
        "checkpoint",
        "merging.edited_weights",
        "file_copies",
        "merging.in_place_exchange",
        "merging.in_place_undo",
        "merging.stream_merge",
    },
    "merging.in_place_exchange": {"checkpoint", "file_copies", "files", "merging.in_place_undo"},
    "merging.in_place_undo": {"checkpoint", "merging.edited_weights", "file_copies"},
    "data.kept_facts": {
        "augmentation",
        "running.decoding",
        "data.edit_files",
        "data.edit_records",
        "edits",
        "encoding",
        "data.generated_text",
        "data.leaks",
        "data.prompt_similarity",
        "running.questions",
    },
    "running.kept_keys": {"running.questions"},
    "running.kept_states": {
        "running.prefixes",
        "running.residency",
        "running.shared_states",
        "running.tail",
        "tuner.arithmetic",
    },
    "data.leaks": {"edits"},
    "running.loading": set(),
    "adapters.exports": {
        "adapters.adapter_claims",
        "adapters.adapter_facts",
        "adapters.adapter_folder",
        "adapters.adapter_reading",
        "adapters.base_tensors",
        "files",
        "tuner.config",
    },
    "training.input_statistics": {
        "running.decoding",
        "evaluation",
        "files",
        "running.model_state",
        "training.statistics_key",
        "running.tail",
        "tuner.provenance",
    },
    "adapters.inspection": {
        "adapters.adapter_reading",
        "adapters.base_tensors",
        "card",
        "files",
        "adapters.shipped_edits",
    },
    "command_line.locate_arguments": {
        "measuring.evaluation_config",
        "location_search",
        "recipe",
        "tuner.module_kinds",
    },
    "reporting.location_figures": {"reporting.figures", "locating.location_results", "reporting.report_words"},
    "locating.location_plan": set(),
    "locating.location_preset": {"files", "tuner.config", "tuner.module_kinds", "tuner.presets"},
    "locating.location_results": {
        "measuring.bootstrap",
        "measuring.evaluation_report",
        "files",
        "locating.location_plan",
        "locating.location_preset",
    },
    "locating.location_score": {"measuring.evaluation_report", "measuring.metrics"},
    "location_search": {
        "adapters.adapter_facts",
        "edits",
        "evaluation",
        "measuring.evaluation_config",
        "running.loading",
        "locating.location_plan",
        "locating.location_preset",
        "locating.location_results",
        "locating.location_score",
        "locating.location_trials",
        "plots",
        "recipe",
        "running.shared_states",
        "tuner.module_kinds",
        "tuner.presets",
    },
    "locating.location_trials": {
        "edits",
        "evaluation",
        "measuring.evaluation_config",
        "file_copies",
        "files",
        "locating.location_plan",
        "locating.location_results",
        "locating.location_score",
        "running.memory",
        "running.model_state",
        "recipe",
        "training.trials",
        "tuner.arithmetic",
        "tuner.module_kinds",
    },
    "adapters.lora_export": {
        "adapters.adapter_claims",
        "adapters.adapter_folder",
        "adapters.adapter_reading",
        "edits",
        "evaluation",
        "measuring.evaluation_report",
        "adapters.exports",
        "tuner.provenance",
    },
    "training.lifelong": {
        "adapters.adapter_folder",
        "adapters.adapter_reading",
        "training.continued_trainer",
        "data.edit_lists",
        "edits",
        "files",
        "adapters.inspection",
        "running.loading",
        "recipe",
        "training.resume",
        "adapters.shipped_edits",
        "data.training_data",
        "tuner.provenance",
    },
    "running.memory": {"running.tail"},
    "measuring.metrics": {"measuring.edit_questions", "measuring.scoring"},
    "running.model_state": set(),
    "running.narrowing": set(),
    "objectives": set(),
    "running.one_process": set(),
    "running.packed_attention": {"running.prefixes"},
    "running.packed_decoding": {
        "running.kept_keys",
        "running.packed_attention",
        "running.packed_questions",
        "running.prefixes",
        "running.questions",
        "running.tail",
    },
    "running.packed_questions": {"running.prefixes", "running.questions"},
    "plots": {
        "measuring.evaluation_report",
        "reporting.figures",
        "files",
        "reporting.location_figures",
        "locating.location_results",
        "reporting.report_words",
    },
    "running.prefixes": set(),
    "preservation": {"adapters.shrinking"},
    "training.preserver": {"training.input_statistics", "preservation", "recipe", "training.trained_tensors"},
    "data.prompt_similarity": {"running.decoding", "encoding", "data.generated_text", "running.tail"},
    "running.questions": set(),
    "recipe": {"objectives", "training.preservation_arguments"},
    "reporting.report_page": {
        "measuring.bootstrap",
        "measuring.evaluation_report",
        "reporting.failures_table",
        "reporting.figures",
        "reporting.html_elements",
        "plots",
        "reporting.report_style",
        "reporting.report_words",
    },
    "reporting.report_style": set(),
    "reporting.report_words": {"measuring.evaluation_report"},
    "running.residency": {"running.tail"},
    "training.resting": {"objectives"},
    "training.resume": {"adapters.adapter_folder"},
    "adapters.safetensors_header": set(),
    "training.scale_choice": set(),
    "measuring.scoring": {"measuring.bootstrap", "running.questions"},
    "training.statistics_key": {"running.residency", "tuner.arithmetic", "tuner.presets", "tuner.provenance"},
    "running.shared_states": set(),
    "merging.stream_merge": {
        "_version",
        "checkpoint",
        "merging.edited_weights",
        "file_copies",
        "files",
        "merging.in_place_undo",
        "adapters.shipped_edits",
    },
    "adapters.sharing": {"adapters.adapter_claims", "card", "adapters.inspection", "adapters.shipped_edits"},
    "adapters.shipped_edits": {"adapters.adapter_reading", "edits", "files"},
    "adapters.shrinking": {"adapters.adapter_reading", "files", "tuner.config"},
    "adapters.small_export": {
        "adapters.adapter_facts",
        "adapters.adapter_folder",
        "adapters.base_tensors",
        "adapters.exports",
        "adapters.inspection",
        "adapters.shrinking",
    },
    "measuring.tabulation": {
        "measuring.bootstrap",
        "measuring.edit_questions",
        "edits",
        "measuring.evaluation_report",
        "measuring.metrics",
        "measuring.scoring",
    },
    "running.tail": {"tuner.presets"},
    "measuring.task_results": {"measuring.bootstrap", "measuring.evaluation_report", "files"},
    # not the tuner: it trains any PEFT model
    "trainer": {
        "adapters.adapter_facts",
        "adapters.adapter_folder",
        "training.batches",
        "running.distributed",
        "edits",
        "encoding",
        "data.generated_text",
        "data.leaks",
        "running.model_state",
        "training.preserver",
        "recipe",
        "running.residency",
        "training.resting",
        "training.resume",
        "training.row_losses",
        "training.training_callbacks",
        "data.training_data",
    },
    "training.trained_tensors": {
        "training.input_statistics",
        "preservation",
        "tuner.delta",
        "tuner.layer",
        "tuner.provenance",
    },
    "training.training_callbacks": {"training.batches", "recipe", "training.resting"},
    "training.training_run": {
        TUNER,
        "adapters.adapter_folder",
        "edits",
        "evaluation",
        "training.evaluation_callback",
        "measuring.evaluation_config",
        "adapters.inspection",
        "running.loading",
        "locating.location_preset",
        "recipe",
        "training.resume",
        "training.scale_choice",
        "trainer",
        "data.training_data",
    },
    "training.trials": {"edits", "evaluation", "measuring.evaluation_report", "recipe", "trainer"},
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
    "training.base_distributions": {"objectives"},
    "training.preservation_arguments": set(),
    "training.row_losses": {
        "training.base_distributions",
        "running.edit_runner",
        "encoding",
        "objectives",
        "recipe",
        "running.tail",
        "data.training_rows",
    },
    "data.training_data": {
        "adapters.adapter_facts",
        "augmentation",
        "edits",
        "encoding",
        "measuring.general_ability",
        "data.generated_text",
        "data.kept_facts",
        "data.leaks",
        "running.model_state",
        "training.preservation_arguments",
        "recipe",
        "data.training_rows",
    },
    "data.training_rows": set(),
    "command_line.evaluate_arguments": {"training.baselines"},
    "adapters.__init__": set(),
    "command_line.__init__": set(),
    "data.__init__": set(),
    "locating.__init__": set(),
    "measuring.__init__": set(),
    "merging.__init__": set(),
    "reporting.__init__": set(),
    "running.__init__": set(),
    "training.__init__": set(),
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


def test_the_readme_has_a_line_for_every_file() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    folders = readme.partition("## Files")[2].split("\n\n`")  # each begins with its name
    told = {folder.partition("/`: ")[0]: set(re.findall(r"`(\w+\.py)`", folder)) for folder in folders[1:]}
    told[""] = set(re.findall(r"`(\w+\.py)`", folders[0]))
    of_nobody = {"__init__.py", "_version.py"}
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())):
        name = "" if folder == PACKAGE else folder.name
        assert told[name] - of_nobody == {path.name for path in folder.glob("*.py")} - of_nobody


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

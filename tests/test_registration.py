"""The package becomes part of PEFT by being imported, on every Python, and stays so."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import hotswap

import peft_locft
import peft_locft.tuner
from peft_locft import LocFTConfig, LocFTModel
from peft_locft._registration import call_after_import

LOCFT = PeftType("LOCFT")


def test_the_type_is_a_member_like_any_other() -> None:
    assert isinstance(LOCFT, PeftType)
    assert LOCFT == "LOCFT"
    assert LOCFT.name == LOCFT.value == "LOCFT"
    assert PeftType["LOCFT"] is LOCFT
    assert PeftType.LOCFT is LOCFT
    assert list(PeftType)[-1] is LOCFT
    assert LOCFT in PeftType
    assert len(PeftType) == len({member.value for member in PeftType})
    assert repr(LOCFT) == "<PeftType.LOCFT: 'LOCFT'>"


def test_copies_are_the_member_itself() -> None:
    assert copy.copy(LOCFT) is LOCFT
    assert copy.deepcopy(LOCFT) is LOCFT
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(LOCFT, protocol)) is LOCFT
    assert json.loads(json.dumps({"peft_type": LOCFT})) == {"peft_type": "LOCFT"}


def test_peft_knows_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[LOCFT] is LocFTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[LOCFT] is LocFTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[LOCFT] == "locft_" == LocFTModel.prefix
    assert hotswap.CONFIG_KEYS_TO_CHECK[LOCFT] == []
    assert peft.get_peft_config({"peft_type": "LOCFT", "target_modules": ["q_proj"]}).target_modules == {"q_proj"}


def test_importing_again_changes_nothing() -> None:
    members = dict(PeftType.__members__)
    importlib.reload(peft_locft.tuner)
    assert dict(PeftType.__members__) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[LOCFT] is LocFTConfig


def test_importing_from_scratch_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_locft"]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("peft_locft")
    assert again is not peft_locft
    assert again.LocFTConfig().peft_type is LOCFT
    assert [member.value for member in PeftType].count("LOCFT") == 1


def test_another_package_of_that_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class LocFTConfigOfAnother(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, LOCFT, LocFTConfigOfAnother)
    with pytest.raises(ImportError, match=r"already has a method LOCFT, registered by test_registration\. Uninstall"):
        importlib.reload(peft_locft.tuner)


# ---------------------------------------------------------------- orders of import, each in a process of its own

IS_REGISTERED = """
import inspect, sys
import peft
from peft_locft import LocFTConfig

assert peft.get_peft_config({"peft_type": "LOCFT"}).__class__ is LocFTConfig
assert LocFTConfig.card_writer is not None
assert [finder for finder in sys.meta_path if "peft_locft" in type(finder).__module__] == []
assert peft.__spec__.loader is peft.__loader__ and inspect.getsource(peft)
"""
LOOK_FIRST = """
import peft_locft
from transformers.utils import is_peft_available

assert is_peft_available()
import peft
"""
UNPICKLE = f"""
import pickle

assert pickle.loads({pickle.dumps(LocFTConfig(target_modules=["q_proj"]))!r}).target_modules == {{"q_proj"}}
"""
TWO_THREADS = """
import threading, traceback
import peft_locft

def import_the_tuner():
    from peft_locft.tuner import LocFTConfig

failed = []
threading.excepthook = failed.append
other = threading.Thread(target=import_the_tuner)
other.start()
import peft
other.join()
assert not failed, failed
"""
ORDERS = {"look first": LOOK_FIRST, "peft first": "import peft", "unpickle": UNPICKLE, "two threads": TWO_THREADS}


@pytest.mark.parametrize("order", ORDERS)
def test_the_method_is_registered_in_every_order_of_import(order: str) -> None:
    command = [sys.executable, "-c", ORDERS[order] + IS_REGISTERED]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_import_of_peft_is_watched_until_it_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delitem(sys.modules, "not_yet_there", raising=False)
    seen: list[object] = []
    for _ in range(2):  # twice is once
        call_after_import("not_yet_there", seen.append)
    with pytest.raises(ModuleNotFoundError, match="not_yet_there"):
        importlib.import_module("not_yet_there")
    source = tmp_path / "not_yet_there.py"
    source.write_text("raise RuntimeError('half-way')")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="half-way"):
        importlib.import_module("not_yet_there")
    source.write_text("value = 'all of it'")
    spec = importlib.util.find_spec("not_yet_there")
    assert spec is not None and spec.origin == str(source)
    assert seen == []
    module = importlib.import_module("not_yet_there")
    assert seen == [module] and module.value == "all of it"
    importlib.reload(module)
    assert seen == [module]
    call_after_import("not_yet_there", seen.append)
    assert seen == [module, module]


# ---------------------------------------------------------------- other Pythons, without torch

ADD_TO_AN_ENUM = """
import copy, enum, json, pickle

class PeftType(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"

{function}

_add_peft_type("LOCFT")
member = PeftType("LOCFT")
assert member is PeftType["LOCFT"] is PeftType.LOCFT
assert isinstance(member, PeftType) and isinstance(member, str)
assert member == "LOCFT" and member.name == "LOCFT" and member.value == "LOCFT"
assert list(PeftType) == [PeftType.LORA, PeftType.IA3, member] and len(PeftType) == 3
assert member in PeftType and list(PeftType.__members__) == ["LORA", "IA3", "LOCFT"]
assert copy.copy(member) is member and copy.deepcopy({{"a": member}})["a"] is member
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
assert json.dumps(member) == '"LOCFT"' and {{member: 1}}["LOCFT"] == 1
assert repr(member) == "<PeftType.LOCFT: 'LOCFT'>" and str(member) == "PeftType.LOCFT"
try:
    PeftType.LOCFT = 1
except AttributeError:
    print("right")
"""


def function_source() -> str:
    source = Path(peft_locft.tuner.__file__).read_text()
    (function,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "_add_peft_type"
    )
    return ast.unparse(function)


def find_python(version: str) -> str:
    minor = version.partition(".")[2]
    installed = sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python3"))
    for candidate in [shutil.which(f"python{version}"), *map(str, installed)]:
        if candidate is None:
            continue
        # a pyenv shim is found even where its version is not switched on
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0 and result.stdout.strip() == version:
            return candidate
    pytest.skip(f"there is no Python {version} on this machine")


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_enum_takes_a_member_on_every_python(version: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ADD_TO_AN_ENUM.format(function=function_source()))
    result = subprocess.run([find_python(version), "-W", "error", str(script)], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("right", "")


# ---------------------------------------------------------------- where the package was not imported

WITHOUT_THE_IMPORT = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

for load in (
    PeftConfig.from_pretrained,
    AutoPeftModelForCausalLM.from_pretrained,
    lambda folder: PeftModel.from_pretrained(torch.nn.Linear(1, 1), folder),
):
    try:
        load(sys.argv[1])
    except KeyError as error:
        print(repr(error))
assert "peft_locft" not in sys.modules
"""


def test_without_the_import_loading_fails_with_the_bare_name(tmp_path: Path) -> None:
    LocFTConfig(target_modules=["q_proj"], base_model_name_or_path="base").save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_THE_IMPORT, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["KeyError('LOCFT')"] * 3

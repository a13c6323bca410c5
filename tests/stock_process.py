"""Loads exported adapters where `peft_locft` cannot be imported; test_exports.py runs it.

Its argument is a JSON file with a list of orders: a loader, the base's folder, the adapter's, the dtype and where to
write the logits.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
import peft
import torch
from safetensors.torch import save_file
from tiny_models import logits
from transformers import AutoModelForCausalLM

LOADERS = ("peft", "low memory", "auto peft", "merged", "transformers", "auto transformers", "base")


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "peft_locft":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def load(loader: str, base: str, adapter: str, dtype: torch.dtype) -> Any:
    if loader == "auto peft":
        return peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype)
    if loader == "auto transformers":
        return AutoModelForCausalLM.from_pretrained(adapter, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if loader == "transformers":
        model.load_adapter(adapter)
    elif loader != "base":
        model = peft.PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=loader == "low memory")
    return model.merge_and_unload() if loader == "merged" else model


def main() -> None:
    sys.meta_path.insert(0, NotInstalled())
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    for order in json.loads(Path(sys.argv[1]).read_text()):
        model = load(order["loader"], order["base"], order["adapter"], getattr(torch, order["dtype"])).eval()
        save_file({"logits": logits(model).contiguous()}, order["result"])
    assert "peft_locft" not in sys.modules and "LOCFT" not in peft.PeftType.__members__


if __name__ == "__main__":
    main()

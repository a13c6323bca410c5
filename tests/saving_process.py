"""Saves adapters in child processes that die on the way; test_saving.py runs it and looks at what they leave.

Every line of its input is one order in JSON, with the folder to save to and

- `adapter` and `die_at`: save it once, and die before so many calls of the system that change files;
- `first` and `kill_after`: save two adapters in turn until killed, so many seconds later.

Its answer to each is a line too: whether the child died before it was done.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
from dying_processes import die_at
from peft import PeftModel, get_peft_model
from tiny_models import build, randomize

from peft_locft import LocFTConfig, save_adapter
from peft_locft.io import folders

# at different locations, so that the weights of one do not belong to the configuration of the other
LOCATIONS = {"down": ("down_proj", 1), "up": ("up_proj", 2)}
SYSTEM_CALLS = ("link", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink")
CALLS = [*((os, name) for name in SYSTEM_CALLS), (folders, "_swap")]


def make_adapter(location: str, adapter_name: str = "default") -> PeftModel:
    """Return an adapter, the same one in every process."""
    module, layer = LOCATIONS[location]
    config = LocFTConfig(target_modules=[module], layers_to_transform=[layer], task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), config, adapter_name=adapter_name)
    randomize(model, adapter_name, seed=layer)
    return model


def obey(order: dict[str, Any], models: dict[str, PeftModel]) -> None:
    if "die_at" in order:
        die_at(order["die_at"], CALLS)
        save_adapter(models[order["adapter"]], order["folder"])
        return
    names = sorted(LOCATIONS, key=lambda name: name != order["first"])
    while True:
        for name in names:
            save_adapter(models[name], order["folder"])


def main() -> None:
    models = {name: make_adapter(name) for name in LOCATIONS}
    models |= {f"named {name}": make_adapter(name, "other") for name in LOCATIONS}
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            obey(order, models)
            os._exit(0)
        if "kill_after" in order:
            time.sleep(order["kill_after"])
            os.kill(child, signal.SIGKILL)
        print(json.dumps(os.waitpid(child, 0)[1] != 0), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

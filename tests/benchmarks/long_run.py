"""One long run of BreadthFirstTrainer on SmolLM2-135M: time, memory and loss by epoch, and reliability at the end.

Reliability is by the published protocol: greedy generation of up to 32 tokens that ends with EOS, the first full stop
or line break; right is what equals the target in lower case, without punctuation and articles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_locft import encode_prompts, read_edits

from .common import figure, load, machine, markdown_table, memory_mib, parser_for, settled, train, write_json

MAX_NEW_TOKENS = 32
NUM_PROMPTS = 100  # in one generation


def main() -> None:
    from demo import same

    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    model, tokenizer = load(arguments.dtype)
    edits = read_edits(arguments.edits)[: arguments.num_edits]
    names = ("layer", "epochs", "batch_size", "learning_rate")
    begun = time.perf_counter()
    run = train(model, tokenizer, edits, **{name: getattr(arguments, name) for name in names}, disable_tqdm=False)
    trained, peak = time.perf_counter(), memory_mib()["VmHWM"]
    rows = [
        {"epoch": epoch, "loss": loss, "seconds": seconds, "MiB": memory["VmRSS"], "anonymous MiB": memory["RssAnon"]}
        for epoch, (loss, seconds, memory) in enumerate(
            zip(run["epoch_losses"], run["epoch_seconds"], run["memory_mib"][1:], strict=True), start=1
        )
    ]
    print(f"\n{markdown_table(rows)}", flush=True)
    written = answers(model, tokenizer, [edit.prompt for edit in edits])
    right = [same(answer, edit.target) for answer, edit in zip(written, edits, strict=True)]
    summary = {
        "edits": len(edits),
        "minutes": (trained - begun) / 60,
        "edits/s": len(edits) / settled(run["epoch_seconds"]),
        "cache, s": run["cache_seconds"],
        "peak MiB": peak,
        "reliability": sum(right) / len(right),
        "minutes to generate": (time.perf_counter() - trained) / 60,
    }
    print(f"\n{markdown_table([summary])}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    write_json(
        arguments.output / "long_run.json",
        {"machine": machine(), "arguments": settings, "summary": summary, "table": rows},
    )
    draw(arguments.output / "long_run.png", rows)


def parse() -> argparse.Namespace:
    parser = parser_for(__doc__, epochs=25, num_edits=3000)
    parser.add_argument("--layer", type=int, default=20, help="its down_proj is edited; of 30, from 0")
    parser.add_argument("--batch_size", type=int, default=100, help="edits in a batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    return parser.parse_args()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Return greedy answers up to the first full stop, line break or EOS, prompts of similar length together."""
    from demo import AtFullStop

    model.eval()
    encoded = encode_prompts(prompts, tokenizer)
    stop, pad = [AtFullStop(tokenizer)], tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    found = [""] * len(prompts)
    for start in range(0, len(order), NUM_PROMPTS):
        rows = order[start : start + NUM_PROMPTS]
        length = len(encoded[rows[-1]])
        # padded on the left, where generation needs it
        padding = [length - len(encoded[index]) for index in rows]
        generated = model.generate(
            input_ids=torch.tensor([[pad] * n + encoded[i] for n, i in zip(padding, rows, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * (length - n) for n in padding]),
            max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=pad, stopping_criteria=stop,
        )  # fmt: skip
        for index, text in zip(
            rows, tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True), strict=True
        ):
            found[index] = text.lstrip().split(".")[0].split("\n")[0].strip()
    return found


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    epochs = [row["epoch"] for row in rows]
    with figure(path) as axes:
        if not axes:
            return
        axes[0].plot(epochs, [row["loss"] for row in rows], marker="o")
        axes[0].set(title="loss", xlabel="epoch", yscale="log")
        for name in ("MiB", "anonymous MiB"):
            axes[1].plot(epochs, [row[name] for row in rows], marker="o", label=name)
        top = 1.2 * max(row["MiB"] for row in rows)
        axes[1].set(title="resident memory", xlabel="epoch", ylim=(0, top))
        axes[1].legend()


if __name__ == "__main__":
    main()

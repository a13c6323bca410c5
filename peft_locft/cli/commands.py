"""The command line, `locft COMMAND`: each parses, calls one public function and prints."""

from __future__ import annotations

import sys
import time
from inspect import signature
from typing import Any

USAGE = """usage: locft COMMAND ...

commands:
  train     write a file of edits into a model and save the adapter
  evaluate  measure what an edit did to a model
  locate    find out where edits are best written into a model
  baselines compare fine-tuning baselines on the same edits
  merge     merge adapters into a checkpoint, into a new folder or in place
  detach    take off again what was merged in place
  inspect   verify an adapter folder and print what it holds
  export    write an adapter for where peft_locft is not installed, or smaller

`locft COMMAND --help` lists the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `locft`; `None` takes them from the process.

    Returns:
        The exit code: 0, or 2 for a mistake in the call or its files, or a model that answers with NaN.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        print(f"locft: unknown command '{command}'; expected one of {', '.join(COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        print(f"locft {command}: {error}", file=sys.stderr)
        return 2
    return 0


def train(argv: list[str]) -> None:
    """Write a file of edits into a model and save the adapter; or add, replace and withdraw edits of a saved one."""
    from ..workflows.train import train_edits
    from ..workflows.update import update_adapter
    from .arguments import parse_train

    arguments = parse_train(argv)
    begun = time.perf_counter()
    summary: Any = update_adapter(**arguments) if "adapter" in arguments else train_edits(**arguments)
    if arguments["args"].process_index == 0:  # of several, under torchrun or accelerate launch
        print(f"Trained in {time.perf_counter() - begun:.0f} s, saved to {summary.folder}\n\n{summary}")


def evaluate(argv: list[str]) -> None:
    """Measure what an edit did to a model."""
    from ..workflows.evaluate import evaluate_model
    from .arguments import parse_evaluate

    arguments = parse_evaluate(argv)
    print(evaluate_model(**arguments))
    if arguments["output_dir"]:
        print(f"\nSaved to {arguments['output_dir']}: open evaluation.html in a browser.")


def locate(argv: list[str]) -> None:
    """Find out where edits are best written into a model."""
    from ..engine.distributed import leave_group

    rank = leave_group()  # before anything looks at the group
    from ..workflows.locate import run_location_search
    from .arguments import parse_locate

    arguments = parse_locate(argv)
    is_shown = rank == 0 and not arguments["args"].disable_tqdm
    found = run_location_search(**arguments, show_progress=is_shown)
    if rank == 0:
        print(f"{found}\n\nSaved to {arguments['args'].output_dir}: train with --location best.json in it.")


def baselines(argv: list[str]) -> None:
    """Compare fine-tuning baselines on the same edits."""
    from ..workflows.baselines import markdown, run_baselines
    from .arguments import parse_baselines

    print(markdown(run_baselines(**parse_baselines(argv))))


def inspect(argv: list[str]) -> None:
    """Verify an adapter folder and print what it holds."""
    import argparse

    from ..adapters.inspection import inspect_adapter
    from ..adapters.shipped_edits import adapter_edits, find_conflicts
    from ..data.edit_lists import describe_edits

    parser = argparse.ArgumentParser(prog="locft inspect", description=inspect.__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="adapter", help="a local adapter folder, of any PEFT method")
    parser.add_argument("--base", help="verify that this base model has the tensors that the adapter was trained on")
    parser.add_argument("--revision", help="branch, tag or commit of the base model on the Hub")
    parser.add_argument("--beside", nargs="+", help="list prompts that these adapters edit as well")
    parser.add_argument(
        "--edits",
        nargs="?",
        const=True,
        metavar="FILE",
        help="list only its edits with their ids: those that it ships, or those in FILE",
    )
    arguments = vars(parser.parse_args(argv))
    others, edits = arguments.pop("beside"), arguments.pop("edits")
    if edits is not None:
        print(describe_edits(adapter_edits(arguments["folder"], None if edits is True else edits)))
        return
    print(inspect_adapter(**arguments))
    if others:
        print(find_conflicts([arguments["folder"], *others]))


def merge(argv: list[str]) -> None:
    """Merge adapters into a checkpoint without loading it: into a new folder, or in place."""
    import argparse

    from ..merging.in_place import merge_in_place
    from ..merging.stream_merge import merge_checkpoint

    parser = argparse.ArgumentParser(
        prog="locft merge",
        description=merge.__doc__,
        usage="locft merge BASE ADAPTER... OUT [options]\n       locft merge --in-place MODEL ADAPTER... [options]",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="base (folder or Hub id), adapters, new folder")
    parser.add_argument("--in-place", action="store_true", help="change MODEL's own files; undo with `locft detach`")
    parser.add_argument("--weights", nargs="+", type=float, help="one factor per adapter (after the paths)")
    parser.add_argument("--scale", type=float, help="strength of the deltas, in place of the adapters' own")
    parser.add_argument(
        "--link",
        choices=["auto", "hard", "copy"],
        help="how unedited weight files get to OUT",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--force", action="store_true", help="merge even if an adapter was trained on another base")
    options = parser.parse_args(argv)
    how = {"weights": options.weights, "scale": options.scale, "force": options.force, "progress": True}
    if options.in_place:
        unused = [f"--{name}" for name in ("link", "revision") if getattr(options, name) is not None]
        if unused or len(options.paths) < 2:
            parser.error(f"--in-place takes MODEL ADAPTER...{', and no ' + ' or '.join(unused) if unused else ''}")
        print(merge_in_place(options.paths[0], options.paths[1:], **how))
        return
    if len(options.paths) < 3:
        parser.error("expected BASE, one or more adapters, and OUT; to change the base itself: --in-place")
    base, *adapters, out = options.paths
    print(merge_checkpoint(base, adapters, out, link=options.link or "auto", revision=options.revision, **how))


def detach(argv: list[str]) -> None:
    """Undo `locft merge --in-place`: every file gets its bytes back."""
    import argparse

    from ..merging.in_place import detach

    parser = argparse.ArgumentParser(
        prog="locft detach", description="Undo a merge in place: every file gets its bytes back."
    )
    parser.add_argument("model", help="the model's folder")
    print(detach(parser.parse_args(argv).model, progress=True))


def export(argv: list[str]) -> None:
    """Write an adapter in another form: for where peft_locft is not installed, or smaller."""
    import argparse

    from ..adapters.exports import export_peft, export_weights
    from ..adapters.lora_export import export_lora
    from ..adapters.small_export import export_small

    exports: dict[str, Any] = {
        "peft": export_peft,
        "lora": export_lora,
        "weights": export_weights,
        "small": export_small,
    }
    parser = argparse.ArgumentParser(prog="locft export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("adapter", help="a local LocFT adapter folder")
    parser.add_argument("out", help="the folder to write, or with --to weights the .safetensors file")
    parser.add_argument(
        "--to",
        required=True,
        choices=exports,
        help="an adapter for stock PEFT; the nearest LoRA adapter; the edited weights alone; a smaller LocFT adapter",
    )
    parser.add_argument("--base", help="base model: a folder or a name on the Hub; default: the one the adapter names")
    parser.add_argument("--revision", help="branch, tag or commit of the base model on the Hub")
    parser.add_argument("--dtype", help="dtype of the loaded base: auto (default), float32, bfloat16 or float16")
    parser.add_argument("--rank", type=int, help="with --to lora: rank of every module's matrices, up to 512")
    parser.add_argument("--energy", type=float, help="with --to lora: keep this share of every delta, such as 0.99")
    parser.add_argument("--edits", help="with --to lora: evaluate both adapters on these edits")
    parser.add_argument("--delta_dtype", help="with --to small: dtype of the deltas: float32, bfloat16 or float16")
    parser.add_argument("--density", type=float, help="with --to small: share of values that stay, such as 0.2")
    parser.add_argument("--force", action="store_true", default=None, help="use another base model than in training")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    to = given.pop("to")
    without_effect = sorted(given.keys() - signature(exports[to]).parameters.keys())
    if without_effect:
        parser.error(f"--{without_effect[0]} has no effect with --to {to}")
    print(exports[to](**given))


COMMANDS: dict[str, Any] = {
    "train": train,
    "evaluate": evaluate,
    "locate": locate,
    "baselines": baselines,
    "merge": merge,
    "detach": detach,
    "inspect": inspect,
    "export": export,
}

if __name__ == "__main__":
    sys.exit(main())

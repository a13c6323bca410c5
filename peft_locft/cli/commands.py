"""The command line, `locft COMMAND`: each command parses its flags, calls one public function and prints."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from .._version import __version__
from .parser import DASHES, CommandParser
from .slips import nearest_command
from .stopping import Terminated, stoppable

# a command imports what it runs, and after it has parsed: help, usage mistakes and other commands do not wait for that

USAGE = """usage: locft COMMAND ...

commands:
  train      train edits into a model and save the adapter, or update a saved adapter
  evaluate   measure what the edits changed in a model
  compare    put the reports of several evaluations side by side
  try        show answers of base and adapters side by side, in the terminal or on a page
  locate     search for the best location to edit
  baselines  compare ways to edit on the same edits
  merge      merge adapters into a checkpoint on disk
  detach     undo a merge in place
  history    show what was merged into a model
  transfer   say which edits survive on a fine-tuned model
  scope      list an adapter's subjects, for a gateway before it
  inspect    verify an adapter and print what it holds
  edits      show what is understood of a file of edits; convert and split it
  export     write an adapter for PEFT, as LoRA, as plain weights, or smaller

`locft COMMAND --help` lists the flags of a command. `locft --version` prints the version."""


CHANGE_FAILED, CONDITION_MET = 1, 3  # exit codes, the second of `--fail_if`


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `locft`; `None` takes them from the process.

    Returns:
        The exit code: 0; 1 if an update failed to change an edit; 3 if a condition of `--fail_if` holds; 2 for a
        mistake in the call or its files, a full disk, or a model whose loss or logits are NaN; 130 after Ctrl-C and
        143 after SIGTERM, as in shells.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"peft-locft {__version__}")
        return 0
    if command == "help":
        return main([*rest[:1], "--help"])
    if command not in COMMANDS:
        near = nearest_command(command, COMMANDS)
        hint = f"did you mean '{near}'?" if near else f"expected one of {', '.join(COMMANDS)}"
        if command.startswith("-"):
            hint = "the command comes first, such as `locft train FLAGS`"
        print(f"locft: unknown command '{command}'; {hint}\n`locft --help` lists the commands.", file=sys.stderr)
        return 2
    try:
        with stoppable():
            return COMMANDS[command](rest) or 0
    except KeyboardInterrupt as stop:
        message = " ".join(["stopped.", *getattr(stop, "__notes__", ["Nothing was written."])])
        code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        message, code = " ".join([str(error), *getattr(error, "__notes__", [])]), 2
    except RuntimeError as error:
        from ..engine.model_state import TrainingDivergedError

        if not isinstance(error, TrainingDivergedError):
            raise
        message, code = str(error), 2
    line = f"locft {command}: {message}"
    print(f"\n{line}" if code > 2 else line, file=sys.stderr)  # a bar or ^C may be on the line
    return int(code)


def train(argv: list[str]) -> int:
    """Train edits into a model and save the adapter; or add, replace and withdraw edits of a saved adapter."""
    from .arguments import parse_train

    arguments = parse_train(argv)
    from ..evaluation.conditions import check_conditions
    from ..workflows.train import train_edits
    from ..workflows.update import update_adapter

    fail_if = arguments.pop("fail_if")
    check_conditions(fail_if, ["reliability", "median_probability"])
    begun = time.perf_counter()
    summary: Any = update_adapter(**arguments) if "adapter" in arguments else train_edits(**arguments)
    if arguments["args"].process_index == 0:  # of several, under torchrun or accelerate launch
        print(f"Trained in {time.perf_counter() - begun:.0f} s, saved to {summary.folder}\n\n{summary}")
    if getattr(summary, "has_failed", False):
        print("locft train: a change failed, see above.", file=sys.stderr)
        return CHANGE_FAILED
    return exit_code("train", fail_if, summary.metrics)


def evaluate(argv: list[str]) -> int:
    """Measure what the edits changed in a model."""
    from .arguments import parse_evaluate

    arguments = parse_evaluate(argv)
    from ..evaluation.conditions import check_conditions
    from ..workflows.evaluate import evaluate_model

    fail_if = arguments.pop("fail_if")
    check_conditions(fail_if)
    report = evaluate_model(**arguments)
    print(report)
    if arguments["output_dir"]:
        print(f"\nSaved to {arguments['output_dir']}: open evaluation.html in a browser.")
    return exit_code("evaluate", fail_if, {name: result.after.value for name, result in report.results.items()})


def compare(argv: list[str]) -> None:
    """Put the reports of several evaluations side by side: metrics, paired differences, and differing questions."""
    parser = CommandParser("compare", "REPORT... [--output_dir FOLDER]", str(compare.__doc__), epilog=DASHES)
    parser.add_argument(
        "reports",
        nargs="+",
        metavar="REPORT",
        help="Folders that `locft evaluate --output_dir` wrote; the others are compared with the first.",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", help="Folder for the comparison: HTML, CSV and LaTeX.")
    options = parser.parse_args(argv)
    from ..reporting.comparison_page import load_comparison, save_comparison

    comparison = load_comparison(options.reports)
    print(comparison)
    if options.output_dir is not None:
        save_comparison(comparison, options.output_dir)
        print(f"\nSaved to {options.output_dir}: open comparison.html in a browser.")


def exit_code(command: str, fail_if: list[str], metrics: dict[str, float]) -> int:
    """Return 3 and say why, if a condition of `--fail_if` holds; otherwise 0."""
    from ..evaluation.conditions import met_conditions

    met = met_conditions(fail_if, metrics)
    for condition in met:
        print(f"locft {command}: --fail_if {condition}", file=sys.stderr)
    return CONDITION_MET if met else 0


def try_adapters(argv: list[str]) -> None:
    """Show answers of the base model and of adapters side by side."""
    from .try_arguments import parse_try

    arguments = parse_try(argv)
    from ..workflows.comparison import AdapterComparison
    from ..workflows.web import check_gradio, serve_comparison

    if arguments.page is not None:
        check_gradio()  # before the model is loaded
    comparison = AdapterComparison.load(arguments.adapters, **arguments.loading)
    if arguments.page is not None:
        with contextlib.suppress(KeyboardInterrupt), serve_comparison(comparison, **arguments.page) as page:
            print(f"Open {page.url} in a browser. Ctrl-C ends it.")
            page.wait()
        return
    for question in arguments.questions or _questions_from_input():
        try:
            print(f"{comparison.ask(question, **arguments.asking)}\n")
        except ValueError as error:
            if arguments.questions or not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)


def _questions_from_input() -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, ask for each until an empty one."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history; not on Windows
    print("Ask a question. An empty line or Ctrl-D ends.", file=sys.stderr)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            yield question


def locate(argv: list[str]) -> None:
    """Search for the best location to edit."""
    from ..engine.distributed import leave_group

    rank = leave_group()  # before anything looks at the group
    from .arguments import parse_locate

    arguments = parse_locate(argv)
    from ..workflows.locate import run_location_search

    is_shown = rank == 0 and not arguments["args"].disable_tqdm
    found = run_location_search(**arguments, show_progress=is_shown)
    if rank == 0:
        print(f"{found}\n\nSaved to {arguments['args'].output_dir}: train with --location best.json in it.")


def baselines(argv: list[str]) -> None:
    """Compare ways to edit on the same edits."""
    from .arguments import parse_baselines

    arguments = parse_baselines(argv)
    from ..reporting.baselines import baselines_to_markdown
    from ..workflows.baselines import run_baselines

    print(baselines_to_markdown(run_baselines(**arguments), arguments["columns"]))


GGUF_FLAGS = ("tensor_type", "base_model", "tolerance")
CHECKPOINT_FLAGS = ("link", "revision")


def merge(argv: list[str]) -> None:
    """Merge adapters into a model on disk without loading it: into a new folder or GGUF file, or in place."""
    usage = "BASE ADAPTER... OUT [flags]\nMODEL.gguf ADAPTER... OUT.gguf [flags]\n--in_place MODEL ADAPTER... [flags]"
    parser = CommandParser("merge", usage, str(merge.__doc__), epilog=DASHES)
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="Model (folder, GGUF file or name on the Hub), adapters, result.",
    )
    parser.add_argument("--in_place", action="store_true", help="Change MODEL's own files; `locft detach` undoes it.")
    parser.add_argument("--weights", nargs="+", type=float, help="One factor per adapter. Give it after the paths.")
    parser.add_argument("--scale", type=float, help="Strength of the deltas; replaces the adapters' own scale.")
    parser.add_argument("--link", choices=["auto", "hard", "copy"], help="How unedited weight files get to OUT.")
    parser.add_argument("--revision", help="Branch, tag or commit of a base model on the Hub.")
    parser.add_argument("--force", action="store_true", help="Merge even if an adapter was trained on another base.")
    parser.add_argument("--tensor_type", help="GGUF: type of the edited tensors: F16, BF16, F32 or Q8_0.")
    parser.add_argument("--base_model", help="GGUF: the model that was trained on, to compare a quantized file with.")
    parser.add_argument("--tolerance", type=float, help="GGUF: largest relative distance from the base model.")
    options = parser.parse_args(argv)
    paths, how = options.paths, {name: getattr(options, name) for name in ("weights", "scale", "force")}
    is_gguf = paths[0].endswith(".gguf")
    others = (*(CHECKPOINT_FLAGS if is_gguf or options.in_place else ()), *(() if is_gguf else GGUF_FLAGS))
    unused = " or ".join(f"--{name}" for name in others if getattr(options, name) is not None)
    if options.in_place and (unused or len(paths) < 2):
        parser.error(f"--in_place takes MODEL ADAPTER...{', and no ' + unused if unused else ''}")
    if unused:
        parser.error(f"a merge into a {'GGUF file' if is_gguf else 'folder'} takes no {unused}")
    if len(paths) < 2 + (not options.in_place):
        parser.error("expected BASE, one or more adapters, and OUT; to change the base itself: --in_place")
    from ..merging import merge_checkpoint, merge_gguf, merge_gguf_in_place, merge_in_place

    if is_gguf:
        how |= {name: value for name in GGUF_FLAGS if (value := getattr(options, name)) is not None}
    if options.in_place:
        merged = merge_gguf_in_place if is_gguf else merge_in_place
        print(merged(paths[0], paths[1:], progress=True, **how))
        return
    base, *adapters, out = paths
    if is_gguf:
        print(merge_gguf(base, adapters, out, progress=True, **how))
        return
    how |= {"link": options.link or "auto", "revision": options.revision}
    print(merge_checkpoint(base, adapters, out, progress=True, **how))


def detach(argv: list[str]) -> None:
    """Undo `locft merge --in_place`: every file gets its original bytes back."""
    parser = CommandParser("detach", "MODEL [flags]", str(detach.__doc__))
    parser.add_argument("model", metavar="MODEL", help="Folder of the model, or its GGUF file.")
    parser.add_argument("--adapter", help="Take only this one of several merged adapters off.")
    options = parser.parse_args(argv)
    from ..merging import detach as detach_from
    from ..merging import detach_adapter, detach_gguf

    if options.adapter is not None:
        print(detach_adapter(options.model, options.adapter, progress=True))
        return
    print((detach_gguf if options.model.endswith(".gguf") else detach_from)(options.model, progress=True))


def history(argv: list[str]) -> None:
    """Show what was merged into a model, when, and whether it can be detached."""
    parser = CommandParser("history", "MODEL", str(history.__doc__))
    parser.add_argument("model", metavar="MODEL", help="Folder of the model, or its GGUF file.")
    options = parser.parse_args(argv)
    from ..merging import merge_history

    print("\n".join(map(str, merge_history(options.model))) or "Nothing is merged into it, as far as its files say.")


def inspect(argv: list[str]) -> None:
    """Verify an adapter folder of any PEFT method and print what it holds."""
    parser = CommandParser("inspect", "ADAPTER [flags]", str(inspect.__doc__))
    parser.add_argument("adapter", metavar="ADAPTER", help="Local adapter folder.")
    parser.add_argument("--base", help="Also verify that this base model has the tensors that the adapter needs.")
    parser.add_argument("--revision", help="Branch, tag or commit of the base model on the Hub.")
    parser.add_argument("--beside", nargs="+", metavar="ADAPTER", help="Also list prompts that these adapters edit.")
    parser.add_argument(
        "--edits",
        nargs="?",
        const=True,
        metavar="FILE",
        help="List only the edits and their ids: those that the adapter ships, or those of FILE that it learned.",
    )
    options = parser.parse_args(argv)
    if options.revision is not None and options.base is None:
        parser.error("--revision has no effect without --base")
    if options.edits is not None and (options.base or options.beside):
        parser.error("--edits lists edits and nothing else: leave out --base and --beside")
    if options.edits is not None:
        from ..adapters.shipped_edits import adapter_edits
        from ..data.edit_lists import describe_edits

        print(describe_edits(adapter_edits(options.adapter, None if options.edits is True else options.edits)))
        return
    from ..adapters.inspection import inspect_adapter

    print(inspect_adapter(options.adapter, base=options.base, revision=options.revision))
    if options.beside:
        from ..adapters.shipped_edits import find_conflicts

        print(find_conflicts([options.adapter, *options.beside]))


def scope(argv: list[str]) -> None:
    """Write the subjects of an adapter's edits beside it, or say whether a text names one of them."""
    parser = CommandParser("scope", "ADAPTER [flags]", str(scope.__doc__), epilog=DASHES)
    parser.add_argument("adapter", metavar="ADAPTER", help="Local adapter folder.")
    parser.add_argument(
        "--text", metavar="TEXT", help="Write nothing; say whether this text is in the adapter's scope."
    )
    parser.add_argument("--edits", help="Take the subjects of these edits. Default: those that the adapter ships.")
    parser.add_argument("--aliases", help="JSON file with other names of subjects: {subject: [name, ...]}.")
    parser.add_argument("--hashed", action="store_true", help="Store only hashes of the subjects.")
    options = parser.parse_args(argv)
    from ..adapters.scope import Scope, save_scope

    if options.text is not None:
        print("in scope" if Scope.load(options.adapter).matches(options.text) else "not in scope")
        return
    written = save_scope(options.adapter, options.edits, aliases=options.aliases, hashed=options.hashed)
    print(f"{len(written.subjects)} subjects in {options.adapter}{' (hashed)' if options.hashed else ''}")


def transfer(argv: list[str]) -> None:
    """Say which edits survive on a model that was fine-tuned from the adapter's base."""
    parser = CommandParser("transfer", "ADAPTER MODEL [flags]", str(transfer.__doc__), epilog=DASHES)
    parser.add_argument("adapter", metavar="ADAPTER", help="Local LocFT adapter folder.")
    parser.add_argument("model", metavar="MODEL", help="The fine-tuned model: a folder or a name on the Hub.")
    parser.add_argument("--edits", help="Ask these edits with their probes. Default: those that the adapter ships.")
    parser.add_argument("--base_model", help="The model of the training. Default: the adapter's, if it is here.")
    parser.add_argument("--output_dir", metavar="FOLDER", help="Folder for the evaluation.")
    parser.add_argument("--dtype", default="auto", help="Precision of the model. Default: its own.")
    from ..workflows import transfer_adapter

    print(transfer_adapter(**vars(parser.parse_args(argv))))


def edits(argv: list[str]) -> None:
    """Print what is understood of edits, whatever data set they are from; write them in our own form."""
    parser = CommandParser("edits", "FILE [flags]", str(edits.__doc__), epilog=DASHES)
    parser.add_argument("file", metavar="FILE", help="File, folder of files, or dataset on the Hub.")
    parser.add_argument("--output", metavar="FILE", help="Write the edits to this .jsonl file.")
    parser.add_argument(
        "--split",
        type=float,
        metavar="N",
        help="Write two files instead: N edits to train on (a share such as 0.8, or a number), and the held-out ones.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the split.")
    parser.add_argument("--language", metavar="CODE", help="Language to edit, where a record is in several.")
    parser.add_argument(
        "--on_conflict", choices=["warn", "error", "last"], default="warn", help="If a prompt has several targets."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace files that are there.")
    options = vars(parser.parse_args(argv))
    from ..workflows.edit_files import convert_edits

    print(convert_edits(options.pop("file"), **options))


def export(argv: list[str]) -> None:
    """Write an adapter in another form: for where peft_locft is not installed, or smaller."""
    parser = CommandParser("export", "ADAPTER OUT --to FORM [flags]", str(export.__doc__), epilog=DASHES)
    parser.add_argument("adapter", metavar="ADAPTER", help="Local LocFT adapter folder.")
    parser.add_argument("out", metavar="OUT", help="Folder to write; with --to weights or gguf-lora, the file.")
    parser.add_argument(
        "--to",
        required=True,
        choices=["peft", "lora", "weights", "small", "gguf-lora"],
        help="peft: same outputs without peft_locft. lora: nearest LoRA adapter. weights: only the edited weights. "
        "small: smaller LocFT adapter. gguf-lora: the whole delta as a LoRA for llama.cpp.",
    )
    parser.add_argument(
        "--base",
        help="Base model: a folder or a name on the Hub. Default: the adapter's own. "
        "gguf-lora: the GGUF file that llama.cpp loads.",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the base model on the Hub.")
    parser.add_argument("--dtype", help="Precision in which you load the base, such as bfloat16. Default: its own.")
    parser.add_argument("--rank", type=int, help="lora: rank of every module's matrices, up to 512.")
    parser.add_argument("--energy", type=float, help="lora: smallest rank that keeps this share of every delta.")
    parser.add_argument("--edits", help="lora: evaluate these edits with the adapter and with the LoRA adapter.")
    parser.add_argument("--refine", action="store_true", help="lora: then train the matrices on the edits.")
    parser.add_argument("--delta_dtype", help="small: precision of the deltas: float32, bfloat16, float16.")
    parser.add_argument("--density", type=float, help="small: share of the delta's values to keep, such as 0.2.")
    parser.add_argument("--force", action="store_true", default=None, help="Use the base even if its tensors differ.")
    parser.add_argument("--base_model", help="gguf-lora: the model that was trained on, to compare a quantized file.")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    from ..adapters.export import check_options, export_adapter

    if given.pop("refine", False):
        if given.pop("to") != "lora":
            parser.error("--refine trains a LoRA adapter: use it with --to lora")
        from ..workflows import export_refined_lora

        check_options(export_refined_lora, "lora --refine", given.keys() - {"adapter", "out"})
        print(export_refined_lora(**given))
        return
    if given["to"] != "gguf-lora":
        print(export_adapter(**given))
        return
    from ..merging import export_gguf_lora

    given.pop("to")
    check_options(export_gguf_lora, "gguf-lora", given.keys() - {"adapter", "out"})
    if "base" not in given:
        parser.error("--to gguf-lora needs --base: the GGUF file that llama.cpp loads")
    print(export_gguf_lora(**given))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "try": try_adapters,
    "locate": locate,
    "baselines": baselines,
    "merge": merge,
    "detach": detach,
    "history": history,
    "transfer": transfer,
    "scope": scope,
    "inspect": inspect,
    "edits": edits,
    "export": export,
}

if __name__ == "__main__":
    sys.exit(main())

"""Slips of the command line: what was probably meant by a word that is no flag, no command or no choice."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

# names that other tools give to what our flags do; only suggested, never accepted
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "adapter": ("resume_from_adapter",),
    "adapter_name_or_path": ("adapter", "resume_from_adapter"),
    "base": ("base_model_name_or_path", "model_name_or_path"),
    "base_model": ("base_model_name_or_path", "model_name_or_path"),
    "batch_size": ("per_device_train_batch_size", "max_tokens_per_forward"),
    "bs": ("per_device_train_batch_size",),
    "checkpoint": ("resume_from_checkpoint", "adapter"),
    "cpu": ("use_cpu",),
    "data": ("edits",),
    "data_path": ("edits",),
    "dataset": ("edits",),
    "dataset_name": ("edits",),
    "device": ("use_cpu",),
    "edit": ("edits",),
    "epoch": ("num_train_epochs",),
    "epochs": ("num_train_epochs",),
    "eval_every": ("evaluate_every",),
    "file": ("edits",),
    "input": ("edits",),
    "layer": ("layers", "layers_to_transform"),
    "layers": ("layers_to_transform",),
    "limit": ("num_edits",),
    "lr": ("learning_rate",),
    "max_edits": ("num_edits",),
    "metrics": ("protocols", "score"),
    "m": ("model_name_or_path",),
    "model": ("model_name_or_path",),
    "model_name": ("model_name_or_path",),
    "model_path": ("model_name_or_path",),
    "module": ("modules", "target_modules"),
    "modules": ("target_modules",),
    "n": ("num_edits",),
    "name": ("model_name_or_path",),
    "num_epochs": ("num_train_epochs",),
    "o": ("output_dir",),
    "out": ("output_dir",),
    "output": ("output_dir",),
    "output_path": ("output_dir",),
    "peft": ("peft_config",),
    "precision": ("dtype",),
    "quiet": ("disable_tqdm",),
    "resume": ("resume_from_checkpoint", "resume_from_adapter"),
    "rewrite": ("edits",),
    "save_dir": ("output_dir",),
    "save_path": ("output_dir",),
    "target": ("target_modules", "to"),
    "template": ("chat_template",),
    "torch_dtype": ("dtype",),
    "train_file": ("edits",),
    "train_batch_size": ("per_device_train_batch_size",),
    "yaml": ("config",),
}
# flags that are of one command only
FLAGS_OF: dict[str, tuple[str, ...]] = {
    "train": (
        "evaluate_every",
        "forget",
        "keep_reliability",
        "location",
        "recipe",
        "resume_from_adapter",
        "ship_edits",
    ),
    "evaluate": ("adapter", "base_model_name_or_path", "protocols", "tasks"),
    "locate": ("learning_rates", "modules", "layers", "score", "stride"),
    "baselines": ("columns", "methods", "num_seeds", "num_tuning_edits", "tuning_edits"),
    "merge": ("base_model", "in_place", "link", "tensor_type", "tolerance", "weights"),
    "inspect": ("beside",),
    "export": ("density", "energy", "rank", "to"),
}
OTHER_COMMANDS = {
    "benchmark": "baselines",
    "convert": "export",
    "edit": "train",
    "eval": "evaluate",
    "finetune": "train",
    "fit": "train",
    "info": "inspect",
    "search": "locate",
    "show": "inspect",
    "test": "evaluate",
    "undo": "detach",
    "unmerge": "detach",
    "update": "train",
}
FLAG = re.compile(r"--[\w-]+|-[a-zA-Z]\w*")
CHOICES = re.compile(r"invalid choice: '?(?P<found>[^']*?)'? \(choose from (?P<choices>.*)\)")


def nearest_flag(word: str, flags: Collection[str]) -> str | None:
    """Return the flag, without dashes, that a word may mean; None if there is none."""
    name = word.partition("=")[0].lstrip("-").replace("-", "_").casefold()
    meant = [flag for flag in OTHER_NAMES.get(name, ()) if flag in flags]
    return next(iter(meant or difflib.get_close_matches(name, flags, n=1)), None)


def nearest_command(word: str, commands: Iterable[str]) -> str | None:
    """Return the command that a word may mean; None if there is none."""
    near = difflib.get_close_matches(word, list(commands), n=1)
    return near[0] if near else OTHER_COMMANDS.get(word)


def unknown_words(words: Sequence[str], option_strings: Collection[str]) -> list[list[str]]:
    """Return the flags among the words that are none of a parser, each with the words that follow as its values."""
    unknown: list[list[str]] = []
    is_value_of_unknown = False
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        if FLAG.fullmatch(name):
            is_value_of_unknown = name not in option_strings
            if is_value_of_unknown:
                unknown.append([word])
        elif is_value_of_unknown:
            unknown[-1].append(word)
    return unknown


def hints(words: Iterable[str], command: str, flags: Collection[str]) -> str:
    """Return sentences about words that are no flags of a command; empty without an idea.

    Args:
        words: those words.
        command: after `locft`.
        flags: of the command, without dashes.
    """
    meant, said = [], []
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        elsewhere = [other for other, theirs in FLAGS_OF.items() if name in theirs and other != command]
        near = nearest_flag(word, flags)
        if not word.startswith("-"):
            said += (
                [f"A value needs a flag before it, such as --edits {word}."] if "model_name_or_path" in flags else []
            )
        elif elsewhere and (near is None or name not in OTHER_NAMES):
            said.append(f"--{name} is a flag of `locft {elsewhere[0]}`.")
        elif near is not None:
            meant.append(f"--{near}")
    return " ".join([*([f"Did you mean {', '.join(dict.fromkeys(meant))}?"] if meant else []), *said])


def hint_at_choice(message: str) -> str:
    """Return a question about a choice that argparse found wrong; empty without an idea."""
    found = CHOICES.search(message)
    choices = [] if found is None else re.findall(r"[^\s',]+", found["choices"])
    near = difflib.get_close_matches("" if found is None else found["found"], choices, n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else ""

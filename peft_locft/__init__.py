"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT, and does nothing else.
"""

from ._version import __version__
from .adapter_folder import AdapterSummary, inspect_adapter, save_adapter
from .edits import Edit, Probe, edits_sha256, read_edits
from .encoding import encode_edits, encode_prompts
from .in_place import detach, merge_in_place
from .recipe import BreadthFirstConfig
from .stream_merge import MergeSummary, merge_checkpoint
from .trainer import BreadthFirstTrainer
from .training_run import train_edits
from .tuner import LocFTConfig, LocFTModel

__all__ = [
    "AdapterSummary",
    "BreadthFirstConfig",
    "BreadthFirstTrainer",
    "Edit",
    "LocFTConfig",
    "LocFTModel",
    "MergeSummary",
    "Probe",
    "__version__",
    "detach",
    "edits_sha256",
    "encode_edits",
    "encode_prompts",
    "inspect_adapter",
    "merge_checkpoint",
    "merge_in_place",
    "read_edits",
    "save_adapter",
    "train_edits",
]

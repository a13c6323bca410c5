"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT, and does nothing else.
"""

from ._version import __version__
from .adapter_folder import AdapterSummary, inspect_adapter, save_adapter
from .edits import Edit, Probe, edits_sha256, read_edits
from .encoding import encode_edits, encode_prompts
from .evaluation import EditEvaluator, evaluate_edits
from .evaluation_callback import EvaluationCallback
from .evaluation_config import EvaluationConfig
from .evaluation_report import EvaluationReport
from .evaluation_run import evaluate_model
from .harness import evaluate_on_tasks
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
    "EditEvaluator",
    "EvaluationCallback",
    "EvaluationConfig",
    "EvaluationReport",
    "LocFTConfig",
    "LocFTModel",
    "MergeSummary",
    "Probe",
    "__version__",
    "detach",
    "edits_sha256",
    "encode_edits",
    "encode_prompts",
    "evaluate_edits",
    "evaluate_model",
    "evaluate_on_tasks",
    "inspect_adapter",
    "merge_checkpoint",
    "merge_in_place",
    "read_edits",
    "save_adapter",
    "train_edits",
]

"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT, and does nothing else.
"""

from ._version import __version__
from .tuner import LocFTConfig, LocFTModel

__all__ = ["LocFTConfig", "LocFTModel", "__version__"]

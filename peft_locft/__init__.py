"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT. Names are loaded when they are first used.
"""

import lazy_loader

from ._registration import register_with_peft

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_peft()

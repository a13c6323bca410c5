"""Text and token ids: edits and where they come from, their encoding, variants of them, retained facts, leaks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

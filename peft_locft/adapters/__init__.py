"""An adapter folder: saved whole, checked before it is believed, described, exported, shared."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

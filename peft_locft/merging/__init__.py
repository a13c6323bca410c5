"""Other people's checkpoints: adapters merged on disk, into a new folder or in place, and detached again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

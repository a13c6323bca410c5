"""A number: what is asked about edits, how it is scored, with which interval, and the report of it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

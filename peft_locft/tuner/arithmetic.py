"""The arithmetic of an edited weight. It is in `io`, so that a merge on disk need not load PEFT."""

from ..io.arithmetic import compose_weight, tensor_sha256

__all__ = ["compose_weight", "tensor_sha256"]

"""How many tokens a micro-batch should have, given the free memory; and how much a job used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from .tail import Tail

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MOST_TOKENS = 8192  # more tokens do not make an accelerator faster
# a CPU is as fast with few tokens, and this leaves memory to others
CPU_BYTES = 208 * 2**20
FEWEST_TOKENS_ON_CPU = 256


def free_memory(device: torch.device) -> int:
    """Return the number of free bytes on a device."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return torch.accelerator.get_memory_info(device)[0]


@dataclass
class Usage:
    """What a job used; filled when it ends.

    Attributes:
        seconds: duration.
        processor_seconds: of all threads of this process.
        peak_bytes: largest memory at one time: of this process on a CPU, the model included; else what torch
            allocated on the device.
    """

    seconds: float = 0.0
    processor_seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured_usage(device: torch.device) -> Iterator[Usage]:
    """Measure what the work inside uses; on a CPU, memory is looked at every 50 ms."""
    usage, ended = Usage(), threading.Event()
    process, on_cuda = psutil.Process(), device.type == "cuda"

    def watch() -> None:
        while True:
            usage.peak_bytes = max(usage.peak_bytes, int(process.memory_info().rss))
            if ended.wait(0.05):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        watcher.start()
    begun, begun_processor = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - begun
        usage.processor_seconds = time.process_time() - begun_processor
        ended.set()
        if on_cuda:
            usage.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            watcher.join()


def bytes_per_token(tail: Tail, head: nn.Module | None, share_scored: float) -> int:
    """Estimate the number of bytes that a forward stores for its backward, per token.

    Args:
        tail: the layers that run; the input and output of each of their matrices count.
        head: the output embedding; each scored token has a row of logits in float32.
        share_scored: the share of the tokens that are scored.
    """
    stored = 0.0
    for layer in tail.layers[tail.first :]:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                stored += sum(parameter.shape[-2:]) * parameter.itemsize
    vocabulary_size = max((parameter.shape[0] for parameter in head.parameters()), default=0) if head else 0
    return max(1, int(stored + share_scored * 4 * vocabulary_size))


def fitting_tokens(tail: Tail, head: nn.Module | None, share_scored: float, device: torch.device) -> int:
    """Return the number of tokens for a micro-batch: as many as make it faster, in half of the free memory."""
    per_token = bytes_per_token(tail, head, share_scored)
    most = max(FEWEST_TOKENS_ON_CPU, CPU_BYTES // per_token) if device.type == "cpu" else MOST_TOKENS
    return max(1, min(most, MOST_TOKENS, free_memory(device) // 2 // per_token))


def run_halving(run: Callable[[int], Result], max_tokens: int, *, smallest: int, option: str) -> tuple[Result, int]:
    """Call `run` with a number of tokens; call it again with half of them whenever memory runs out.

    accelerate's `find_executable_batch_size` does the same, but collects garbage at the start of every call (0.15 s
    each, and every training step is a call), and retries while the failed call's tensors are still referenced.

    Args:
        run: takes the largest number of tokens in one forward; each call starts from the beginning.
        max_tokens: the first number to try.
        smallest: the smallest number to try; running out of memory there is an error.
        option: the name of the number, for the warning.

    Returns:
        The result, and the number of tokens that fitted.
    """
    while True:
        try:
            return run(max_tokens), max_tokens
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or max_tokens <= smallest:
                raise
        max_tokens = max(max_tokens // 2, smallest)
        logger.warning("Out of memory: %s is %d from here on.", option, max_tokens)

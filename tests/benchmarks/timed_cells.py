"""Run benchmark cells under one time limit, in processes of their own, and keep the rows that a stopped one has found.

A cell is a generator of rows (plain data), at the top level of a module. A process needs seconds for its imports, so
the next one starts while a cell runs.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

DONE, FAILED, STOPPED, SKIPPED = "done", "failed", "stopped", "skipped"
Row = dict[str, Any]
Outcome = tuple[list[Row], str, str | None]  # the rows of a cell, its status, and the reason if that is not "done"


@dataclass(frozen=True)
class Cell:
    """What one process measures.

    Args:
        name: unique.
        function: yields rows.
        arguments: of the function, by name.
        most_seconds: it is stopped after that.
        least_seconds: it is not started with less time than that.
    """

    name: str
    function: Callable[..., Iterator[Row]]
    arguments: dict[str, Any] = field(default_factory=dict)
    most_seconds: float = 60.0
    least_seconds: float = 5.0


class Worker:
    """A process that has imported what the main module imports, and waits for cells."""

    def __init__(self) -> None:
        # never a fork: a process that inherits CUDA's state cannot use it
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,))
        self.process.start()
        theirs.close()
        self.is_ready = False

    def run(self, cell: Cell, until: float) -> Outcome:
        """Run a cell; return what came of it.

        Args:
            cell: what to run.
            until: value of `time.monotonic()` at which nothing may run any more.
        """
        rows: list[Row] = []
        try:
            if not self.is_ready and not self.connection.poll(max(0.0, until - time.monotonic())):
                return rows, STOPPED, "its process was still importing when the time was over"
            if not self.is_ready:
                self.connection.recv()
                self.is_ready = True
            begun = time.monotonic()
            until = min(until, begun + cell.most_seconds)
            self.connection.send((cell.function, cell.arguments))
            while self.connection.poll(max(0.0, until - time.monotonic())):
                is_row, content = self.connection.recv()
                if not is_row:
                    return rows, DONE if content is None else FAILED, content
                rows.append(content)
            return rows, STOPPED, f"after its {time.monotonic() - begun:.0f} s; {len(rows)} rows were ready"
        except (EOFError, OSError):
            self.process.join(timeout=10)
            return rows, FAILED, f"its process ended with exit code {self.process.exitcode}"

    def close(self, is_idle: bool = True) -> None:
        """End the process: the device's memory is free afterwards."""
        self.connection.close()
        if is_idle:  # it sees that nobody asks any more, and cleans up
            self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


def _work(connection: Any) -> None:
    connection.send((False, None))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the other side has ended
            return
        try:
            for row in function(**arguments):
                connection.send((True, row))
            connection.send((False, None))
        except Exception as error:
            traceback.print_exc()
            connection.send((False, one_line(error)))


def one_line(error: BaseException) -> str:
    """Return the type and the beginning of the text of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def run_cells(
    cells: Sequence[Cell], until: float, *, share_process: bool, after_each: Callable[[list[Row]], None]
) -> list[Row]:
    """Run cells one after the other; return for each its name, status, reason, seconds and rows.

    Args:
        cells: what to run. One that fails, or for which no time is left, does not end the others.
        until: value of `time.monotonic()` at which the last cell is stopped.
        share_process: run all in one process, for cells so small that the imports would take most of the time.
        after_each: gets all results so far, so that a killed run leaves them behind.
    """
    results: list[Row] = []
    workers: list[Worker] = []  # the one at work, and the one that waits
    try:
        for number, cell in enumerate(cells):
            begun = time.monotonic()
            left = until - begun
            if left < cell.least_seconds:
                why = f"{max(left, 0):.0f} s were left, and it needs {cell.least_seconds:.0f}"
                outcome: Outcome = ([], SKIPPED, why)
            else:
                print(f"{left:.0f} s left: {cell.name}", file=sys.stderr, flush=True)
                workers = workers or [Worker()]
                if not share_process and number < len(cells) - 1:
                    workers.append(Worker())
                outcome = workers[0].run(cell, until)
                is_idle = outcome[1] == DONE
                if not (share_process and is_idle):
                    workers.pop(0).close(is_idle)
            rows, status, reason = outcome
            seconds = time.monotonic() - begun
            results.append({"cell": cell.name, "status": status, "reason": reason, "seconds": seconds, "rows": rows})
            after_each(results)
    finally:
        for worker in workers:
            worker.close()
    return results

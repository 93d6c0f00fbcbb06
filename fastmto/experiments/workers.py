"""Runs in processes of their own, with one progress bar and a Ctrl-C that keeps what is finished.

A job is a function at module level. It calls `tick` often: that is how its progress is seen and
where it stops when the command was interrupted.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any

#: Seconds between two looks at the progress.
_LOOK = 0.2


class Interrupted(Exception):
    """The command was interrupted while this job ran."""


class _Worker:
    """What a process knows of the command: steps made by all, and whether to stop."""

    steps: Any = None
    stop: Any = None


def _begin(steps: Any, stop: Any, threads: int | None) -> None:
    # The command hears Ctrl-C and tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.steps, _Worker.stop = steps, stop
    # Counted in the balancers' `stats`; lines of many processes would tear up the bar.
    warnings.simplefilter("ignore", RuntimeWarning)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def tick(steps: int = 1) -> None:
    """Count steps of this job; in a process that is no worker nothing happens.

    Raises:
        Interrupted: the command was.
    """
    if _Worker.steps is None:
        return
    parent = parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # the command was killed: nobody needs this process any more
    if _Worker.stop.is_set():
        raise Interrupted
    with _Worker.steps.get_lock():
        _Worker.steps.value += steps


class Workers:
    """Fresh processes for jobs; a context manager.

    Leaving it, by Ctrl-C or otherwise, ends the running jobs at their next `tick` and drops
    the waiting ones.

    Args:
        n: of processes.
        threads: of torch in each; None leaves torch's choice.
    """

    def __init__(self, n: int, threads: int | None) -> None:
        context = get_context("spawn")
        self._steps = context.Value("q", 0)
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(
            n, context, initializer=_begin, initargs=(self._steps, self._stop, threads)
        )

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start a job, or let it wait for a process."""
        # New processes inherit this: a Ctrl-C while they import must not end in their tracebacks.
        if threading.current_thread() is not threading.main_thread():  # which has no Ctrl-C
            return self._pool.submit(job, *arguments)
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self._pool.submit(job, *arguments)
        finally:
            signal.signal(signal.SIGINT, heard)

    def finished(
        self, jobs: Iterable[Future[Any]], on_progress: Callable[[int], None]
    ) -> Iterator[Future[Any]]:
        """The jobs as they end; meanwhile `on_progress` hears of the steps made by all."""
        waiting = set(jobs)
        while waiting:
            done, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
            on_progress(self._steps.value)
            yield from done

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

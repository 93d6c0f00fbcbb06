"""How `bench/gpu.py` takes time: CUDA events around graphs of many calls, medians of rounds.

`CudaTimer` is what the figures come from. `CpuTimer` has the same methods on the CPU, so that the
whole bench runs without a GPU; its figures mean nothing.

A contestant takes the number of the set of buffers to work on. Every call works on the next of
several sets, which together are several times as large as the last cache.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import TritonError

import fastmto

Contestant = Callable[[int], object]
TrainingStep = Callable[..., object]
#: A line of the results.
Row = dict[str, Any]

#: Rounds of a measurement, whose median counts.
ROUNDS = 15
#: Rounds of a contestant that takes longer than `SLOW` seconds a round, which also bounds the calls
#: that Python issues.
SLOW_ROUNDS, SLOW = 5, 0.05
#: Seconds of calls a round at least.
ROUND = 2e-3
#: Calls shorter than this are launched as a graph: else the host's time would be measured too.
GRAPHED_BELOW = 2e-3
#: Calls of a graph at most.
MOST_CALLS = 2000
#: Bytes of all sets over bytes of the last cache.
CACHES = 4


class CpuTimer:
    """`time.perf_counter` around plain calls; graphs are what they stand for."""

    #: Bytes of the last cache that the sets of buffers must outgrow.
    cache_bytes = 0

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def free_bytes(self) -> int | None:
        """Memory that can be had; None where nobody counts it."""
        return None

    def n_sets(self, touched_bytes: int) -> int:
        """Sets of buffers that a pass over `touched_bytes` needs to leave the last cache."""
        return max(2, -(-CACHES * self.cache_bytes // touched_bytes))

    def seconds(self, contestant: Contestant, sets: int) -> float:
        """Seconds that a call takes on the device; the median of some rounds."""
        for i in range(sets):
            contestant(i)
        return self.issued(contestant, sets)

    def issued(self, contestant: Contestant, sets: int, calls: int = 4) -> float:
        """Seconds that a call takes when Python issues `calls` one after the other."""
        start = time.perf_counter()
        for i in range(calls):
            contestant(i % sets)
        return (time.perf_counter() - start) / calls

    def lap(self, step: Callable[[], object], steps: int) -> float:
        """Seconds a step of `steps` in a row."""
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps

    def captured(self, step: TrainingStep, batch: Sequence[Tensor]) -> TrainingStep:
        """A step that takes a batch, as one graph."""
        del batch
        return step

    def graphed(self, optimizer: Any, compute_losses: Callable[..., Any]) -> TrainingStep:
        """`fastmto.GraphedStep`; here the steps it stands for."""

        def step(*batch: Tensor) -> None:
            optimizer.zero_grad()
            optimizer.backward(compute_losses(*batch))
            optimizer.step()

        return step

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """What `work` allocates at most beside what is there already; None where nobody counts."""
        work()
        return None

    def release(self) -> None:
        """Give back memory that nothing uses."""


class CudaTimer(CpuTimer):
    """CUDA events on the current device, whose current stream becomes one of its own: what is
    captured must have run on the same stream before, and the default one cannot be captured."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream(self.device)
        torch.cuda.set_stream(self.stream)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def free_bytes(self) -> int | None:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def seconds(self, contestant: Contestant, sets: int) -> float:
        for i in range(sets):
            contestant(i)
        torch.cuda.synchronize()
        once = self._events(lambda: contestant(0))
        calls = sets

        def work() -> None:
            for i in range(calls):
                contestant(i % sets)

        run: Callable[[], object] = work
        if once < GRAPHED_BELOW:
            run = self._graph_of(work)
            # What launching the graph itself costs must not show.
            calls = min(MOST_CALLS, sets * (int(ROUND / self._events(run)) + 1))
            run = self._graph_of(work)
        rounds = ROUNDS if self._events(run) < SLOW else SLOW_ROUNDS
        return statistics.median(self._events(run) for _ in range(rounds)) / calls

    def _graph_of(self, work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        graph.replay()  # the first launch also uploads it
        return graph.replay

    def issued(self, contestant: Contestant, sets: int, calls: int = 100) -> float:
        calls = max(3, min(calls, int(SLOW / self._events(lambda: contestant(0)))))
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(calls):
            contestant(i % sets)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    def lap(self, step: Callable[[], object], steps: int) -> float:
        def work() -> None:
            for _ in range(steps):
                step()

        return self._events(work) / steps

    def captured(self, step: TrainingStep, batch: Sequence[Tensor]) -> TrainingStep:
        inputs = [x.clone() for x in batch]
        for _ in range(3):
            step(*inputs)
        replay_graph = self._graph_of(lambda: step(*inputs))

        def replay(*batch: Tensor) -> None:
            for static, x in zip(inputs, batch, strict=True):
                static.copy_(x, non_blocking=True)
            replay_graph()

        return replay

    def graphed(self, optimizer: Any, compute_losses: Callable[..., Any]) -> TrainingStep:
        return fastmto.GraphedStep(optimizer, compute_losses)

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def release(self) -> None:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        gc.freeze()  # every capture collects garbage, which is slow among all that torch holds

    def _events(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


class Progress:
    """A bar by tqdm where it is installed, else a line a piece of work, on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        # In a log file every redrawing of the bar is another line.
        interval = 0.2 if sys.stderr.isatty() else 5.0
        self.bar = tqdm(total=total, unit="case", mininterval=interval)

    def at(self, name: str) -> None:
        """Says what is next."""
        if self.bar is not None:
            self.bar.set_description(name)
        else:
            print(f"{self.done + 1}/{self.total} {name}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def say(self, line: str) -> None:
        """A line between those of the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


#: What may go wrong in one contestant, its compilers' errors included, without ending the others.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TritonError,
    TypeError,
    ValueError,
)


def in_a_line(error: Exception) -> str:
    """What went wrong, for a table."""
    return (str(error).splitlines() or [type(error).__name__])[0]

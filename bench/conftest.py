"""What the kernel benches share: rotation of buffers, turns, this machine's memory bandwidth.

Bandwidth is measured beside the contestants, in the same process, at torch's thread count and in
the same rounds, because it swings within minutes on shared machines. It is what torch's own loops
reach: `read` is the best of `sum` and `dot`, `update` (bytes read plus bytes written) the best of
`copy_`, in-place `mul_` and in-place `add_`.

Every call works on the next of several sets of buffers, which together are larger than the last
cache (as the system reports it; capped at 1 GiB, since virtual machines report the host's).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

#: A contestant takes the number of the set of buffers to work on.
Contestant = Callable[[int], object]

ROUNDS = 15
#: Contestants slower than this sit out all but the first rounds.
SLOW = 0.2
SLOW_ROUNDS = 3
#: A turn repeats its contestant until about this many seconds have passed.
TURN = 0.01


def last_cache_bytes() -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    sizes = [64 << 10]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")))
    return max(sizes) << 10


def rotation_bytes() -> int:
    """Bytes that the sets of buffers must add up to."""
    return min(last_cache_bytes() * 5 // 4, 1 << 30)


def n_sets(bytes_per_set: int) -> int:
    return max(2, -(-rotation_bytes() // bytes_per_set))


@dataclass
class Times:
    """Seconds a call of every contestant, a list entry a round (None: sat out)."""

    seconds: dict[str, list[float | None]]

    def best(self, name: str) -> float:
        return min(t for t in self.seconds[name] if t is not None)

    def ratio(self, slow: str, fast: str) -> float:
        """Median over rounds of time(slow) / time(fast)."""
        rounds = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in rounds if a is not None and b is not None)


def take_turns(contestants: dict[str, Contestant], sets: int) -> Times:
    """Time the contestants turn by turn, so that a slow moment of the machine hits them alike."""
    calls, times = {}, Times({name: [] for name in contestants})
    for name, contestant in contestants.items():
        contestant(0)
        start = time.perf_counter()
        contestant(1)
        calls[name] = time.perf_counter() - start
    at = 0
    for r in range(ROUNDS):
        for name in contestants if r % 2 == 0 else reversed(contestants):
            if calls[name] > SLOW and r >= SLOW_ROUNDS:
                times.seconds[name].append(None)
                continue
            repeats = max(1, round(TURN / calls[name]))
            start = time.perf_counter()
            for _ in range(repeats):
                contestants[name](at % sets)
                at += 1
            times.seconds[name].append((time.perf_counter() - start) / repeats)
    return times


class Bandwidth:
    """Contestants that do nothing but move memory: three vectors (P,) of float32 a set."""

    def __init__(self, vectors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.vectors = vectors
        self.numel = vectors[0][0].numel()

    def contestants(self) -> dict[str, Contestant]:
        v = self.vectors
        return {
            "read_sum": lambda i: v[i][0].sum(),
            "read_dot": lambda i: torch.dot(v[i][0], v[i][1]),
            "copy": lambda i: v[i][0].copy_(v[i][1]),
            "scale": lambda i: v[i][0].mul_(1.0),
            "add": lambda i: v[i][0].add_(v[i][1], alpha=0.0),
        }

    def fraction(self, times: Times, n_bytes: float, against: str) -> float:
        """Median over rounds of the speed of "ours", n_bytes a call, over the round's bandwidth:
        the bandwidth of a shared machine is another one from round to round."""
        reads, updates = {"read_sum": 1, "read_dot": 2}, {"copy": 2, "scale": 2, "add": 3}
        vectors = reads if against == "read" else updates
        fractions = []
        for r, ours in enumerate(times.seconds["ours"]):
            rates = [
                n * 4 * self.numel / t
                for name, n in vectors.items()
                if (t := times.seconds[name][r]) is not None
            ]
            if ours is not None and rates:
                fractions.append(n_bytes / ours / max(rates))
        return statistics.median(fractions)

    def gigabytes_per_second(self, times: Times) -> dict[str, float]:
        """read: bytes read; update: bytes read plus bytes written. Best rounds."""
        size = 4e-9 * self.numel
        read = max(size / times.best("read_sum"), 2 * size / times.best("read_dot"))
        update = max(
            2 * size / times.best("copy"),
            2 * size / times.best("scale"),
            3 * size / times.best("add"),
        )
        return {"read_GB/s": read, "update_GB/s": update}

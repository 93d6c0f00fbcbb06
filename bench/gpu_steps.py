"""Whole training steps of the models of PUB's experiments, beside plain training.

Sizes of the paper's code: T = 2, embedding 128, experts 512 -> 256, towers 128 -> 64; MMOE with 8
experts, PLE with 4 shared ones and 4 a task. Random data of the shape of its own, 63 dense columns
and 16 fields, with 496 values in all as Census-Income's fields have. Batch normalisation and
dropout are left out: forward and backward are shorter without them, so that the share of
everything else is not flattered.

The contestants, each on its own copy of the model, take turns within a round:

    passes, T_passes   forward and one backward of the summed losses, or T of one loss each: what a
                       step is made of before anything is done with the gradients
    adam               equal weights: passes and torch.optim.Adam(fused=True)
    pub_1, pub_10      fastmto.PUB with a search of weights at every step, or every 10th
    nashmtl_1, _10     Nash-MTL before the same fused Adam
    ..._graph          the same as CUDA graphs
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_timer import FAILURES, CpuTimer, Row, TrainingStep, in_a_line
from torch import Tensor
from torch.nn import functional

import fastmto
from fastmto.experiments.models import MMOE, PLE
from fastmto.experiments.models.base import MultiTaskModel, count
from fastmto.experiments.optimizers import Balanced

BATCH = 4096
FIELD_SIZES = (31,) * 16
N_DENSE = 63
#: Sizes of the paper's code by model.
SIZES: dict[str, dict[str, Any]] = {
    "mmoe": {
        "embedding": 128, "n_experts": 8, "expert_widths": (512, 256), "tower_widths": (128, 64),
    },
    "ple": {
        "embedding": 128, "extraction_widths": (512, 256), "n_shared_experts": 4,
        "n_task_experts": 4, "tower_widths": (128, 64),
    },
}  # fmt: skip
MODELS: dict[str, type[MultiTaskModel]] = {"mmoe": MMOE, "ple": PLE}
#: Batches that steps go round.
BATCHES = 4
#: Steps from one search to the next where there is not one at every step, and of a turn.
CYCLE = 10
ROUNDS = 15
LR = 1e-3


def make_model(name: str, sizes: dict[str, Any], device: torch.device) -> MultiTaskModel:
    torch.manual_seed(0)
    return MODELS[name](N_DENSE, FIELD_SIZES, [1, 1], **sizes).to(device)


def make_batches(batch: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Random rows: dense (B, 63), ids (B, 16), labels (B, 2) as rare as Census-Income's."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *FIELD_SIZES]).cumsum(0)[:-1]
    sizes = torch.tensor(FIELD_SIZES)
    batches: list[tuple[Tensor, ...]] = []
    for _ in range(BATCHES):
        dense = torch.rand(batch, N_DENSE, generator=generator)
        ids = (torch.rand(batch, len(sizes), generator=generator) * sizes).long() + offsets
        labels = torch.rand(batch, 2, generator=generator) < torch.tensor([0.06, 0.43])
        batches.append((dense.to(device), ids.to(device), labels.float().to(device)))
    return batches


def losses_of(model: MultiTaskModel) -> Callable[..., list[Tensor]]:
    """batch -> the two losses."""

    def losses(dense: Tensor, ids: Tensor, labels: Tensor) -> list[Tensor]:
        return [
            functional.binary_cross_entropy_with_logits(logits, labels[:, i])
            for i, logits in enumerate(model(dense, ids))
        ]

    return losses


def _summed(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def passes(model: MultiTaskModel) -> TrainingStep:
    compute = losses_of(model)

    def step(*batch: Tensor) -> None:
        model.zero_grad()
        _summed(compute(*batch)).backward()

    return step


def t_passes(model: MultiTaskModel) -> TrainingStep:
    compute = losses_of(model)
    shared, heads = model.shared_parameters(), model.task_parameters()

    def step(*batch: Tensor) -> None:
        losses = compute(*batch)
        for i, (loss, head) in enumerate(zip(losses, heads, strict=True)):
            torch.autograd.grad(loss, [*shared, *head], retain_graph=i + 1 < len(losses))

    return step


def adam(model: MultiTaskModel, capturable: bool) -> TrainingStep:
    """Equal weights."""
    compute = losses_of(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True, capturable=capturable)

    def step(*batch: Tensor) -> None:
        optimizer.zero_grad()
        _summed(compute(*batch)).backward()
        optimizer.step()

    return step


def balanced(optimizer: Any, compute: Callable[..., list[Tensor]]) -> TrainingStep:
    def step(*batch: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(compute(*batch))
        optimizer.step()

    return step


def pub(model: MultiTaskModel, every: int) -> fastmto.PUB:
    return fastmto.PUB(
        model.shared_parameters(), model.task_parameters(), LR, update_weights_every=every
    )


def nashmtl(model: MultiTaskModel, every: int) -> Balanced:
    method = fastmto.get("nashmtl", 2, update_weights_every=every)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    return Balanced(method, optimizer, model.shared_parameters(), model.task_parameters())


class Contestant:
    """A way to train, on its own copy of the model.

    Args:
        name: as above.
        model: copied.
        batches: to go round.
        timer: on the device.

    Attributes:
        peak_bytes: most that was allocated at once from before the copy to after the first steps,
            capture included; None where nobody counts.
    """

    def __init__(
        self,
        name: str,
        model: MultiTaskModel,
        batches: Sequence[tuple[Tensor, ...]],
        timer: CpuTimer,
    ) -> None:
        self.name = name
        self.batches = batches
        self.at = 0
        self.optimizer: Any = None
        self.peak_bytes = timer.peak_bytes(lambda: self._start(model, timer))

    def _start(self, model: MultiTaskModel, timer: CpuTimer) -> None:
        self.model = copy.deepcopy(model)
        method, _, option = self.name.partition("_")
        graph = option.endswith("graph")
        if method in ("passes", "T", "adam"):
            # torch wants a step count on the device in a graph, and has none on a CPU.
            capturable = graph and timer.device.type == "cuda"
            step = {
                "passes": passes,
                "T": t_passes,
                "adam": lambda m: adam(m, capturable),
            }[method](self.model)
            self.step = timer.captured(step, self.batches[0]) if graph else step
        else:
            every = int(option.removesuffix("_graph"))
            self.optimizer = {"pub": pub, "nashmtl": nashmtl}[method](self.model, every)
            compute = losses_of(self.model)
            make_step = timer.graphed if graph else balanced
            self.step = make_step(self.optimizer, compute)
        # Every kind of step is compiled and, where it is a graph, captured after that.
        for _ in range(4 * CYCLE):
            self()

    def __call__(self) -> None:
        """A step on the next batch."""
        self.step(*self.batches[self.at % len(self.batches)])
        self.at += 1

    def check(self) -> None:
        """Refuses a contestant that did not do what it says.

        Raises:
            ArithmeticError: parameters that are not finite, or searches missing.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise ArithmeticError("parameters are not finite after the first steps")
        if self.optimizer is None:
            return
        stats = self.optimizer.stats
        every = int(self.name.split("_")[1])
        searches, failed = -(-self.at // every), stats.get("held", 0) + stats.get("skipped", 0)
        if stats["searches"] != searches or failed:
            raise ArithmeticError(f"{searches} searches expected in {self.at} steps, got {stats}")


NAMES = (
    "passes", "T_passes", "adam", "pub_10", "pub_1", "nashmtl_10", "nashmtl_1", "passes_graph",
    "T_passes_graph", "adam_graph", "pub_10_graph", "pub_1_graph",
)  # fmt: skip


def measure_model(
    name: str,
    timer: CpuTimer,
    *,
    sizes: dict[str, Any] | None = None,
    batch: int = BATCH,
    rounds: int = ROUNDS,
) -> list[Row]:
    """Time the steps of all contestants on one model.

    Returns:
        A row a contestant: the case, `status` ("ok", or "failed" with a `note`), milliseconds a
        step (median of rounds), peak memory, and as medians of the ratios within rounds: the time
        over eager and over captured equal weighting, and the share of the step that is neither
        forward nor backward, which is 1 - time of its passes alone / time of the step, like for
        like (captured with captured; every 10th step has T passes where every 10th searches).
    """
    model = make_model(name, SIZES[name] if sizes is None else sizes, timer.device)
    batches = make_batches(batch, timer.device)
    shared, everything = count(model.shared_parameters()), count(model.parameters())
    rows: dict[str, Row] = {}
    field: dict[str, Contestant] = {}
    for contestant in NAMES:
        row = rows[contestant] = {
            "model": name, "batch": batch, "shared_parameters": shared,
            "task_parameters": everything - shared, "contestant": contestant, "status": "ok",
            "note": "",
        }  # fmt: skip
        try:
            made = Contestant(contestant, model, batches, timer)
            made.check()
        except FAILURES as error:
            row.update(status="failed", note=in_a_line(error))
            continue
        field[contestant] = made
        row["peak_MB"] = None if made.peak_bytes is None else made.peak_bytes / 1e6
    times: dict[str, list[float]] = {contestant: [] for contestant in field}
    for r in range(rounds):
        for contestant in field if r % 2 else reversed(field):
            times[contestant].append(timer.lap(field[contestant], CYCLE))
    for contestant, seconds in times.items():
        row = rows[contestant]
        row["ms"] = 1e3 * statistics.median(seconds)
        for base in ("adam", "adam_graph"):
            if base in times:
                row[f"over_{base}"] = _ratio(seconds, times[base])
        alone = _passes(contestant, times)
        if alone is not None:
            row["share_outside_passes"] = 1 - _ratio(alone, seconds)
    return list(rows.values())


def _ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def _passes(contestant: str, times: dict[str, list[float]]) -> list[float] | None:
    """Seconds a step of the contestant's forwards and backwards alone, by rounds; None for those
    that are nothing else."""
    parts = contestant.removesuffix("_graph").split("_")
    suffix = "_graph" if contestant.endswith("_graph") else ""
    one, several = (times.get(f"{name}{suffix}") for name in ("passes", "T_passes"))
    if parts[0] in ("passes", "T") or one is None or several is None:
        return None
    share = 0.0 if parts[0] == "adam" else 1 / int(parts[1])
    return [(1 - share) * x + share * y for x, y in zip(one, several, strict=True)]

"""Displaced copies of parameters that take the parameters' place for an evaluation.

A copy is a row of a flat buffer. For an evaluation every parameter points at its piece of a row;
afterwards it points at its own memory again, which nothing has written to: parameters are restored
bit for bit by construction, also when the evaluation raises. Models see their parameters through
the same tensors throughout; what a model keeps of their memory elsewhere (views taken outside the
closure, captured CUDA graphs) does not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from ..flat import FlatLayout, as_vector, is_dense, laid_like
from .estimators import SMALLEST_STEP

Result = TypeVar("Result")
#: Elements that `along` works on at once: two rows of them stay in a core's cache.
_CHUNK = {"cpu": 1 << 16}
_CHUNK_ELSE = 1 << 22


class Copies:
    """R displaced copies of the same parameters.

    Args:
        parameters: dense leaf tensors that require grad, float32 or float64; never written to.
        n_rows: R, copies that exist at the same time.

    Attributes:
        layouts: one a device and dtype.
        rows: a buffer (R, P) for each.

    Raises:
        ValueError: a parameter that cannot be displaced.
    """

    def __init__(self, parameters: Sequence[Tensor], n_rows: int) -> None:
        check_displaceable(parameters)
        self.parameters = list(parameters)
        self._forms = [(p.shape, p.stride(), p.dtype, p.device) for p in parameters]
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for k, p in enumerate(parameters):
            groups.setdefault((p.device, p.dtype), []).append(k)
        self._members = list(groups.values())
        self.layouts = [
            FlatLayout([cast(Parameter, parameters[k]) for k in members])
            for members in self._members
        ]
        self.rows = [layout.rows(n_rows) for layout in self.layouts]
        self.n_rows = n_rows
        self._views = [
            self._in_order([x.views(b[r]) for x, b in self._pairs()]) for r in range(n_rows)
        ]
        #: P, padding not counted.
        self.numel = sum(layout.numel for layout in self.layouts)

    def _pairs(self) -> list[tuple[FlatLayout, Tensor]]:
        return list(zip(self.layouts, self.rows, strict=True))

    def _in_order(self, grouped: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Pieces by layout -> pieces in the order of the parameters."""
        pieces: dict[int, Tensor] = {}
        for members, group in zip(self._members, grouped, strict=True):
            pieces.update(zip(members, group, strict=True))
        return [pieces[k] for k in range(len(self.parameters))]

    def fits(self, parameters: Sequence[Tensor], n_rows: int) -> bool:
        """Whether these are copies of exactly these parameters as they lie now."""
        return (
            n_rows == self.n_rows
            and len(parameters) == len(self.parameters)
            and all(p is q for p, q in zip(parameters, self.parameters, strict=True))
            and all(
                (p.shape, p.stride(), p.dtype, p.device) == form
                for p, form in zip(parameters, self._forms, strict=True)
            )
        )

    def stacked(self) -> list[Tensor]:
        """All copies of each parameter, (R, *shape)."""
        return self._in_order([layout.stacked_views(rows) for layout, rows in self._pairs()])

    def norm(self) -> float:
        """||theta||."""
        return norm([p.detach() for p in self.parameters])

    @torch.no_grad()
    def displace(self, row: int, direction: Sequence[Tensor | None], scale: float) -> None:
        """Row `row` becomes theta + scale * direction.

        Args:
            direction: shaped like the parameters; None stands for zero.
        """
        for p, view, v in zip(self.parameters, self._views[row], direction, strict=True):
            if v is None:
                view.copy_(p)
            else:
                torch.add(p, v, alpha=scale, out=view)

    @torch.no_grad()
    def displace_at_random(
        self, row: int, scale: float, seed: int, index: int, distribution: str
    ) -> None:
        """Row `row` becomes theta + scale * u, u the random direction number `index` of `seed`."""
        draws = []
        for layout, rows in self._pairs():
            generator = torch.Generator(layout.device).manual_seed((seed << 32) + index)
            vector = rows[row]
            if distribution == "rademacher":
                vector.bernoulli_(generator=generator).mul_(2).sub_(1)
            else:
                vector.normal_(generator=generator)
            draws.append(vector)
        if distribution == "sphere":
            scale *= math.sqrt(self.numel) / norm(self._views[row])
        for p, view in zip(self.parameters, self._views[row], strict=True):
            torch.add(p, view, alpha=scale, out=view)

    @torch.no_grad()
    def along(self, row: int, direction: Sequence[Tensor | None]) -> float:
        """<row - theta, direction>: how far the row really lies along the direction."""
        total = 0.0
        for p, view, v in zip(self.parameters, self._views[row], direction, strict=True):
            if v is not None:
                total += difference_along(view, p, v)
        return total

    @torch.no_grad()
    def distance(self, row: int) -> float:
        """||row - theta||."""
        return math.sqrt(
            sum(
                difference_along(view, p, None)
                for p, view in zip(self.parameters, self._views[row], strict=True)
            )
        )

    def evaluate(self, row: int, closure: Callable[[], Result]) -> Result:
        """What the closure returns with row `row` in the parameters' place, without a graph.

        Raises:
            ValueError: the closure moved a parameter.
            Exception: whatever the closure raises; the parameters are back in their place.
        """
        own = [p.data for p in self.parameters]
        views = self._views[row]
        versions = [p._version for p in self.parameters]
        try:
            for p, view in zip(self.parameters, views, strict=True):
                p.data = view
            with torch.no_grad():
                result = closure()
            moved = [
                k
                for k, (p, view) in enumerate(zip(self.parameters, views, strict=True))
                if p._version != versions[k] or p.data_ptr() != view.data_ptr()
            ]
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data
        if moved:
            raise ValueError(
                f"closure must only compute losses, but it moved shared_parameters {moved}"
            )
        return result


def check_displaceable(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that cannot be displaced.

    Raises:
        ValueError: naming the first one.
    """
    if not parameters:
        raise ValueError("shared_parameters must hold at least one parameter, got none")
    for k, p in enumerate(parameters):
        named = f"shared_parameters[{k}] (shape {tuple(p.shape)})"
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{named} must be float32 or float64 to be displaced, got {p.dtype}: steps small "
                "enough for a derivative are lost in 8 or 11 bits; keep float32 parameters and "
                "compute under torch.autocast"
            )
        if not p.is_leaf or not p.requires_grad:
            raise ValueError(f"{named} must be a leaf tensor that requires grad")
        if not is_dense(p):
            raise ValueError(f"{named} must be dense, got strides {p.stride()}")


def check_step(step: float, length: float, dtype: torch.dtype, name: str, unit: float) -> None:
    """Refuse a step below the resolution of the parameters.

    Args:
        step: h = mu ||v||.
        length: ||theta||.
        dtype: the parameters' coarsest.
        name: of the argument that decides the step.
        unit: step / the argument's value.

    Raises:
        ValueError: with the smallest usable value of the argument.
    """
    smallest = SMALLEST_STEP * torch.finfo(dtype).eps * length
    if step < smallest:
        raise ValueError(
            f"{name} must be at least {smallest / unit:.3g} here, got {step / unit:.3g}: a "
            f"displacement of {step:.3g} is below the resolution of {dtype} parameters of length "
            f"{length:.3g}"
        )


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean length of all tensors together; waits for the device."""
    return math.sqrt(sum(float(x.double()) ** 2 for x in torch._foreach_norm(list(tensors))))


def difference_along(a: Tensor, b: Tensor, v: Tensor | None) -> float:
    """<a - b, v>, or <a - b, a - b> without v, without temporaries of the tensors' size.

    Args:
        a, b: dense, of the same strides.
        v: of the same shape.
    """
    x, y = as_vector(a), as_vector(b)
    z = None if v is None else as_vector(laid_like(v, b))
    chunk = _CHUNK.get(a.device.type, _CHUNK_ELSE)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, len(x), chunk):
        difference = x[start : start + chunk] - y[start : start + chunk]
        other = difference if z is None else z[start : start + chunk]
        total += torch.dot(difference, other)
    return float(total)

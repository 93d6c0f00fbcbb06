"""Displaced copies of parameters that take the parameters' place for an evaluation.

A copy is a row of a flat buffer. For an evaluation every parameter points at its piece of a row;
afterwards it points at its own memory again, which nothing has written to: parameters are restored
bit for bit by construction, also when the evaluation raises. Models see their parameters through
the same tensors throughout; what a model keeps of their memory elsewhere (views taken outside the
closure, captured CUDA graphs) does not move.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops
from ..engine.caches import forget_weight_copies
from ..engine.flat import FlatLayout, as_vector, buffer_of, is_dense, laid_like
from .estimators import SMALLEST_STEP

Result = TypeVar("Result")
#: A vector of the shape of the parameters, in pieces; None stands for zero.
Vector = Sequence[Tensor | None]
_set_data: Callable[[Tensor, Tensor], None] = vars(torch._C.TensorBase)["data"].__set__
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
        self.parameters = parameters if isinstance(parameters, list) else list(parameters)
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
        self._scratch: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None
        (layout, *others) = self.layouts
        if not others and layout.device.type == "cpu" and len(layout) <= _CHUNK["cpu"]:
            theta, direction, difference = layout.rows(3).unbind()
            views = layout.views(theta), layout.views(direction)
            self._scratch = [theta, direction, difference], *views
        #: The dtype of the least precise parameters.
        self.coarsest = max((x.dtype for x in self.layouts), key=lambda d: torch.finfo(d).eps)
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

    def fit(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are copies of exactly these parameters as they are now."""
        return len(parameters) == len(self.parameters) and all(
            p is q and p.requires_grad and (p.shape, p.stride(), p.dtype, p.device) == form
            for p, q, form in zip(parameters, self.parameters, self._forms, strict=True)
        )

    def stacked(self) -> list[Tensor]:
        """All copies of each parameter, (R, *shape)."""
        return self._in_order([layout.stacked_views(rows) for layout, rows in self._pairs()])

    def norm(self) -> float:
        """||theta||."""
        return norm(self.parameters)

    @torch.no_grad()
    def take(self, row: int) -> None:
        """Row `row` becomes theta."""
        torch._foreach_copy_(self._views[row], self.parameters)

    @torch.no_grad()
    def displace(self, row: int, direction: Vector, scale: float) -> float:
        """Row `row` becomes theta + scale * direction.

        Args:
            direction: shaped like the parameters; None stands for zero.

        Returns:
            <row - theta, direction>: how far the row really lies along the direction.
        """
        if self._scratch is not None:
            # A small model: gathered, so that the work is that of three calls for all tensors.
            (theta, flat, difference), own, pieces = self._scratch
            torch._foreach_copy_(own, self.parameters)
            _gather(pieces, direction)
            displaced = torch.add(theta, flat, alpha=scale, out=self.rows[0][row])
            torch.sub(displaced, theta, out=difference)
            return float(torch.dot(difference, flat))
        views = self._views[row]
        if self.layouts[0].device.type != "cpu":
            torch._foreach_copy_(views, self.parameters)
            moved = [(view, v) for view, v in zip(views, direction, strict=True) if v is not None]
            if moved:
                torch._foreach_add_([x for x, _ in moved], [v for _, v in moved], alpha=scale)
            return self.along(row, direction)
        for p, view, v in zip(self.parameters, views, direction, strict=True):
            if v is None:
                view.copy_(p)
            else:
                torch.add(p, v, alpha=scale, out=view)
        return self.along(row, direction)

    @torch.no_grad()
    def displace_all(self, direction: Vector, scales: Sequence[float]) -> None:
        """Row r becomes theta + scales_r * direction, all rows of a layout by one kernel.

        The kernel reads flat vectors: the direction is gathered into one (P more memory for the
        call), and theta, too, unless the parameters live in a flat buffer anyway.
        """
        for members, layout, rows in zip(self._members, self.layouts, self.rows, strict=True):
            flat = layout.rows(1)[0]
            _gather(layout.views(flat), [direction[k] for k in members])
            base = buffer_of(layout)
            if base is None:
                base = layout.rows(1)[0]
                _gather(layout.views(base), layout.parameters)
            ops.perturb(base, rows, scale=self._scale(layout, scales), direction=flat)

    @torch.no_grad()
    def displace_at_random(
        self, first_row: int, scales: Sequence[float], seed: int, offset: int, distribution: str
    ) -> None:
        """Rows from `first_row` on become theta + scales_r * u_r, u_r the random direction number
        offset + r of `seed`; one kernel for all rows of a layout.

        "sphere" is a Gaussian direction brought to length sqrt(P), P the number of parameters.
        Where the parameters do not live in a flat buffer, theta is gathered into the last row,
        which then takes a second launch.
        """
        count = len(scales)
        sphere = distribution == "sphere"
        draw = "gaussian" if sphere else distribution
        for number, (layout, buffer) in enumerate(self._pairs()):
            rows = buffer[first_row : first_row + count]
            # A stream of its own for every layout.
            options: dict[str, Any] = {"seed": seed + (number << 32), "distribution": draw}
            if sphere:
                rows.zero_()
            base = None if sphere else buffer_of(layout)
            scale = self._scale(layout, [1.0] * count if sphere else scales)
            if base is not None:
                ops.perturb(base, rows, scale=scale, offset=offset, **options)
                continue
            last = rows[-1]
            if not sphere:
                _gather(layout.views(last), layout.parameters)
            if count > 1:
                ops.perturb(last, rows[:-1], scale=scale[:-1], offset=offset, **options)
            ops.perturb(last, rows[-1:], scale=scale[-1:], offset=offset + count - 1, **options)
        if sphere:
            for r, scale_r in enumerate(scales, start=first_row):
                length = norm(self._views[r])
                for p, view in zip(self.parameters, self._views[r], strict=True):
                    torch.add(p, view, alpha=scale_r * math.sqrt(self.numel) / length, out=view)

    def _scale(self, layout: FlatLayout, scales: Sequence[float]) -> Tensor:
        return torch.tensor(scales, dtype=torch.float64).to(layout.device)

    @torch.no_grad()
    def along(self, row: int, direction: Vector) -> float:
        """<row - theta, direction>: how far the row really lies along the direction."""
        parts = [
            difference_along(view, p, v)
            for p, view, v in zip(self.parameters, self._views[row], direction, strict=True)
            if v is not None
        ]
        return float(torch.stack(parts).sum()) if parts else 0.0

    @torch.no_grad()
    def distance(self, row: int) -> float:
        """||row - theta||; the row is used up."""
        views = self._views[row]
        torch._foreach_sub_(views, self.parameters)
        return norm(views)

    def evaluate(self, row: int, closure: Callable[[], Result]) -> Result:
        """What the closure returns with row `row` in the parameters' place, without a graph.

        Raises:
            ValueError: the closure moved a parameter.
            Exception: whatever the closure raises; the parameters are back in their place.
        """
        parameters, views = self.parameters, self._views[row]
        own = [p.data for p in parameters]
        versions = [p._version for p in parameters]
        try:
            try:
                _point(parameters, views)
                forget_weight_copies()
                with torch.no_grad():
                    result = closure()
                moved = [
                    k
                    for k, (p, view) in enumerate(zip(parameters, views, strict=True))
                    if p._version != versions[k] or p.data_ptr() != view.data_ptr()
                ]
            finally:
                _point(parameters, own)
        except BaseException:
            _point(parameters, own)  # an interrupt may have come before the line above
            raise
        finally:
            forget_weight_copies()
        if moved:
            raise ValueError(
                f"closure must only compute losses, but it moved shared_parameters {moved}"
            )
        return result


def _point(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Have parameters use the memory of tensors; no interrupt (Ctrl-C) comes between two of them,
    because none of this is Python."""
    deque(map(_set_data, parameters, tensors), maxlen=0)


@torch.no_grad()
def _gather(views: Sequence[Tensor], pieces: Sequence[Tensor | None]) -> None:
    """Write pieces into a flat vector; None is zero."""
    for view, piece in zip(views, pieces, strict=True):
        if piece is None:
            view.zero_()
    there = [(view, x) for view, x in zip(views, pieces, strict=True) if x is not None]
    if there:
        targets, sources = zip(*there, strict=True)
        torch._foreach_copy_(targets, sources)


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


@torch.no_grad()
def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean length of all tensors together; waits for the device."""
    lengths = list(torch._foreach_norm(list(tensors)))
    if len({x.dtype for x in lengths}) > 1:
        lengths = [x.double() for x in lengths]
    return math.hypot(*torch.stack(lengths).tolist())


def difference_along(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """<a - b, v>, a float64 scalar on the device, without temporaries of the tensors' size.

    Args:
        a, b: dense, of the same strides.
        v: of the same shape.
    """
    x, y, z = as_vector(a), as_vector(b), as_vector(laid_like(v, b))
    chunk = min(_CHUNK.get(a.device.type, _CHUNK_ELSE), len(x))
    difference = x.new_empty(chunk)
    parts = []
    for start in range(0, len(x), chunk or 1):
        end = min(start + chunk, len(x))
        part = torch.sub(x[start:end], y[start:end], out=difference[: end - start])
        parts.append(torch.dot(part, z[start:end]))
    return torch.stack(parts).double().sum() if parts else x.new_zeros((), dtype=torch.float64)

"""Whatever users give as a weighting, as a `Weighting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import weightings
from ..errors import SolverError
from ..methods import find
from .base import Weighting


def as_weighting(value: object, argument: str = "weighting", **options: Any) -> Weighting:
    """A weighting from a weighting, a name or a function.

    Args:
        value: a `Weighting`, which is returned as it is; the name of a method of the Gram matrix
            ("nashmtl", "bargaining", "ccp", "mgda", "equal", ...), spelled as for `fastmto.get`;
            or any callable Gram (n, n) -> n weights.
        argument: what the caller calls the value, for the messages.
        options: of the weighting; with a name only.

    Raises:
        ValueError: something else, an unknown name, or a weighting that needs the losses.

    Example: `as_weighting("cagrad", c=0.2)(gram)`.
    """
    if isinstance(value, str):
        method = find(value, argument, gram=True)
        kind = cast(Callable[..., Weighting], getattr(weightings, method.weighting))
        weighting = kind(**{**method.options, **options})
    elif options:
        raise ValueError(f"{argument} must be a name with {', '.join(options)}, got {value!r}")
    elif isinstance(value, Weighting):
        weighting = value
    elif callable(value) and not isinstance(value, type):
        weighting = Function(value, argument)
    else:
        raise ValueError(
            f"{argument} must be a fastmto.weightings.Weighting, the name of one, or a callable "
            f"Gram -> weights, got {value!r}"
        )
    if weighting.needs_losses:
        raise ValueError(f"{argument} must not need the losses, got {weighting!r}")
    return weighting


class Function(Weighting):
    """A user's function as a weighting: weights = function(G).

    Args:
        function: a copy of the Gram matrix (n, n) -> n numbers: a tensor, an array or a sequence.
            If it has an attribute `result`, that is shown as the weighting's.
        argument: what the user calls it, for the messages.

    Raises:
        ValueError: in a call: something else than n numbers was returned.
        SolverError: in a call: a weight is not finite.

    Example: `Function(lambda gram: 1 / gram.diagonal().sqrt())(gram)`.
    """

    def __init__(self, function: Callable[[Tensor], object], argument: str = "weighting") -> None:
        self.function = function
        self.argument = argument

    def __call__(self, gram: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        found = self.function(gram.clone())  # it may write into what it gets
        self.result = getattr(self.function, "result", None)
        if not isinstance(found, Tensor | Sequence | np.ndarray) or isinstance(found, str):
            raise ValueError(f"{self.argument} must return weights, got {type(found).__name__}")
        try:
            weights = torch.as_tensor(found, device=gram.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.argument} must return numbers, got {found!r}") from error
        if weights.shape != (len(gram),):
            raise ValueError(
                f"{self.argument} must return weights of shape ({len(gram)},), "
                f"got {tuple(weights.shape)}"
            )
        if weights.is_complex() or weights.dtype == torch.bool:
            raise ValueError(f"{self.argument} must return real numbers, got {weights.dtype}")
        weights = weights.detach().to(gram.dtype, copy=True)
        if not bool(weights.isfinite().all()):
            raise SolverError(
                f"{self.argument} returned weights that are not finite: {weights.tolist()}",
                "not_finite",
            )
        return weights

    def __repr__(self) -> str:
        return repr(self.function)

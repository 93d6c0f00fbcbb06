"""Errors that a caller may want to catch by name.

Wrong arguments raise `ValueError`, misuse of a running optimizer raises `RuntimeError`; the
classes here are the failures that depend on the numbers.
"""

from __future__ import annotations

import sys
import warnings


class SolverError(RuntimeError):
    """A weighting found no weights for a Gram matrix.

    The update-level optimizers catch exactly this error and apply their `on_failure` policy.

    Args:
        message: what was asked, what came.
        status: the solver's status, e.g. "near_stationary".

    Example:
        >>> import torch, fastmto
        >>> try:
        ...     fastmto.weightings.Bargaining()(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        ... except fastmto.errors.SolverError as error:
        ...     print(error.status)
        near_stationary
    """

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, str]]:
        return type(self), (str(self), self.status)


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite and the policy is to raise."""


def warn(message: str) -> None:
    """A RuntimeWarning that points at the line of the user's which led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("fastmto", "torch")

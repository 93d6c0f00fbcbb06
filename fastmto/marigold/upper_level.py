"""MARIGOLD's upper level: the task weights lambda, and what an estimate makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import weightings
from ..engine.per_task import take
from ..weightings import Weighting
from .options import GramCriterion, Options
from .simplex_rules import FamoRule, Mirror, Projected, SimplexRule


class UpperLevel:
    """The weights of the tasks, and the losses F_i that they balance.

    F_i is f_i, f_i / p_i with a preference, log(f_i - min_i) with `log_losses`.

    Args:
        n_tasks: T.
        options: the balancer's.
        weighting: solves an estimated Gram matrix; None: a rule moves lambda by derivatives.

    Attributes:
        lambda_: (T,) float64 on the CPU; replaced, never written to.
    """

    def __init__(self, n_tasks: int, options: Options, weighting: GramCriterion | None) -> None:
        assert options.beta is not None
        assert options.ema is not None
        self._options, self._weighting, self._ema = options, weighting, options.ema
        self.lambda_ = torch.full((n_tasks,), 1 / n_tasks, dtype=torch.float64)
        self._rule: SimplexRule
        if options.famo:
            self._rule = FamoRule(n_tasks, options.famo_lr, options.famo_gamma)
        else:
            kind = Mirror if options.lambda_update == "mirror" else Projected
            self._rule = kind(n_tasks, options.beta, options.lambda_step, options.ema)
        self._scale: Tensor | None = None  # F_i = f_i / scale_i
        if options.preference is not None and options.criterion != "bargaining":
            self._scale = torch.tensor(options.preference, dtype=torch.float64)
            self._scale /= self._scale.mean()
        self._minima = torch.tensor(options.min_losses or [0.0] * n_tasks, dtype=torch.float64)
        self._gram = torch.full((n_tasks, n_tasks), math.nan, dtype=torch.float64)

    def loss_weights(
        self, tasks: Sequence[int], values: Tensor, label: Callable[[int], str]
    ) -> Tensor:
        """What the n present losses are multiplied by: lambda_i dF_i/df_i.

        Args:
            tasks: their indices.
            values: theirs (n,), float64 on the CPU; not looked at without `log_losses`.
            label: what messages call a task.

        Raises:
            ValueError: a loss that has no logarithm.
        """
        weights = take(self.lambda_, tasks)
        if self._scale is not None:
            weights = weights / take(self._scale, tasks)
        if self._options.log_losses:
            above = values - take(self._minima, tasks)
            low = (~(above > 0)).nonzero()
            if len(low):
                k = int(low[0])
                raise ValueError(
                    f"{label(tasks[k])} must be > {float(self._minima[tasks[k]]):g}: its "
                    f"logarithm is balanced, got {float(values[k]):g}"
                )
            weights = weights / above
        return weights / weights.sum() if self._options.famo else weights

    def transformed(self, tasks: Sequence[int], values: Tensor) -> Tensor:
        """F (..., n) from losses f (..., n), float64; NaN where there is no logarithm."""
        if self._options.log_losses:
            values = (values - take(self._minima, tasks)).log()
        return values if self._scale is None else values / take(self._scale, tasks)

    def move(self, y: Tensor, squared: float, tasks: Sequence[int]) -> None:
        """lambda by the derivatives y (n,) along d, ||d||^2 = `squared`."""
        self.lambda_ = self._rule.move(self.lambda_, y, squared, tasks)

    def average(self, gram: Tensor, tasks: Sequence[int]) -> Tensor:
        """The estimated Gram matrix (n, n), averaged with those before."""
        rows = torch.tensor(tasks)
        block = (rows[:, None], rows[None, :])
        before = self._gram[block]
        gram = torch.where(before.isnan(), gram, self._ema * before + (1 - self._ema) * gram)
        self._gram = self._gram.clone()
        self._gram[block] = gram
        return gram

    def solve(self, gram: Tensor, tasks: list[int]) -> None:
        """lambda where the criterion says for the Gram matrix (n, n).

        Raises:
            SolverError: the criterion finds no weights; lambda keeps its value.
            ValueError: what it returns is no weights.
        """
        weighting = self._weighting
        assert weighting is not None
        if isinstance(weighting, Weighting):
            found = weighting(gram, None if len(tasks) == len(self._gram) else tasks)
        else:
            found = torch.as_tensor(weighting(gram.clone()))
        found = found.detach().to("cpu", torch.float64)
        if found.shape != (len(tasks),) or not bool(found.isfinite().all()):
            raise ValueError(
                f"criterion must return {len(tasks)} finite weights, got {found.tolist()} of "
                f"shape {tuple(found.shape)}"
            )
        self.lambda_ = self.lambda_.clone()
        self.lambda_[tasks] = found

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly from here, copied."""
        weighting = self._weighting.state_dict() if isinstance(self._weighting, Weighting) else {}
        return {
            "lambda": self.lambda_.clone(),
            "rule": self._rule.state_dict(),
            "gram": self._gram.clone(),
            "weighting": weighting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is of another rule.
        """
        mine = self._rule.state_dict()
        if set(state["rule"]) != set(mine):
            raise ValueError(
                f"state_dict must be of the same rule for lambda, which keeps {sorted(mine)}, got "
                f"{sorted(state['rule'])}"
            )
        self.lambda_ = state["lambda"].clone()
        self._rule.load_state_dict(state["rule"])
        self._gram = state["gram"].clone()
        if isinstance(self._weighting, Weighting):
            self._weighting.load_state_dict(state["weighting"])


def weighting_of(options: Options) -> GramCriterion | None:
    """What solves estimated Gram matrices; None where none are estimated."""
    if not options.by_gram:
        return None
    if not isinstance(options.criterion, str):
        return options.criterion
    if options.criterion == "bargaining":
        return weightings.Bargaining(preference=options.preference)
    classes: dict[str, type[Weighting]] = {
        "mgda": weightings.MGDA,
        "imtl_g": weightings.IMTLG,
        "cagrad": weightings.CAGrad,
        "fairgrad": weightings.FairGrad,
    }
    return classes[options.criterion]()

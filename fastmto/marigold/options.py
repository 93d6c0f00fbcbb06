"""MARIGOLD's settings, checked against each other once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from .estimators import relative_steps

ESTIMATORS = ("forward", "central", "reuse", "directions", "span")
CRITERIA = ("mgda", "famo", "bargaining", "imtl_g", "cagrad", "fairgrad")
#: Directions a task where `n_directions` is not given.
DIRECTIONS_A_TASK = 4

GramCriterion = Callable[[Tensor], Tensor]


@dataclass
class Options:
    """The arguments of `fastmto.MARIGOLD`, which says what they are; None is filled in here.

    Raises:
        ValueError: a value out of range, or two that contradict each other.
    """

    criterion: str | GramCriterion = "mgda"
    estimator: str | None = None
    lambda_update: str = "mirror"
    beta: float | None = None
    lambda_step: float | None = None
    ema: float | None = None
    relative_step: float | None = None
    mu: float | None = None
    forward_dtype: torch.dtype | None = None
    step_size: float | None = None
    n_directions: int | None = None
    distribution: str = "gaussian"
    difference: str = "forward"
    seed: int = 0
    span: str = "gradients"
    span_refresh: int = 100
    preference: Sequence[float] | None = None
    log_losses: bool = False
    min_losses: Sequence[float] | None = None
    famo_lr: float = 0.025
    famo_gamma: float = 0.01
    evaluation: str = "sequential"
    debug: bool = False
    on_failure: str = "hold"

    @classmethod
    def given(cls, criterion: str | GramCriterion, **arguments: Any) -> Options:
        """From the arguments as they were given; None stands for the default.

        Raises:
            ValueError: an argument that the other settings make no use of, too.
        """
        present = {name: value for name, value in arguments.items() if value is not None}
        options = cls(criterion, **present)
        for used, names, owner in options._owners():
            for name in names:
                if not used and name in present and present[name] is not False:
                    raise ValueError(
                        f"{name} belongs to {owner}, got {name}={present[name]!r} with "
                        f"criterion={criterion!r}, estimator={options.estimator!r}"
                    )
        return options

    def _owners(self) -> list[tuple[bool, tuple[str, ...], str]]:
        """(whether these settings use the arguments, the arguments, what they belong to)."""
        name = self.estimator
        along = "estimator='forward', 'central' or 'reuse' with criterion='mgda'"
        return [
            (
                not (self.by_gram or self.famo),
                ("lambda_update", "beta", "lambda_step"),
                along,
            ),
            (not self.famo, ("ema",), "every criterion but 'famo'"),
            (self.famo, ("famo_lr", "famo_gamma"), "criterion='famo'"),
            (
                name == "reuse" and not self.famo,
                ("step_size",),
                "estimator='reuse' with criterion='mgda'",
            ),
            (
                name != "reuse",
                ("relative_step", "mu", "forward_dtype", "evaluation", "debug"),
                "the estimators that evaluate a closure (all but 'reuse')",
            ),
            (self.by_gram, ("difference", "on_failure"), "estimator='directions' or 'span'"),
            (name == "directions", ("distribution", "seed"), "estimator='directions'"),
            (
                name == "directions" or (name == "span" and self.span == "steps"),
                ("n_directions",),
                "estimator='directions', or 'span' with span='steps'",
            ),
            (name == "span", ("span",), "estimator='span'"),
            (
                name == "span" and self.span == "gradients",
                ("span_refresh",),
                "estimator='span' with span='gradients'",
            ),
        ]

    def __post_init__(self) -> None:
        if isinstance(self.criterion, str):
            check_choice("criterion", self.criterion, CRITERIA)
        elif not callable(self.criterion):
            raise ValueError(f"criterion must be a name or a callable, got {self.criterion!r}")
        self.famo = isinstance(self.criterion, str) and self.criterion == "famo"
        if self.estimator is None:
            self.estimator = "reuse" if self.famo else "central"
        self.by_gram = self.estimator in ("directions", "span")
        self._check_choices()
        self._check_numbers()
        if self.beta is None:
            self.beta = 2.0 if self.lambda_update == "mirror" else 1.0
        if self.ema is None:
            self.ema = 0.9 if self.lambda_update == "mirror" and not self.by_gram else 0.0
        self.log_losses = self.log_losses or self.famo

    def _check_choices(self) -> None:
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("lambda_update", self.lambda_update, ("mirror", "projected"))
        check_choice("distribution", self.distribution, ("gaussian", "rademacher", "sphere"))
        check_choice("difference", self.difference, ("forward", "central"))
        check_choice("span", self.span, ("gradients", "steps"))
        check_choice("evaluation", self.evaluation, ("sequential", "batched"))
        check_choice("on_failure", self.on_failure, ("hold", "raise"))
        if self.famo and self.estimator != "reuse":
            raise ValueError(
                f"estimator must be 'reuse' with criterion='famo', got {self.estimator!r}"
            )
        if not self.by_gram and not (self.famo or self.criterion == "mgda"):
            raise ValueError(
                "estimator must be 'directions' or 'span' with a criterion that needs a Gram "
                f"matrix ({self.criterion!r}), got {self.estimator!r}"
            )
        if self.mu is not None and self.relative_step is not None:
            raise ValueError(
                f"mu and relative_step exclude each other, got {self.mu} and {self.relative_step}"
            )
        if self.beta is not None and self.lambda_step is not None:
            raise ValueError(
                f"beta and lambda_step exclude each other, got {self.beta} and {self.lambda_step}"
            )
        if self.preference is not None and (self.famo or not isinstance(self.criterion, str)):
            raise ValueError(
                "preference must be None with criterion='famo' or a callable criterion, which "
                f"takes its own, got {self.preference}"
            )
        if self.min_losses is not None and not (self.log_losses or self.famo):
            raise ValueError("min_losses must be None without log_losses or criterion='famo'")

    def _check_numbers(self) -> None:
        for name in ("beta", "lambda_step", "relative_step", "mu", "step_size", "famo_lr"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 0, open_low=True)
        check_number("famo_gamma", self.famo_gamma, 0)
        for name in ("n_directions", "span_refresh"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be an integer in [0, 2^31), got {self.seed!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")
        if self.forward_dtype is not None:
            relative_steps("forward", self.forward_dtype)
        if self.preference is not None:
            self.preference = [
                check_number("preference", float(p), 0, open_low=True) for p in self.preference
            ]
        if self.min_losses is not None:
            self.min_losses = [
                check_number("min_losses", float(x), -math.inf) for x in self.min_losses
            ]

    def n_tasks(self, given: int | None) -> int | None:
        """T, where an argument with one entry a task says it.

        Raises:
            ValueError: arguments say different numbers.
        """
        for name in ("preference", "min_losses"):
            per_task = getattr(self, name)
            if per_task is not None:
                given = len(per_task) if given is None else given
                if len(per_task) != given:
                    raise ValueError(f"{name} must hold {given} numbers, got {len(per_task)}")
        return given

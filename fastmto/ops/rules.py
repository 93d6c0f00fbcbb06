"""Update rules: what an optimizer would do with one task's gradient.

A rule is a small frozen data class of hyperparameters. Its element formula exists three times
only: in `reference/updates.py`, `csrc/kernels/rules.h` and `ops/triton/rules.py`; the last two are
tested against the first. The ops read a rule as `kind` and `numbers(step, ...)`.

Notation of all three rules, with the shared moments of the last step held fixed
(PUB, arXiv 2410.05806, Algorithm 1):

    Adam:     m_i = b1 m + (1-b1) g_i,  v_i = b2 v + (1-b2) g_i^2
              u_i = c1 m_i / (c2 sqrt(v_i) + eps),  c1 = 1/(1-b1^t),  c2 = 1/sqrt(1-b2^t)
    AdaGrad:  v_i = v + g_i^2,  u_i = g_i / (sqrt(v_i) + eps)
    RMSProp:  v_i = b2 v + (1-b2) g_i^2
              centered: q_i = b2 q + (1-b2) g_i,  d_i = sqrt(max(v_i - q_i^2, 0)) + eps
              otherwise d_i = sqrt(v_i) + eps
              u_i = g_i / d_i, or with momentum mu: u_i = mu b + g_i / d_i

After the parameters have moved, the moments take one step of the plain rule on g = sum_i a_i g_i.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple


class Coefficients(NamedTuple):
    """A rule at one step, as plain numbers; entries a rule does not use are 0."""

    b1: float
    b2: float
    c1: float
    c2: float
    eps: float
    mu: float


class Numbers(NamedTuple):
    """What an op reads of a step, as a row of float64: the rule's coefficients, the decay rates'
    complements d = 1 - b in double precision, the rates, and whether the row's tasks take part."""

    b1: float
    d1: float
    b2: float
    d2: float
    c1: float
    c2: float
    eps: float
    mu: float
    lr: float
    decay: float  # lr weight_decay; 1 minus it would lose most of its digits in float32
    active: float  # 1, or 0: then the others are 0 too


class Hyper(NamedTuple):
    """What `Numbers` are made of on the device, where only it knows the step; a row of float64."""

    b1: float
    b2: float
    eps: float
    mu: float
    corrected: float  # 1 where c1 and c2 are Adam's bias corrections, else 0, and they are 0
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Rule:
    """Base of the update rules. `eps` must be positive: where no task has touched a coordinate
    the update is 0/(0 + eps) = 0."""

    #: Number of the element formula, the same in C++ and Triton.
    kind: ClassVar[int]
    #: torch's name of the rule, as `PUB(rule=...)` takes it.
    name: ClassVar[str]

    @property
    def state_names(self) -> tuple[str, ...]:
        """torch's names of the state tensors, in the order the ops take them."""
        raise NotImplementedError

    def coefficients(self, step: int) -> Coefficients:
        """The numbers of the element formula at the 1-based `step`."""
        raise NotImplementedError

    def numbers(self, step: int, lr: float = 0.0, weight_decay: float = 0.0) -> Numbers:
        """The row of numbers at the 1-based `step`; step 0 takes no part."""
        if step == 0:
            return Numbers(*(0.0,) * len(Numbers._fields))
        b1, b2, c1, c2, eps, mu = self.coefficients(step)
        return Numbers(b1, 1 - b1, b2, 1 - b2, c1, c2, eps, mu, lr, lr * weight_decay, 1.0)

    def hyper(self, lr: float, weight_decay: float) -> Hyper:
        """The row that op `clock` makes `numbers` of."""
        b1, b2, c1, _, eps, mu = self.coefficients(1)
        return Hyper(b1, b2, eps, mu, float(c1 != 0), lr, weight_decay)

    def initial(self, name: str) -> float:
        """What the state tensor `name` is filled with before the first step."""
        del name
        return 0.0

    def hyperparameters(self) -> dict[str, object]:
        """The fields, as they stand in a param group."""
        return dataclasses.asdict(self)


def _check_beta(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")


def _check_eps(value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {value!r}")


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma & Ba, arXiv 1412.6980) with bias correction; weight decay is decoupled
    (AdamW) and belongs to the optimizer.

    Args:
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the root, positive.

    Example:
        >>> import fastmto
        >>> fastmto.rules.Adam(betas=(0.9, 0.99)).betas
        (0.9, 0.99)
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kind: ClassVar[int] = 0
    name: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be a pair, got {self.betas!r}")
        _check_beta("betas[0]", self.betas[0])
        _check_beta("betas[1]", self.betas[1])
        _check_eps(self.eps)

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def coefficients(self, step: int) -> Coefficients:
        b1, b2 = self.betas
        return Coefficients(b1, b2, 1 / (1 - b1**step), (1 - b2**step) ** -0.5, self.eps, 0.0)


@dataclass(frozen=True)
class AdaGrad(Rule):
    """AdaGrad (Duchi et al. 2011), torch's form without its own learning-rate decay (use a
    scheduler).

    Args:
        eps: added to the root, positive.
        initial_accumulator_value: start of the sum of squares, at least 0.

    Example:
        >>> import fastmto
        >>> fastmto.rules.AdaGrad(initial_accumulator_value=0.1).initial_accumulator_value
        0.1
    """

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    kind: ClassVar[int] = 1
    name: ClassVar[str] = "adagrad"

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if not 0.0 <= self.initial_accumulator_value < float("inf"):
            raise ValueError(
                "initial_accumulator_value must be finite and >= 0, "
                f"got {self.initial_accumulator_value!r}"
            )

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("sum",)

    def coefficients(self, step: int) -> Coefficients:
        del step
        return Coefficients(0.0, 1.0, 0.0, 0.0, self.eps, 0.0)

    def initial(self, name: str) -> float:
        del name
        return self.initial_accumulator_value


@dataclass(frozen=True)
class RMSProp(Rule):
    """RMSProp in torch's form, with its momentum and centered options.

    torch takes the root of v - q^2 as it comes; rounding can make that negative, so here it is
    bounded below by 0 (the two agree wherever torch's is not NaN).

    Args:
        alpha: decay rate of the second moment, in [0, 1).
        eps: added to the root, positive.
        momentum: mu, in [0, 1).
        centered: divide by the centred second moment.

    Example:
        >>> import fastmto
        >>> fastmto.rules.RMSProp(momentum=0.9).momentum
        0.9
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    name: ClassVar[str] = "rmsprop"

    def __post_init__(self) -> None:
        _check_beta("alpha", self.alpha)
        _check_eps(self.eps)
        _check_beta("momentum", self.momentum)

    @property
    def kind(self) -> int:  # type: ignore[override]
        return 2 + (self.momentum > 0) + 2 * self.centered

    @property
    def state_names(self) -> tuple[str, ...]:
        return (
            "square_avg",
            *(("momentum_buffer",) if self.momentum > 0 else ()),
            *(("grad_avg",) if self.centered else ()),
        )

    def coefficients(self, step: int) -> Coefficients:
        del step
        return Coefficients(0.0, self.alpha, 0.0, 0.0, self.eps, self.momentum)


@dataclass(frozen=True)
class Clippy:
    """Clippy (Tang et al., arXiv 2302.09178): shrink a tensor's update until no element moves by
    more than a fraction of itself.

        sigma = min(1, min_j (lambda_rel |theta_j| + lambda_abs) / (lr |u_j|)),  u <- sigma u

    per parameter tensor and per task. A zero update gives sigma = 1.

    Args:
        lambda_rel: fraction of the parameter's size, at least 0.
        lambda_abs: absolute allowance, positive.

    Example:
        >>> import fastmto
        >>> fastmto.rules.Clippy(lambda_rel=0.1).lambda_rel
        0.1
    """

    lambda_rel: float = 0.5
    lambda_abs: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 <= self.lambda_rel < float("inf"):
            raise ValueError(f"lambda_rel must be finite and >= 0, got {self.lambda_rel!r}")
        if not 0.0 < self.lambda_abs < float("inf"):
            raise ValueError(f"lambda_abs must be positive and finite, got {self.lambda_abs!r}")


RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Adam, AdaGrad, RMSProp)}


def as_rule(rule: str | Rule) -> Rule:
    """`rule` itself, or the rule of that name with its defaults."""
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise ValueError(
            f"rule must be one of {', '.join(RULES)} or a fastmto.ops.rules.Rule, got {rule!r}"
        )
    return RULES[rule]()

"""AdaTask: every task keeps its own moments."""

from __future__ import annotations

from ..ops.rules import Clippy, Rule
from .groups import Parameters, TaskParameters
from .update_balancer import UpdateBalancer


class AdaTask(UpdateBalancer):
    """Adaptive learning rates task by task: own moments for every task, weights 1.

    Source: AdaTask (Yang et al., AAAI 2023).

        m_i = b1 m_i + (1-b1) g_i,  v_i = b2 v_i + (1-b2) g_i^2,  u_i from m_i and v_i
        theta <- (1 - lr weight_decay) theta - lr sum_i u_i

    The same machinery as `PUB(adatask=True)` without the search; T backward passes a step and
    2 T P moments.

    Args:
        shared_parameters, task_parameters, lr, rule, weight_decay, clippy, on_nonfinite,
            capturable: as in `PUB`.

    Raises:
        ValueError: as `PUB`.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> optimizer = fastmto.AdaTask(trunk.parameters(), [head.parameters() for head in heads])
        >>> optimizer.backward([head(trunk(torch.ones(3, 4))).mean() for head in heads])
        >>> optimizer.step()
        >>> optimizer.state[trunk.bias]["exp_avg"].shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        shared_parameters: Parameters,
        task_parameters: TaskParameters,
        lr: float = 1e-3,
        *,
        rule: str | Rule = "adam",
        weight_decay: float = 0.0,
        clippy: bool | Clippy = False,
        on_nonfinite: str = "skip",
        capturable: bool | None = None,
    ) -> None:
        super().__init__(
            shared_parameters,
            task_parameters,
            lr,
            rule=rule,
            weight_decay=weight_decay,
            weighting=None,
            clippy=clippy,
            adatask=True,
            on_nonfinite=on_nonfinite,
            capturable=capturable,
        )

"""fastmto: multi-task optimization for PyTorch, exact and fast.

optimizer = fastmto.PUB(shared_parameters, task_parameters, lr=1e-3)
optimizer.zero_grad()
optimizer.backward(losses)      # in place of loss.backward()
optimizer.step()

balancer = fastmto.get("nashmtl", update_weights_every=10)      # or another of available()
optimizer.zero_grad()                                            # any torch optimizer
loss, info = balancer.backward(losses, shared_parameters=shared, task_specific_parameters=heads)
optimizer.step()
"""

from . import balancers, errors, rules, solvers, weightings
from .adatask import AdaTask
from .balancers.marigold import MARIGOLD
from .clippy_adam import ClippyAdam
from .graphed import GraphedStep
from .pub import PUB
from .registry import available, get
from .zeroth_order.functional import FunctionalClosure

__version__ = "0.1.0"
__all__ = [
    "MARIGOLD",
    "PUB",
    "AdaTask",
    "ClippyAdam",
    "FunctionalClosure",
    "GraphedStep",
    "available",
    "balancers",
    "errors",
    "get",
    "rules",
    "solvers",
    "weightings",
]

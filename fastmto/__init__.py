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

from . import balancers, errors, solvers, weightings
from .balancers.registry import available, get
from .marigold.balancer import MARIGOLD
from .marigold.functional import FunctionalClosure
from .optim import rules
from .optim.adatask import AdaTask
from .optim.clippy_adam import ClippyAdam
from .optim.graphed import GraphedStep
from .optim.pub import PUB

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

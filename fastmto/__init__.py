"""fastmto: multi-task optimization for PyTorch, exact and fast.

optimizer = fastmto.PUB(shared_parameters, task_parameters, lr=1e-3)
optimizer.zero_grad()
optimizer.backward(losses)      # in place of loss.backward()
optimizer.step()

balancer = fastmto.get("nashmtl", update_weights_every=10)      # or another of available()
optimizer.zero_grad()                                            # any torch optimizer
loss, info = balancer.backward(losses, shared_parameters=shared, task_specific_parameters=heads)
optimizer.step()

The names below are imported when they are first used, so that `import fastmto` costs next to
nothing and the command line can answer without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import balancers as balancers
    from . import errors as errors
    from . import integrations as integrations
    from . import solvers as solvers
    from . import weightings as weightings
    from .balancers.registry import get as get
    from .marigold.balancer import MARIGOLD as MARIGOLD
    from .marigold.functional import FunctionalClosure as FunctionalClosure
    from .methods import available as available
    from .ops import philox as philox
    from .ops import rules as rules
    from .optim.adatask import AdaTask as AdaTask
    from .optim.clippy_adam import ClippyAdam as ClippyAdam
    from .optim.graphed import GraphedStep as GraphedStep
    from .optim.pub import PUB as PUB

__version__ = "0.1.0"
#: Public name -> where it is: a module, or a module and a name in it.
_PUBLIC = {
    "MARIGOLD": "marigold.balancer:MARIGOLD",
    "PUB": "optim.pub:PUB",
    "AdaTask": "optim.adatask:AdaTask",
    "ClippyAdam": "optim.clippy_adam:ClippyAdam",
    "FunctionalClosure": "marigold.functional:FunctionalClosure",
    "GraphedStep": "optim.graphed:GraphedStep",
    "available": "methods:available",
    "balancers": "balancers",
    "errors": "errors",
    "get": "balancers.registry:get",
    "integrations": "integrations",
    "philox": "ops.philox",
    "rules": "ops.rules",
    "solvers": "solvers",
    "weightings": "weightings",
}
__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # a module `__getattr__` would tell type checkers that every name exists

    def __getattr__(name):
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _PUBLIC[name].partition(":")
        value = import_module(f".{module}", __name__)
        globals()[name] = value = getattr(value, attribute) if attribute else value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

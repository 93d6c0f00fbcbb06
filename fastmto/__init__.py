"""fastmto: multi-task optimization for PyTorch, exact and fast.

optimizer = fastmto.PUB(shared_parameters, task_parameters, lr=1e-3)
optimizer.zero_grad()
optimizer.backward(losses)      # in place of loss.backward()
optimizer.step()
"""

from . import errors, rules, solvers, weightings
from .adatask import AdaTask
from .clippy_adam import ClippyAdam
from .pub import PUB

__version__ = "0.1.0"
__all__ = ["PUB", "AdaTask", "ClippyAdam", "errors", "rules", "solvers", "weightings"]

"""The methods that are a weighting of the Gram matrix of the gradients.

A new one is its weighting (a file in `fastmto/weightings/` and its name in `__init__` there), its
row in `fastmto/methods.py`, and a class here.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import methods, weightings
from ..engine.batch import Batch
from ..weightings import DeviceSolver, Weighting
from .gradient_balancer import GradientBalancer
from .gram_balancer import GramBalancer

__all__ = [
    "IMTLG",
    "MGDA",
    "MGDAUB",
    "AlignedMTL",
    "CAGrad",
    "DualProj",
    "FairGrad",
    "NashMTL",
    "PCGrad",
    "UPGrad",
]


class GramMethod(GramBalancer):
    """Base of the methods that are a weighting.

    Their arguments are the weighting's own, which can be read as attributes, and those of
    `GradientBalancer`; their docstring is the weighting's.

    Class arguments:
        weighting: the class of the weighting; a subclass without it is its parent's method.
        fixed: arguments of `GradientBalancer` that have to be these.
    """

    _make: ClassVar[Callable[..., Weighting]]
    _own: ClassVar[tuple[str, ...]]  # names of the weighting's arguments
    _fixed: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, weighting: type[Weighting] | None = None, **fixed: Any) -> None:
        super().__init_subclass__()
        if weighting is None:
            return
        own = inspect.signature(weighting).parameters
        cls._make, cls._own, cls._fixed = weighting, tuple(own), fixed
        for name in own:
            setattr(cls, name, property(operator.attrgetter(f"weighting.{name}")))

        def __init__(self: GramMethod, n_tasks: int | None = None, **options: Any) -> None:
            GramMethod.__init__(self, n_tasks, **options)

        this, n_tasks, *rest = inspect.signature(GradientBalancer.__init__).parameters.values()
        __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                this,
                n_tasks,
                *(x.replace(kind=inspect.Parameter.KEYWORD_ONLY) for x in own.values()),
                *(x.replace(default=fixed.get(x.name, x.default)) for x in rest),
            ],
            return_annotation=None,
        )
        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.__doc__ = _docstring(cls, weighting)

    def __init__(self, n_tasks: int | None = None, **options: Any) -> None:
        own = {name: options.pop(name) for name in self._own if name in options}
        for name, value in self._fixed.items():
            if options.setdefault(name, value) != value:
                raise ValueError(f"{name} must be {value!r}, got {options[name]!r}")
        super().__init__(type(self)._make(**own), n_tasks, **options)


def _docstring(cls: type[GramMethod], weighting: type[Weighting]) -> str | None:
    """The weighting's docstring with the balancer's first line, arguments and example."""
    if weighting.__doc__ is None:  # python -OO
        return None
    text = inspect.cleandoc(weighting.__doc__).partition("\n\nExample:")[0].partition("\n\n")[2]
    about, *sections = re.split(r"\n*^(Args|Attributes|Raises):\n", text, flags=re.MULTILINE)
    named = dict(zip(sections[::2], sections[1::2], strict=True))
    features = ", features=z" if cls._fixed.get("level") == "features" else ""
    paragraphs = [
        f"{cls.__name__}: {methods.find(cls.key).what}.",
        about,
        inspect.cleandoc(cls.__doc__ or ""),
        "Args:\n    n_tasks: T; None: found at the first backward.\n"
        + (f"{named['Args']}\n" if "Args" in named else "")
        + "    options: update_weights_every, level, heads, ... as `GradientBalancer`.",
        f"Attributes:\n    weighting: `fastmto.weightings.{weighting.__name__}`; its arguments are "
        "attributes here, too.",
        f"Raises:\n{named['Raises']}" if "Raises" in named else "",
        f"Example:\n    balancer = fastmto.balancers.{cls.__name__}(update_weights_every=10)\n"
        "    optimizer.zero_grad()\n"
        f"    loss, info = balancer.backward(losses, shared, heads{features})\n"
        "    optimizer.step()",
    ]
    return "\n\n".join(x for x in paragraphs if x)


class MGDA(GramMethod, weighting=weightings.MGDA):
    key = "mgda"
    weighting: weightings.MGDA

    def _solve(self, gram: Tensor, active: list[int], batch: Batch) -> Tensor:
        why = self.weighting.needs_losses
        if not why:
            return super()._solve(gram, active, batch)
        values = self._positive_losses(batch, why)
        losses = torch.tensor([values[i] for i in active], dtype=torch.float64)
        return self.weighting(gram, active, losses=losses)

    def device_solver(self, n_tasks: int) -> DeviceSolver | None:
        # `_solve` does on the host what the weighting alone does: it needs no losses there.
        return self.weighting.device_solver(n_tasks)


class MGDAUB(MGDA, weighting=weightings.MGDA, level="features"):
    """One pass through the trunk: the length of the joint gradient at the features bounds that at
    the parameters (Sener and Koltun, section 3.3). It is `MGDA(level="features")`; `backward` needs
    `features=`.
    """

    key = "mgda_ub"


class PCGrad(GramMethod, weighting=weightings.PCGrad):
    key = "pcgrad"


class CAGrad(GramMethod, weighting=weightings.CAGrad):
    key = "cagrad"


class IMTLG(GramMethod, weighting=weightings.IMTLG):
    """The paper takes the gradients at the shared representation to save passes:
    `level="features"`.
    """

    key = "imtl_g"


class NashMTL(GramMethod, weighting=weightings.NashMTL):
    """The bound `max_norm` is on the joint gradient of a search, also of one that holds the last
    weights; between two searches the weights stand as they were found.
    """

    key = "nashmtl"


class UPGrad(GramMethod, weighting=weightings.UPGrad):
    key = "upgrad"


class DualProj(GramMethod, weighting=weightings.DualProj):
    key = "dualproj"


class FairGrad(GramMethod, weighting=weightings.FairGrad):
    key = "fairgrad"


class AlignedMTL(GramMethod, weighting=weightings.AlignedMTL):
    """Without `eps` it is that of the gradients' dtype, of several the widest."""

    key = "aligned_mtl"

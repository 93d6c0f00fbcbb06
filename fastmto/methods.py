"""The one table of methods: what users call them, what each is, and where it balances.

`fastmto.get`, the names in `PUB(weighting=...)` and in MARIGOLD's `criterion`, the command line
and the integrations read it. Nothing heavy is imported here, so that the command line can list the
methods at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        key: its name for users. Upper case, "-" and "_" do not matter.
        name: its class in `fastmto.balancers`; "" where it is a weighting only.
        level: what it balances: "loss" (values of the losses), "gradient", "update" (what an
            optimizer would add to the parameters) or "direction" (derivatives of the losses along
            one direction).
        what: one line for users.
        weighting: its class in `fastmto.weightings`; "" where the Gram matrix does not suffice.
        options: of the weighting, before the user's.
        aliases: spellings of other libraries that differ in more than case, "-" and "_".
    """

    key: str
    name: str
    level: str
    what: str
    weighting: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


# fmt: off
TABLE = (
    Method("bargaining", "", "update", "the Nash bargaining solution between the updates",
           "Bargaining"),
    Method("ccp", "", "update", "bargaining weights by the papers' sequence of convex problems",
           "Bargaining", {"method": "ccp"}),
    Method("ls", "LS", "loss", "linear scalarisation: fixed weights",
           "Equal", aliases=("ew", "equal", "sum")),
    Method("si", "SI", "loss", "scale-invariant: the sum of the losses' logarithms",
           aliases=("scaleinvls",)),
    Method("rlw", "RLW", "loss", "random weights at every step", aliases=("random",)),
    Method("dwa", "DWA", "loss", "dynamic weight average: more weight for losses that fall slowly"),
    Method("uncertainty", "Uncertainty", "loss", "uncertainty weighting: learned noise levels",
           aliases=("uw",)),
    Method("banditmtl", "BanditMTL", "loss", "mirror ascent on the weights near equal ones"),
    Method("imtl_l", "IMTLL", "loss", "IMTL-L: learned scales that bring all losses to 1"),
    Method("gradnorm", "GradNorm", "loss", "gradient lengths set by the tasks' progress"),
    Method("famo", "FAMO", "loss", "all losses fall at the same rate"),
    Method("ldc_mtl", "LDCMTL", "loss", "learned weights, a penalty on gaps between the losses",
           aliases=("ldc",)),
    Method("mgda", "MGDA", "gradient", "the shortest vector in the convex hull of the gradients",
           "MGDA"),
    Method("mgda_ub", "MGDAUB", "gradient", "MGDA at the shared representation"),
    Method("pcgrad", "PCGrad", "gradient",
           "each gradient without its conflicts with the others, in random order", "PCGrad"),
    Method("graddrop", "GradDrop", "gradient", "one sign per coordinate, drawn by its purity"),
    Method("cagrad", "CAGrad", "gradient", "best for the worst task, near the mean gradient",
           "CAGrad"),
    Method("imtl_g", "IMTLG", "gradient", "equal projections onto all tasks' gradients", "IMTLG"),
    Method("imtl", "IMTL", "gradient", "IMTL-G of losses scaled by IMTL-L"),
    Method("nashmtl", "NashMTL", "gradient", "the Nash bargaining solution between the gradients",
           "NashMTL", aliases=("nash",)),
    Method("upgrad", "UPGrad", "gradient",
           "the sum of the gradients projected on the cone where no task gets worse", "UPGrad"),
    Method("dualproj", "DualProj", "gradient",
           "the mean gradient projected on the cone where no task gets worse", "DualProj"),
    Method("fairgrad", "FairGrad", "gradient", "alpha-fair utilities of the tasks' decreases",
           "FairGrad"),
    Method("aligned_mtl", "AlignedMTL", "gradient",
           "the gradients' principal components brought to one length", "AlignedMTL",
           aliases=("aligned",)),
    Method("db_mtl", "DBMTL", "gradient",
           "smoothed gradients of the log losses, brought to one length"),
    Method("pub", "PUB", "update", "the Nash bargaining solution between the optimizer's updates"),
    Method("marigold", "MARIGOLD", "direction", "bi-level balancing from forward passes"),
)
# fmt: on


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_BY_NAME = {_plain(name): method for method in TABLE for name in (method.key, *method.aliases)}


def available() -> list[str]:
    """The names that `fastmto.get` takes, without their aliases.

    Example:
        >>> import fastmto
        >>> "nashmtl" in fastmto.available()
        True
    """
    return [method.key for method in TABLE if method.name]


def find(name: object, argument: str = "name", *, gram: bool = False) -> Method:
    """The method of a name.

    Args:
        name: a key or an alias; upper case, "-" and "_" do not matter.
        argument: what the caller calls the name, for the message.
        gram: whether it has to be a weighting, not a balancer.

    Raises:
        ValueError: no string, or no such method.
    """
    if not isinstance(name, str):
        raise ValueError(f"{argument} must be a string, got {name!r}")
    method = _BY_NAME.get(_plain(name))
    if method is None or not (method.weighting if gram else method.name):
        keys = [m.key for m in TABLE if m.weighting] if gram else available()
        raise ValueError(f"{argument} must be one of {', '.join(keys)}, got {name!r}")
    return method

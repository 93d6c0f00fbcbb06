"""fastmto's weightings as TorchJD objects: `Weighting`, `Aggregator`, `Projector`.

    aggregator = Aggregator(fastmto.weightings.UPGrad())        # in place of torchjd's UPGrad()
    mtl_backward([loss_a, loss_b], features=features)
    jac_to_grad(trunk.parameters(), aggregator)

    weighting = Weighting(fastmto.weightings.UPGrad())          # in place of UPGradWeighting()
    losses.backward(weighting(engine.compute_gramian(losses)))

    torchjd.aggregation.UPGrad(projector=Projector())           # TorchJD's method, our solver

Against TorchJD 0.18. The weightings' docstrings say what they do otherwise than TorchJD's classes
of the same names. To get TorchJD's answers take `CAGrad(c, rescale=0)`, and on TorchJD's side
`QuadprogProjector(norm_eps=0.0, reg_eps=0.0)` for UPGrad and DualProj.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import torchjd.aggregation
    import torchjd.linalg
except ImportError as error:
    raise ImportError(
        f"fastmto.integrations.torchjd needs TorchJD: pip install 'fastmto[torchjd]' ({error})"
    ) from error

from .. import solvers, weightings
from ..errors import SolverError

GramWeighting = weightings.Weighting | str | Callable[[Tensor], Any]


class Weighting(torchjd.aggregation.Weighting[torchjd.linalg.PSDMatrix], torchjd.Stateful):
    """A TorchJD weighting: Gram matrix (T, T) -> weights (T,), of its dtype and on its device.

    A Gram matrix on an accelerator is synchronized with: the solvers run in float64 on the host.
    The weights carry no graph. State that the weighting keeps between calls (PCGrad's generator, a
    warm start) is part of `state_dict`.

    Args:
        weighting: of `fastmto.weightings`, its name ("upgrad"), or a function Gram -> weights;
            `weighting.result` is the solver's last answer.

    Raises:
        ValueError: something else than a weighting.
        SolverError: in a call: there are no weights for this Gram matrix; `status` says why.
            TorchJD returns zeros, equal or old weights instead, as the method has it: catch the
            error and leave out the step where a run has to go on.
    """

    def __init__(self, weighting: GramWeighting) -> None:
        super().__init__()
        self.weighting = weightings.as_weighting(weighting)

    def forward(self, gramian: Tensor, /) -> Tensor:
        with torch.no_grad():
            return self.weighting(gramian.detach())

    def reset(self) -> None:
        """Forget everything, as before the first call."""
        self.weighting.reset()

    def get_extra_state(self) -> dict[str, Any]:
        return self.weighting.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.weighting.load_state_dict(state)

    def extra_repr(self) -> str:
        return repr(self.weighting)


class Aggregator(torchjd.aggregation.GramianWeightedAggregator, torchjd.Stateful):
    """A TorchJD aggregator: Jacobian (T, P) -> the combination (P,) of its rows.

    The Gram matrix is computed by TorchJD, in the Jacobian's dtype; it is passed over twice, as
    with TorchJD's own Gram-based aggregators, and `optimize_gramian_computation=True` works.

    Args:
        weighting: as `Weighting`.

    Raises:
        SolverError: in a call, as `Weighting`.
    """

    def __init__(self, weighting: GramWeighting) -> None:
        super().__init__(Weighting(weighting))

    def reset(self) -> None:
        """Forget everything, as before the first call."""
        self.gramian_weighting.reset()

    def __repr__(self) -> str:
        return f"Aggregator({self.gramian_weighting.weighting!r})"

    def __str__(self) -> str:
        return type(self.gramian_weighting.weighting).__name__


class Projector(torchjd.linalg.DualConeProjector):
    """Projections onto the dual cone by `fastmto.solvers.dual_cone`.

    For every u of U (..., T), with J the matrix whose Gram matrix is G (T, T): the weights v of
    the projection of J'u,

        min_v v'Gv   s.t.  v >= u

    (Quinton and Rey, arXiv 2406.16232, Proposition 1). TorchJD's `QuadprogProjector` divides G by
    its trace and adds `reg_eps = 1e-4` to the diagonal; nothing is added here, so the two agree
    for `QuadprogProjector(norm_eps=0.0, reg_eps=0.0)`, which needs a G that is well conditioned.

    Raises:
        SolverError: in a call: G is not the Gram matrix of anything finite; `status` says why.
    """

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        gram = G.detach().to("cpu", torch.float64)
        references = U.detach().to("cpu", torch.float64)
        weights = torch.empty_like(references)
        flat = (x.view(-1, len(gram)) for x in (references, weights))
        for reference, out in zip(*flat, strict=True):
            result = solvers.dual_cone(gram, reference)
            if result.weights is None:
                raise SolverError(
                    f"no projection onto the dual cone: {result.status}", result.status
                )
            out.copy_(result.weights)
        return weights.to(G.device, G.dtype)

    def __repr__(self) -> str:
        return "Projector()"

"""fastmto's balancers as LibMTL weightings, for LibMTL's `Trainer`.

    Trainer(weighting=weighting("cagrad"), weight_args={"calpha": 0.5, "rescale": 1}, ...)
    register("CAGrad")              # for Trainers that take names: replaces LibMTL's own CAGrad

Against LibMTL 1.1.5 (PyPI), whose Trainer takes classes, and LibMTL's repository, whose Trainer
takes names.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

try:
    import LibMTL.weighting
    from LibMTL.weighting.abstract_weighting import AbsWeighting
except ImportError as error:
    raise ImportError(
        "fastmto.integrations.libmtl needs LibMTL: pip install 'fastmto[libmtl]', or its "
        "repository, where LibMTL 1.1.5 cannot be imported because torchvision (0.13 and later) "
        f"has no torchvision.models.utils ({error})"
    ) from error

from ..balancers import (
    DBMTL,
    DWA,
    Balancer,
    GradientBalancer,
    GradNorm,
    GramBalancer,
    Info,
    LossBalancer,
    NashMTL,
    registry,
)

#: LibMTL's names of `weight_args` -> the balancers' own. None: has no counterpart here, because
#: the solvers are exact.
RENAMED: dict[str, str | None] = {
    "T": "temp",
    "mgda_gn": "normalization",
    "calpha": "c",
    "optim_niter": None,
    "FairGrad_alpha": "alpha",
    "DB_beta": "beta",
    "DB_beta_sigma": "decay",
    "FAMO_w_lr": "lr",
    "FAMO_w_gamma": "gamma",
    "UPGrad_norm_eps": None,
    "UPGrad_reg_eps": None,
}

#: Where LibMTL's method is not what the balancer does by default: its heads learn by the weighted
#: loss, its epochs are the Trainer's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nashmtl": {"heads": "weighted"},
    "fairgrad": {"heads": "weighted"},
    "dwa": {"window": None},
}


def weighting(name: str, **options: Any) -> type[BalancerWeighting]:
    """The class of a balancer for the `weighting` argument of LibMTL's `Trainer`.

    Args:
        name: as `fastmto.get`, LibMTL's spellings included ("EW", "Nash_MTL", "Aligned_MTL").
        options: of the balancer, before what `weight_args` says.
    """
    method = registry.method(name)
    options = {**DEFAULTS.get(method.key, {}), **options}
    return type(method.__name__, (BalancerWeighting,), {"method": method, "options": options})


def register(*names: str) -> None:
    """Put weightings among LibMTL's own, under exactly these names.

    A Trainer that looks its weighting up by name, and `prepare_args`, which refuses names that it
    does not know, then take ours. Names that LibMTL has are replaced for this process.
    """
    for name in names:
        setattr(LibMTL.weighting, name, weighting(name))


class BalancerWeighting(AbsWeighting):
    """A balancer in the place of a LibMTL weighting; `weighting` makes a class for each.

    `weight_args` of the Trainer are the balancer's options, in LibMTL's spelling or the
    balancer's; they count from the first `backward` on. Learnable parameters (UW, IMTL, ...) are
    parameters of LibMTL's model, so its optimizer moves them and its checkpoints hold them; the
    rest of the balancer's state is in `state_dict` as well.

    With `rep_grad=True` gradients are compared at the representations, one pass through the
    encoder per step. As in LibMTL a task's gradient is summed over the batch before: the Gram
    matrix is that of a common shift of all representations. A method that does not combine
    gradients by weights (GradDrop, DB-MTL) takes the representation as it is and needs it to be
    one for all tasks.

    Differences from LibMTL's methods of the same names: RLW's and Aligned-MTL's weights are T
    times and 1/T times LibMTL's; MGDA's normalised gradients only serve to find weights; GradDrop
    needs no `rep_grad` and does not multiply by the representation's sign; GradNorm's weights are
    no parameters of the model and count from the first epoch; PCGrad and GradDrop draw from
    generators of their own; UW starts from 0 (LibMTL from -0.5: `weighting("UW", init=-0.5)`);
    FAMO and MARIGOLD's "reuse" are given the next batch's losses, unless `update_w` is called.

    Attributes:
        balancer: `fastmto.balancers.Balancer`, with weights, stats and so on.
        info: `fastmto.balancers.Info` of the last step; None before.
    """

    method: ClassVar[type[Balancer]]
    options: ClassVar[dict[str, Any]]

    def init_param(self) -> None:
        self.info: Info | None = None
        self._args: dict[str, Any] | None = None
        self._epoch = 0
        self.balancer = self._built({})
        for k, parameter in enumerate(self.balancer.parameters()):
            self.register_parameter(f"balancer_{k}", parameter)

    def _built(self, args: dict[str, Any]) -> Balancer:
        """The balancer with options from `weight_args`."""
        options = dict(self.options)
        for name, value in args.items():
            own = RENAMED.get(name, name)
            if own is not None:
                options[own] = value
        if isinstance(options.get("leak"), int | float):
            options["leak"] = [options["leak"]] * self.task_num
        if "dist" in options and options.pop("dist") != "Normal":
            raise ValueError(f"dist must be 'Normal', got {args['dist']!r}")
        if "device" in inspect.signature(self.method).parameters:
            options.setdefault("device", self.device)
        if self.rep_grad and self.method is DBMTL:
            raise ValueError("rep_grad must be False for DBMTL: it smooths gradients over batches")
        if self.rep_grad and issubclass(self.method, GradientBalancer):
            options["level"] = "features"
        elif self.rep_grad and not issubclass(self.method, LossBalancer):
            raise ValueError(f"rep_grad must be False for {self.method.__name__}")
        # The published clip is of the shared gradient alone: `backward` makes it, not the weights.
        self._max_norm = 0.0
        if issubclass(self.method, NashMTL):
            self._max_norm = options.pop("max_norm", 1.0) or 0.0
            options["max_norm"] = None
        return self.method(self.task_num, **options)

    def backward(self, losses: Tensor, **weight_args: Any) -> Any:
        """Balanced gradients into `.grad`.

        Args:
            losses: (T,), as the Trainer has them.
            weight_args: the Trainer's.

        Returns:
            numpy (T,), what the losses were multiplied by; for Nash-MTL before the clip.
        """
        if weight_args != self._args:
            self._take(weight_args)
        if isinstance(self.balancer, DWA) and self.balancer.window is None:
            for _ in range(self._epoch, self.epoch):
                self.balancer.end_epoch()
            self._epoch = self.epoch
        balancer: Any = self.balancer
        if balancer.needs_update and balancer.stats["steps"]:
            balancer.update(losses.detach())
        shared = [p for p in self.get_share_params() if p.requires_grad]
        if self.rep_grad:
            self._at_representations(losses, shared)
        else:
            _, self.info = self.balancer.backward(losses, shared, self._heads(shared), shared)
        assert self.info is not None
        if self._max_norm > 0 and self.info.skipped is None:
            torch.nn.utils.clip_grad_norm_(shared, self._max_norm)
        assert self.balancer.weights is not None
        return self.balancer.weights.to("cpu", torch.float64, copy=True).numpy()

    def update_w(self, losses: Tensor) -> None:
        """The losses after the step, for the methods with `update`, as LibMTL's FAMO has it."""
        balancer: Any = self.balancer
        if not hasattr(balancer, "update"):
            raise TypeError(f"{type(balancer).__name__} takes no losses after the step")
        balancer.update(losses.detach())

    def _take(self, args: dict[str, Any]) -> None:
        """New `weight_args`, at the first step: build the balancer anew, with what it has."""
        if args:
            state = self.balancer.state_dict()
            fresh = self._built(args)
            if fresh.parameters():
                raise ValueError(
                    f"weight_args must be empty for {self.method.__name__}, whose parameters the "
                    f"optimizer already has: give them to weighting(...), got {args}"
                )
            fresh.load_state_dict(state)
            self.balancer = fresh
        self._args = dict(args)

    def _heads(self, shared: list[Tensor]) -> list[Tensor]:
        beyond = {id(p) for p in (*shared, *self.balancer.parameters())}
        return [p for p in self.parameters() if id(p) not in beyond]

    def _at_representations(self, losses: Tensor, shared: list[Tensor]) -> None:
        """Heads first, from leaves in the place of the representations; then the encoder once."""
        leaves = [self.rep_tasks[task] for task in self.task_name]
        apart = isinstance(self.rep, dict)
        reps = [self.rep[task] if apart else self.rep for task in self.task_name]
        balancer = self.balancer
        if isinstance(balancer, LossBalancer) and not isinstance(balancer, GradNorm):
            _, self.info = balancer.backward(losses)
            joint = [leaf.grad for leaf in leaves]
        else:
            grads = [
                torch.autograd.grad(loss, leaf, retain_graph=True)[0]
                for loss, leaf in zip(losses, leaves, strict=True)
            ]
            by_weights = isinstance(balancer, GramBalancer | LossBalancer)
            if not by_weights and any(rep is not reps[0] for rep in reps):
                raise ValueError(
                    f"{self.method.__name__} needs one representation for all tasks with "
                    f"rep_grad=True, got {len({id(rep) for rep in reps})}"
                )
            rows = [grad.sum(0).flatten() if by_weights else grad for grad in grads]
            # A leaf at which task i has the gradient rows[i], on top of its own head.
            at = torch.zeros_like(rows[0], requires_grad=True)
            lifted = [loss + (at * row).sum() for loss, row in zip(losses, rows, strict=True)]
            _, self.info = balancer.backward(lifted, None, self._heads(shared), [at], at)
            if by_weights:
                assert balancer.weights is not None
                weights = balancer.weights.to(losses.device, losses.dtype)
                joint = [weight * grad for weight, grad in zip(weights, grads, strict=True)]
            else:
                reps, joint = reps[:1], [at.grad]
        if self.info.skipped is None:
            _through(reps, joint)

    def get_extra_state(self) -> dict[str, Any]:
        return self.balancer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.balancer.load_state_dict(state)


def _through(reps: list[Tensor], grads: list[Tensor]) -> None:
    """One pass from the representations; those that are one tensor get the sum."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for rep, grad in zip(reps, grads, strict=True):
        sums[id(rep)] = (rep, sums[id(rep)][1] + grad) if id(rep) in sums else (rep, grad)
    roots, joint = zip(*sums.values(), strict=True)
    torch.autograd.backward(roots, joint)

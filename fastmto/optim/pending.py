"""What stands between `backward` and `step`: the kind of gradients, their scale, and `.grad`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .update_level import UpdateLevel

if TYPE_CHECKING:
    from .update_balancer import UpdateBalancer


class Pending:
    """The gradients that `backward` took and `step` has not applied yet.

    The rows of gradients are shown in `.grad`: a head's gradient as it is; of the shared
    parameters the first row, which is the joint gradient between two searches and one task's in a
    search. It is there so that a change of it is noticed: the update is made from all rows, and a
    change of one of them could not take effect as it was meant.

    Attributes:
        kind: None, "per_task", "weighted", or "refused" if a loss was not finite.
        scaler: the GradScaler whose scale the gradients carry, or None.
        extra: whether there is a row of an unbalanced loss behind the tasks' rows.
    """

    def __init__(self) -> None:
        self._shown: list[Tensor | None] = []
        self._versions: list[int] = []
        self.clear()

    def forget_shown(self, level: UpdateLevel) -> None:
        """Take what is shown out of `.grad`: buffers are about to be laid out anew."""
        for p, grad in zip(level.parameters, self._shown, strict=False):
            if p.grad is grad:
                p.grad = None
        self._shown, self._versions = [], []

    def clear(self) -> None:
        """Forget the gradients; what is shown stays."""
        self.kind: str | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.extra = False

    def begin(self, kind: str, scaler: torch.amp.GradScaler | None) -> None:
        self.kind = kind
        self.scaler = scaler

    def show(self, level: UpdateLevel) -> None:
        """Put the gradients into `.grad`."""
        gradients = level.gradients
        assert gradients is not None
        shown: list[Tensor | None] = [*level.shown]
        for views, has_grad in zip(level.head_shown, gradients.has_grad, strict=True):
            shown += views if has_grad else [None] * len(views)
        if level.has_frozen:
            trainable = [p.requires_grad for p in level.parameters]
            shown = [x if on else None for x, on in zip(shown, trainable, strict=True)]
        for p, grad in zip(level.parameters, shown, strict=True):
            if p.grad is not grad:
                p.grad = grad
        self._shown = shown
        self.remember()

    def remember(self) -> None:
        """Later changes are told from what is there now."""
        self._versions = [0 if grad is None else grad._version for grad in self._shown]

    def check_untouched(self, level: UpdateLevel) -> None:
        """Before `backward`: no `.grad` that would be lost.

        Raises:
            RuntimeError: a parameter has a gradient from elsewhere.
        """
        shown: Sequence[Tensor | None] = self._shown or [None] * len(level.parameters)
        versions: Sequence[int] = self._versions or [0] * len(shown)
        pending = self.kind is not None
        for p, grad, version in zip(level.parameters, shown, versions, strict=True):
            now = p.grad
            if now is None:
                lost = pending and grad is not None
            else:
                lost = now is not grad or now._version != version
                # Zeros are nothing to lose: a model's `zero_grad(set_to_none=False)` leaves them.
                lost = lost and (pending or bool(now.any()))
            if lost:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a .grad from another backward or "
                    "changed since, which would be lost: give that loss to backward(losses, "
                    "unbalanced=loss), or call zero_grad() of this optimizer before"
                )

    def check_unchanged(self, level: UpdateLevel) -> None:
        """Before the step: what `backward` left in `.grad` is still that. A GradScaler's `unscale_`
        does not count: it writes behind autograd's back. A head's `.grad` is what is applied, so
        it may be written to.

        Raises:
            RuntimeError: naming the arguments that do what was probably meant.
        """
        if self.kind == "refused":
            return
        n_shared = len(level.shown)
        for k, (p, grad) in enumerate(zip(level.parameters, self._shown, strict=True)):
            now = p.grad
            if now is not grad or (
                now is not None and k < n_shared and now._version != self._versions[k]
            ):
                raise RuntimeError(
                    f"the .grad of a parameter of shape {tuple(p.shape)} was changed between "
                    "backward and step, which cannot take effect: updates are made from all "
                    "tasks' gradients. Clip by clip_norm= or clip_task_norm= of the optimizer, "
                    "add losses by backward(losses, unbalanced=loss), and forget gradients by "
                    "zero_grad() of this optimizer"
                )

    def unscale(self, optimizer: UpdateBalancer) -> Tensor | None:
        """Divide a GradScaler's scale out of the gradients, which tells it what is not finite.

        Nothing has changed when this raises.

        Returns:
            What a GradScaler saw; 0 without gradients. None without one.

        Raises:
            RuntimeError: a GradScaler that `backward` was not given, or one that was and does not
                make this call; a `.grad` that was changed.
        """
        called = hasattr(optimizer, "found_inf")
        scaler = self.scaler
        if scaler is None and called:
            raise RuntimeError(
                f"{type(optimizer).__name__}.backward must be given the GradScaler that steps it: "
                "optimizer.backward(losses, scaler=scaler), with losses that are not scaled"
            )
        if scaler is not None and not called:
            raise RuntimeError(
                "the gradients are scaled: call scaler.step(optimizer) in place of optimizer.step()"
            )
        # Without a scale the caller has called `scaler.unscale_(optimizer)`, which saw `.grad`.
        unscaled = scaler is not None and optimizer.grad_scale is None  # type: ignore[attr-defined]
        self.check_unchanged(optimizer._level)
        if scaler is None:
            return None
        # The scaler knows it by its identity until the next step.
        self._carrier = _Carrier(self._scaled(optimizer._level, unscaled))
        scaler.unscale_(self._carrier)  # type: ignore[arg-type]
        overflow: Any = optimizer.found_inf  # type: ignore[attr-defined]
        return overflow if isinstance(overflow, Tensor) else None

    def _scaled(self, level: UpdateLevel, unscaled: bool) -> list[Tensor]:
        """The gradients that carry the scale."""
        gradients = level.gradients
        assert gradients is not None
        if self.kind == "refused":
            return [torch.full((1,), math.inf, device=level.device)]  # like the loss
        rows = 1 if self.kind == "weighted" else len(gradients.reached_shared) + self.extra
        if not unscaled:
            filled = zip(gradients.head_rows, gradients.has_grad, strict=True)
            heads = [head[0] for head, on in filled if on]
            return [*(row for each in gradients.rows for row in each[:rows]), *heads]
        # Of frozen and unreached parameters `.grad` shows nothing, and their rows are 0.
        return [row for each in gradients.rows for row in each[1:rows]]


class _Carrier:
    """Gradients in the shape in which a GradScaler looks for them: an optimizer's parameters."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.param_groups = [{"params": [grad.detach() for grad in grads]}]
        for param, grad in zip(self.param_groups[0]["params"], grads, strict=True):
            param.grad = grad

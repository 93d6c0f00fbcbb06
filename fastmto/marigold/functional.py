"""A closure that can be evaluated at many parameter vectors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..engine.losses import Losses


class FunctionalClosure:
    """The losses of one batch as a function of a module's parameters.

    It can be evaluated in a batch, and its module's buffers are known without looking for them,
    which `torch.compile` needs.

        closure = fastmto.FunctionalClosure(model, lambda model: task_losses(model, batch))

    Called without arguments it is an ordinary closure. `batched` evaluates it at R parameter
    vectors in one forward by `torch.func.vmap`: the model is called with stacked parameters.

    Args:
        module: the model, with every module that the losses use.
        losses: computes the T losses with the module that it is given; it must not use the model
            by another name.
    """

    def __init__(self, module: nn.Module, losses: Callable[[nn.Module], Losses]) -> None:
        self.module = module
        self.losses = losses

    def __call__(self) -> Losses:
        return self.losses(self.module)

    def batched(
        self,
        parameters: Sequence[Tensor],
        stacked: Sequence[Tensor],
        read: Callable[[Losses], Tensor],
    ) -> Tensor:
        """The losses at R points.

        Dropout draws the same mask for all points. Modules that update their buffers (BatchNorm
        in training mode), data-dependent control flow and some recurrent layers cannot be
        vectorised.

        Args:
            parameters: those that vary, of the module.
            stacked: for each, (R, *shape); read only.
            read: makes a tensor (n,) of what the closure returned.

        Returns:
            (R, n).

        Raises:
            ValueError: a parameter is not the module's.
            RuntimeError: torch.func cannot vectorise the model.
        """
        names = {id(p): name for name, p in self.module.named_parameters()}
        for k, p in enumerate(parameters):
            if id(p) not in names:
                raise ValueError(
                    f"shared_parameters[{k}] (shape {tuple(p.shape)}) must be a parameter of the "
                    "FunctionalClosure's module to be evaluated in a batch"
                )
        holder = _Losses(self.module, self.losses)

        def at(values: dict[str, Tensor]) -> Tensor:
            return read(functional_call(holder, values, ()))

        values = {
            f"module.{names[id(p)]}": rows for p, rows in zip(parameters, stacked, strict=True)
        }
        try:
            return vmap(at, randomness="same")(values)
        except RuntimeError as error:
            raise RuntimeError(
                "evaluation='batched' failed: torch.func could not evaluate the closure at "
                f"{len(stacked[0])} points at once ({str(error).splitlines()[0]}); use "
                "evaluation='sequential'"
            ) from error


class _Losses(nn.Module):
    """A module whose forward is the closure, for `functional_call`."""

    def __init__(self, module: nn.Module, losses: Callable[[nn.Module], Losses]) -> None:
        super().__init__()
        self.module = module
        self.losses = losses

    def forward(self) -> Losses:
        return self.losses(self.module)

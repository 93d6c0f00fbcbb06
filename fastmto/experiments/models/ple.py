"""Progressive layered extraction (Tang et al., RecSys 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .base import MultiTaskModel, TabularEncoder, tower
from .mmoe import Experts


def mix(gate: nn.Module, x: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """sum_e softmax(gate(x))_e expert_e.

    Args:
        gate: x (B, fan_in) -> (B, E).
        x: what the gate reads.
        experts: outputs (B, E_k, width) of groups of experts, E = sum_k E_k.

    Returns:
        (B, width).
    """
    shares: Tensor = gate(x).softmax(dim=1)
    return (shares.unsqueeze(1) @ torch.cat(list(experts), dim=1)).squeeze(1)


class Extraction(nn.Module):
    """The experts and gates of one extraction layer.

    Args:
        n_tasks: T.
        fan_in: width of every input.
        width: of every expert, one linear layer and a ReLU.
        n_shared: experts that all tasks share.
        n_own: experts of each task.
        last: no layer follows, so that nothing reads a shared output and it has no gate.
    """

    def __init__(
        self, n_tasks: int, fan_in: int, width: int, n_shared: int, n_own: int, last: bool
    ) -> None:
        super().__init__()
        self.shared = Experts(n_shared, fan_in, [width])
        self.own = nn.ModuleList(Experts(n_own, fan_in, [width]) for _ in range(n_tasks))
        self.gates = nn.ModuleList(nn.Linear(fan_in, n_own + n_shared) for _ in range(n_tasks))
        self.shared_gate = None if last else nn.Linear(fan_in, n_tasks * n_own + n_shared)

    def own_outputs(self, tasks: Sequence[Tensor]) -> list[Tensor]:
        """Outputs (B, n_own, width) of each task's experts on its own input (B, fan_in)."""
        return [experts(t) for experts, t in zip(self.own, tasks, strict=True)]

    def mixed(self, tasks: Sequence[Tensor], own: Sequence[Tensor], common: Tensor) -> list[Tensor]:
        """Each task's mixture of its own experts' outputs and the shared ones'."""
        return [
            mix(gate, t, [mine, common])
            for gate, t, mine in zip(self.gates, tasks, own, strict=True)
        ]

    def mixed_shared(self, shared: Tensor, own: Sequence[Tensor], common: Tensor) -> Tensor:
        """The mixture of all experts' outputs, which the next layer's shared experts read."""
        assert self.shared_gate is not None
        return mix(self.shared_gate, shared, [*own, common])


class PLE(MultiTaskModel):
    """Layers of shared and of task experts; the deepest parts of every task are its own.

    With s^0 = t_j^0 = x the encoded row, layer l = 1..L makes, for every task j, and for the next
    layer's shared experts,

        t_j^l = sum_e softmax(gate_j^l(t_j^{l-1}))_e  [own_j^l(t_j^{l-1}), shared^l(s^{l-1})]_e
        s^l = sum_e softmax(gate^l(s^{l-1}))_e [own_1^l(t_1^{l-1}), ..., shared^l(s^{l-1})]_e

    and logits_j = tower_j(t_j^L).

    **Who owns what.** A parameter is a task's own if and only if no other task's loss reaches it,
    whatever the layer calls it. The shared gate of layer l mixes all tasks' experts into s^l, which
    all tasks read from layer l + 1 on. So below the top the tasks' experts are shared by all; the
    top layer's are their task's own. A task's gate is one layer further from the others: only its
    own task's loss reaches it in the top layer and in the one below; t_j^l of a layer below those
    feeds experts that others read. The released code of PUB counts all experts as shared, those of
    the top layer too, and has a shared gate on top that nothing reads.

    The shared representation is what the tasks' own parts see: in the layer below the top what the
    gates read (x itself, or t_j of each task where there are more than two layers), the outputs of
    the tasks' and of the shared experts; in the top layer the outputs of the shared experts. With
    one layer, x and the outputs of its shared experts. The last shared layer is the top layer's
    shared experts.

    The defaults are the sizes of PUB's experiments (arXiv 2410.05806, VI-A3), without the batch
    normalisation and the dropout of its code.

    Args:
        n_dense: number of dense columns.
        field_sizes: known values of each categorical field.
        n_outputs: logits of each of the T tasks.
        embedding: width of an embedding vector.
        extraction_widths: width of the experts of each extraction layer, L of them.
        n_shared_experts: shared experts of a layer.
        n_task_experts: experts a task of a layer.
        tower_widths: widths of each task's hidden layers.

    Raises:
        ValueError: no layer, or no expert of a kind.
    """

    def __init__(
        self,
        n_dense: int,
        field_sizes: Sequence[int],
        n_outputs: Sequence[int],
        *,
        embedding: int = 128,
        extraction_widths: Sequence[int] = (512, 256),
        n_shared_experts: int = 4,
        n_task_experts: int = 4,
        tower_widths: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        if len(extraction_widths) == 0:
            raise ValueError("extraction_widths must name at least one layer, got none")
        if n_shared_experts < 1 or n_task_experts < 1:
            raise ValueError(
                "n_shared_experts and n_task_experts must be >= 1, got "
                f"{n_shared_experts} and {n_task_experts}"
            )
        self.encoder = TabularEncoder(n_dense, field_sizes, embedding)
        fans_in = [self.encoder.width, *extraction_widths[:-1]]
        self.layers = nn.ModuleList(
            Extraction(
                len(n_outputs),
                fan_in,
                width,
                n_shared_experts,
                n_task_experts,
                last=number == len(extraction_widths),
            )
            for number, (fan_in, width) in enumerate(
                zip(fans_in, extraction_widths, strict=True), start=1
            )
        )
        self.towers = nn.ModuleList(
            tower([extraction_widths[-1], *tower_widths], n) for n in n_outputs
        )

    @property
    def _layers(self) -> list[Extraction]:
        return cast("list[Extraction]", list(self.layers))

    def represent(self, dense: Tensor, categorical: Tensor) -> list[Tensor]:
        x = self.encoder(dense, categorical)
        shared, tasks = x, [x] * len(self.towers)
        *lower, top = self._layers
        seen = [x]
        for number, layer in enumerate(lower, start=1):
            own, common = layer.own_outputs(tasks), layer.shared(shared)
            if number == len(lower):
                seen = [*([x] if number == 1 else tasks), *own, common]
            else:
                tasks = layer.mixed(tasks, own, common)
            shared = layer.mixed_shared(shared, own, common)
        # Nodes of their own: a loss's gradient by them has the way through the gates alone.
        return [*(tensor.view_as(tensor) for tensor in seen), top.shared(shared)]

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        n_tasks = len(self.towers)
        *lower, top = self._layers
        *seen, top_common = features
        if lower:
            common = seen[-1]
            own, read = seen[-1 - n_tasks : -1], seen[: -1 - n_tasks]
            tasks = read if len(lower) > 1 else read * n_tasks
            tasks = lower[-1].mixed(tasks, own, common)
        else:
            tasks = seen * n_tasks
        tops = top.mixed(tasks, top.own_outputs(tasks), top_common)
        return [head(t).squeeze(1) for head, t in zip(self.towers, tops, strict=True)]

    def task_modules(self) -> list[list[nn.Module]]:
        *lower, top = self._layers
        below = [layer.gates for layer in lower[-1:]]
        return [list(own) for own in zip(*below, top.own, top.gates, self.towers, strict=True)]

    def last_shared_parameters(self) -> list[nn.Parameter]:
        return self._layers[-1].shared.last_parameters()

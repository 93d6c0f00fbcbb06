"""Multi-gate mixture of experts (Ma et al., KDD 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .base import MultiTaskModel, TabularEncoder, tower


class Experts(nn.Module):
    """E expert networks of the same widths, as a few large products instead of E small ones.

    The first layers of all experts read the same input and are one linear layer of E times the
    width; later layers are a batched product. Initialised like E separate stacks of `nn.Linear`.

    Args:
        n_experts: E.
        fan_in: width of the input.
        widths: widths of each expert's layers, a ReLU after each.
    """

    def __init__(self, n_experts: int, fan_in: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.first = nn.Linear(fan_in, n_experts * widths[0])
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for width, following in pairwise(widths):
            bound = 1 / math.sqrt(width)
            self.weights.append(torch.empty(n_experts, width, following).uniform_(-bound, bound))
            self.biases.append(torch.empty(n_experts, 1, following).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(B, fan_in) -> (B, E, widths[-1])."""
        h: Tensor = self.first(x).relu().unflatten(1, (self.n_experts, -1))
        if len(self.weights) == 0:
            return h
        h = h.transpose(0, 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = torch.baddbmm(bias, h, weight).relu()
        return h.transpose(0, 1)

    def last_parameters(self) -> list[nn.Parameter]:
        """The weights and biases of the last layer of all experts."""
        if len(self.weights) == 0:
            return list(self.first.parameters())
        return [self.weights[-1], self.biases[-1]]


class MMOE(MultiTaskModel):
    """logits_i = tower_i(sum_e softmax(gate_i(x))_e expert_e(x)), x the encoded row.

    Embeddings, the dense layer and the experts are shared; a task's gate and tower are its own.
    The shared representation is what those see: x as the gates read it (B, width), apart from x
    as the experts read it, and the experts' outputs (B, E, expert_widths[-1]). A gate's own output
    is no part of it: it is made by the task's own parameters. The last shared layer is the
    experts' last one.

    Args:
        n_dense: number of dense columns.
        field_sizes: known values of each categorical field.
        n_outputs: logits of each of the T tasks.
        embedding: width of an embedding vector.
        n_experts: E.
        expert_widths: widths of each expert's layers.
        tower_widths: widths of each task's hidden layers.
    """

    def __init__(
        self,
        n_dense: int,
        field_sizes: Sequence[int],
        n_outputs: Sequence[int],
        *,
        embedding: int = 16,
        n_experts: int = 8,
        expert_widths: Sequence[int] = (128,),
        tower_widths: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.encoder = TabularEncoder(n_dense, field_sizes, embedding)
        self.experts = Experts(n_experts, self.encoder.width, expert_widths)
        self.gates = nn.ModuleList(nn.Linear(self.encoder.width, n_experts) for _ in n_outputs)
        self.towers = nn.ModuleList(tower([expert_widths[-1], *tower_widths], n) for n in n_outputs)

    def represent(self, dense: Tensor, categorical: Tensor) -> list[Tensor]:
        x = self.encoder(dense, categorical)
        # A node of its own: a loss's gradient by it has the way through the gates alone.
        return [x.view_as(x), self.experts(x)]

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        x, experts = features
        gates = torch.stack([gate(x) for gate in self.gates], dim=1).softmax(dim=2)  # (B, T, E)
        mixed = gates @ experts  # (B, T, width)
        return [
            head(own).squeeze(1) for head, own in zip(self.towers, mixed.unbind(1), strict=True)
        ]

    def task_modules(self) -> list[list[nn.Module]]:
        return [list(pair) for pair in zip(self.gates, self.towers, strict=True)]

    def last_shared_parameters(self) -> list[nn.Parameter]:
        return self.experts.last_parameters()

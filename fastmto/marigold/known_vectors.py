"""The vectors that the estimator "span" goes along: old task gradients, or past joint gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Vector = list[Tensor]


class KnownVectors:
    """At most K vectors of the shape of the shared parameters, each in pieces.

    Attributes:
        vectors: those known so far; replaced, never written to.
    """

    def __init__(self) -> None:
        self.vectors: list[Vector] = []
        self._loaded: list[Tensor] = []
        self._shared: list[Tensor] = []
        self._parked: dict[int, dict[Tensor, Tensor]] = {}  # pieces of frozen parameters

    def __len__(self) -> int:
        return len(self.vectors) or len(self._loaded)

    def bind(self, shared: Sequence[Tensor]) -> None:
        """Give the vectors of a loaded state the parameters' shapes and devices.

        Raises:
            ValueError: they are of another number of parameters.
        """
        if not self._loaded:
            self._follow(shared)
            return
        self._shared = list(shared)
        sizes = [p.numel() for p in shared]
        for vector in self._loaded:
            if len(vector) != sum(sizes):
                raise ValueError(
                    f"state_dict must be of {sum(sizes)} shared parameters, got vectors of "
                    f"{len(vector)}"
                )
        self.vectors = [
            [
                piece.view(p.shape).to(p.device, p.dtype)
                for piece, p in zip(torch.split_with_sizes(vector, sizes), shared, strict=True)
            ]
            for vector in self._loaded
        ]
        self._loaded = []

    def _follow(self, shared: Sequence[Tensor]) -> None:
        """Parameters were frozen, or brought back: their pieces leave the vectors and return."""
        before, self._shared = self._shared, list(shared)
        if [id(p) for p in before] == [id(p) for p in shared]:
            return
        for k, vector in enumerate(self.vectors):
            pieces = {**self._parked.get(k, {}), **dict(zip(before, vector, strict=True))}
            self.vectors[k] = [pieces.pop(p, torch.zeros_like(p.detach())) for p in shared]
            self._parked[k] = pieces

    def append(self, vector: Sequence[Tensor | None], shared: Sequence[Tensor], most: int) -> None:
        """Take a vector up as the newest; the oldest beyond `most` are forgotten."""
        self.vectors = [*self.vectors, _copy(vector, shared)][-most:]
        self._parked.clear()  # of vectors in other places

    def take_gradients(
        self, losses: Sequence[Tensor], tasks: Sequence[int], n_tasks: int, shared: Sequence[Tensor]
    ) -> None:
        """One backward a present task; the vectors of absent tasks stay what they were."""
        vectors = self.vectors or [_copy([None] * len(shared), shared) for _ in range(n_tasks)]
        for i, loss in zip(tasks, losses, strict=True):
            grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
            vectors[i] = _copy(grads, shared)
        self.vectors = vectors

    def inner(self) -> Tensor:
        """VV' (K, K), float64 on the CPU."""
        k = len(self.vectors)
        inner = torch.zeros(k, k, dtype=torch.float64)
        for i in range(k):
            for j in range(i + 1):
                inner[i, j] = inner[j, i] = sum(
                    float((a.double() * b).sum())
                    for a, b in zip(self.vectors[i], self.vectors[j], strict=True)
                )
        return inner

    def state_dict(self) -> dict[str, Any]:
        vectors = self._loaded or [
            torch.cat([piece.reshape(-1).cpu() for piece in vector]) for vector in self.vectors
        ]
        return {"vectors": [vector.clone() for vector in vectors]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vectors = []
        self._loaded = [vector.clone() for vector in state["vectors"]]


def _copy(vector: Sequence[Tensor | None], shared: Sequence[Tensor]) -> Vector:
    return [
        torch.zeros_like(p) if piece is None else piece.detach().clone()
        for p, piece in zip(shared, vector, strict=True)
    ]

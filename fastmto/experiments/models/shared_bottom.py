"""One trunk for all tasks, one tower a task (Caruana, 1997)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import MultiTaskModel, TabularEncoder, mlp, tower


class SharedBottom(MultiTaskModel):
    """logits_i = tower_i(bottom(x)), x the encoded row.

    The shared representation is bottom(x), one tensor (B, bottom[-1]); the last shared layer is
    the bottom's last one, or the encoder where there is no bottom.

    Args:
        n_dense: number of dense columns.
        field_sizes: known values of each categorical field.
        n_outputs: logits of each of the T tasks.
        embedding: width of an embedding vector.
        bottom: widths of the shared layers.
        tower_widths: widths of each task's hidden layers.
    """

    def __init__(
        self,
        n_dense: int,
        field_sizes: Sequence[int],
        n_outputs: Sequence[int],
        *,
        embedding: int = 16,
        bottom: Sequence[int] = (256, 128),
        tower_widths: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        self.encoder = TabularEncoder(n_dense, field_sizes, embedding)
        self.bottom = mlp([self.encoder.width, *bottom])
        width = [self.encoder.width, *bottom][-1]
        self.towers = nn.ModuleList(tower([width, *tower_widths], n) for n in n_outputs)

    def represent(self, dense: Tensor, categorical: Tensor) -> list[Tensor]:
        return [self.bottom(self.encoder(dense, categorical))]

    def heads(self, features: Sequence[Tensor]) -> list[Tensor]:
        (shared,) = features
        return [head(shared).squeeze(1) for head in self.towers]

    def task_modules(self) -> list[list[nn.Module]]:
        return [[head] for head in self.towers]

    def last_shared_parameters(self) -> list[nn.Parameter]:
        linear = [layer for layer in self.bottom if isinstance(layer, nn.Linear)]
        return list((linear[-1] if linear else self.encoder).parameters())

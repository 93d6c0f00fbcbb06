"""Flat parameters: many tensors, one contiguous buffer.

The kernels walk one long vector; the model keeps its tensors. A `FlatLayout` says where each
tensor's elements lie in such a vector; `FlatParameters` also moves the parameters into one buffer
and makes each show its piece of it, with the shape and strides it had and a storage of its own.
Names, tied weights, `state_dict` and in-place loading go on working; what replaces a parameter's
storage (`model.to(device)`, `p.data = ...`) does not, and `check` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.utils.dlpack
from torch import Tensor
from torch.nn import Parameter

#: Bytes. Every tensor starts on a cache line, so no two share one; in any dtype that is a multiple
#: of 16 elements, which lets the GPU kernels load 16 bytes at a time.
ALIGNMENT = 128


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def as_vector(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, shape (P,), sharing its storage."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def laid_like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, copied if its elements do not lie in memory as those of the dense `model` do."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Moments are float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def own_storage(view: Tensor) -> Tensor:
    """The same memory as a tensor whose storage covers just itself; shape and strides stay.

    Savers group tensors by storage: of slices of one buffer safetensors writes one and accelerate
    drops the others, and `torch.save` of one slice writes the whole buffer. The new storage keeps
    the buffer alive, and has a version counter of its own.

    Args:
        view: without gradient; of any strides, on any device that DLPack knows.
    """
    if not view.numel():
        return view.detach().clone()  # nothing to share
    alias: Tensor = torch.utils.dlpack.from_dlpack(view.detach())
    # DLPack leaves out what strides of axes of length 1 are.
    return alias if alias.stride() == view.stride() else alias.as_strided(view.shape, view.stride())


def _aligned_zeros(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """n zeros that start on a cache line."""
    spare = ALIGNMENT // dtype.itemsize
    storage = torch.zeros(n + spare, dtype=dtype, device=device)
    lead = -storage.data_ptr() % ALIGNMENT // dtype.itemsize
    return storage[lead : lead + n]


class FlatLayout:
    """Where the tensors of one group, dtype and device lie in a vector of length P.

    Args:
        parameters: dense parameters of one dtype on one device; not modified.

    Attributes:
        segments: (S+1,) int64 on the device; tensor s owns coordinates segments[s] to
            segments[s+1], the zeros up to the next cache line included.
        numel: number of parameters, those zeros not counted.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device
        step = ALIGNMENT // self.dtype.itemsize
        self.offsets = [0]
        for p in self.parameters:
            self.offsets.append(self.offsets[-1] + -(-p.numel() // step) * step)
        self.segments = torch.tensor(self.offsets, dtype=torch.int64, device=self.device)
        self.numel = sum(p.numel() for p in self.parameters)

    def __len__(self) -> int:
        """P, the zeros between tensors included."""
        return self.offsets[-1]

    def rows(self, n_rows: int, dtype: torch.dtype | None = None, fill: float = 0.0) -> Tensor:
        """A new buffer (n_rows, P), every row on a cache line.

        `fill` goes to the parameters' places; the places between them are zero.
        """
        dtype = self.dtype if dtype is None else dtype
        step = ALIGNMENT // dtype.itemsize
        pitch = -(-len(self) // step) * step
        rows = _aligned_zeros(n_rows * pitch, dtype, self.device)
        rows = rows.view(n_rows, pitch)[:, : len(self)]
        if fill:
            for view in self.stacked_views(rows):
                view.fill_(fill)
        return rows

    def views(self, vector: Tensor) -> list[Tensor]:
        """The pieces of a (P,) vector, each with its parameter's shape and strides."""
        return [
            vector[offset:].as_strided(p.shape, p.stride())
            for p, offset in zip(self.parameters, self.offsets[:-1], strict=True)
        ]

    def stacked_views(self, rows: Tensor) -> list[Tensor]:
        """The pieces of (T, P) rows, each of shape (T, *parameter.shape)."""
        return [
            rows[:, offset:].as_strided((len(rows), *p.shape), (rows.stride(0), *p.stride()))
            for p, offset in zip(self.parameters, self.offsets[:-1], strict=True)
        ]


class FlatParameters(FlatLayout):
    """A layout whose parameters live in its buffer.

    Args:
        parameters: as for `FlatLayout`; their `.data` becomes pieces of the buffer, values
            unchanged.

    Attributes:
        data: the buffer (P,).
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        self.data = self.rows(1)[0]
        with torch.no_grad():
            for p, view in zip(self.parameters, self.views(self.data), strict=True):
                view.copy_(p)
                p.data = own_storage(view)
        self._pointers = [p.data_ptr() for p in self.parameters]

    def check(self, label: str) -> None:
        """Refuse to go on when a parameter has left the buffer.

        Args:
            label: what the parameters are called in the message.

        Raises:
            RuntimeError: naming the first such parameter and what to do.
        """
        for p, pointer in zip(self.parameters, self._pointers, strict=True):
            if p.data_ptr() != pointer:
                raise RuntimeError(
                    f"a {label} of shape {tuple(p.shape)} no longer lives in the optimizer's "
                    "buffer: the model was moved or converted (.to, .half, p.data = ...) after the "
                    "optimizer was built; do that first, then build the optimizer"
                )

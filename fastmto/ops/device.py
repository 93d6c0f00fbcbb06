"""What the host does beside a GPU without waiting for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which a GPU is torch's current one; it costs little where it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with current(device):
        return torch.cuda.is_current_stream_capturing()


def upload(target: Tensor, values: object) -> None:
    """target <- values of the host, without waiting for the device.

    Raises:
        RuntimeError: while a CUDA graph is captured, which would replay these values for ever.
    """
    on_gpu = target.device.type == "cuda"
    if capturing(target.device):
        raise RuntimeError(
            "learning rates, hyperparameters and the set of tasks must not change in the step that "
            "is captured: make one such step before the capture"
        )
    # From pinned memory, which torch keeps until the copy is over.
    target.copy_(torch.tensor(values, dtype=target.dtype, pin_memory=on_gpu), non_blocking=True)


class Constants:
    """Short vectors of the host's, brought to a device once.

    The last `MOST` are kept, and for good those that a CUDA graph was captured with: it goes on
    reading their memory.

    Args:
        dtype: of the vectors on the device.
    """

    MOST = 256

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._recent: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}
        self._captured: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}

    def __call__(self, values: Iterable[float], device: torch.device) -> Tensor:
        """The vector (n,) on the device; not to be written.

        Raises:
            RuntimeError: a new vector, while a CUDA graph is captured.
        """
        key = device, tuple(values)
        vector = self._captured.get(key, self._recent.get(key))
        if vector is None:
            vector = torch.empty(len(key[1]), dtype=self._dtype, device=device)
            upload(vector, key[1])
            if len(self._recent) >= self.MOST:
                self._recent.clear()
            self._recent[key] = vector
        if capturing(device):
            self._captured[key] = vector
        return vector

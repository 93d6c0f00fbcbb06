"""What the arguments of the op `perturb` must be, the same on every device."""

from __future__ import annotations

from torch import Tensor, float32, float64

#: Distributions of random directions (fastmto/philox.py) by their number in the kernels, from 1 on.
DISTRIBUTIONS = ("gaussian", "rademacher")


def _is(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
        f"strides {tensor.stride()}, on {tensor.device}"
    )


def _is_rows(tensor: Tensor, rows: int, numel: int) -> bool:
    """Whether `tensor` is (rows, numel) with contiguous rows that do not overlap."""
    return (
        tensor.shape == (rows, numel)
        and (numel <= 1 or tensor.stride(1) == 1)
        and (rows <= 1 or tensor.stride(0) >= numel)
    )


def check(
    params: Tensor,
    out: Tensor,
    scale: Tensor,
    direction: Tensor | None,
    seed: int | None,
    offset: int,
    distribution: str,
) -> None:
    """Refuse arguments that the contract (ops/__init__.py) excludes.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if params.dtype not in (float32, float64) or params.dim() != 1 or not params.is_contiguous():
        raise ValueError(
            "params must be a contiguous float32 or float64 tensor of shape (P,) (16 bits are too "
            f"coarse to be perturbed: keep float32 master weights), got {_is(params)}"
        )
    numel, device = params.numel(), params.device
    kind = f"{str(params.dtype).removeprefix('torch.')} like params, on {device}"
    if (
        out.dim() != 2
        or len(out) == 0
        or not _is_rows(out, len(out), numel)
        or (out.dtype, out.device) != (params.dtype, device)
    ):
        raise ValueError(
            f"out must be (R >= 1, {numel}) with contiguous rows that do not overlap, {kind}, "
            f"got {_is(out)}"
        )
    rows = len(out)
    first, last, own = out.data_ptr(), out[-1].data_ptr(), params.data_ptr()
    size = numel * params.element_size()
    if own < last + size and first < own + size and not (rows == 1 and first == own):
        raise ValueError(
            "out must not share memory with params, but for one row that is params itself"
        )
    if (
        scale.dtype != float64
        or scale.shape != (rows,)
        or not scale.is_contiguous()
        or scale.device != device
    ):
        raise ValueError(
            f"scale must be a contiguous float64 tensor of shape ({rows},) on {device}, "
            f"got {_is(scale)}"
        )
    if (direction is None) == (seed is None):
        raise ValueError(
            "exactly one of direction and seed must be given, got "
            + ("neither" if seed is None else "both")
        )
    if direction is not None:
        fits = direction.shape == (numel,) and direction.is_contiguous()
        if not (fits or _is_rows(direction, rows, numel)) or (
            direction.dtype,
            direction.device,
        ) != (
            params.dtype,
            device,
        ):
            raise ValueError(
                f"direction must be ({numel},) or ({rows}, {numel}) with contiguous rows, {kind}, "
                f"got {_is(direction)}"
            )
    if seed is not None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, got {seed}")
        if not 0 <= offset <= (1 << 64) - rows:
            raise ValueError(f"offset must be an integer from 0 to 2^64 - {rows}, got {offset}")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}"
            )

"""CPU kernels; arguments are raw addresses that `fastmto.ops.cpu` has checked.

The contract is csrc/kernels/kernels.h. `dtype`: 0 float32, 1 float64, 2 bfloat16, 3 float16.
Strides in elements. `skip` and `sigma` may be 0, for None.
`draw`: 0 none, 1 gaussian, 2 Rademacher. `isa`: 0 the best here, 1 baseline, 2 x86-64-v3,
3 x86-64-v4.
"""

from collections.abc import Sequence

def update_gram(
    kind: int,
    dtype: int,
    per_task: bool,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    numbers: int,
    state_0: int,
    stride_0: int,
    state_1: int,
    stride_1: int,
    state_2: int,
    stride_2: int,
    threads: int,
    isa: int,
    gram: int,
    /,
) -> None: ...
def update_gram_clipped(
    kind: int,
    dtype: int,
    per_task: bool,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    numbers: int,
    state_0: int,
    stride_0: int,
    state_1: int,
    stride_1: int,
    state_2: int,
    stride_2: int,
    threads: int,
    isa: int,
    gram: int,
    lambda_rel: float,
    lambda_abs: float,
    params: int,
    segments: int,
    n_segments: int,
    sigma: int,
    /,
) -> None: ...
def apply(
    kind: int,
    dtype: int,
    per_task: bool,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    numbers: int,
    state_0: int,
    stride_0: int,
    state_1: int,
    stride_1: int,
    state_2: int,
    stride_2: int,
    threads: int,
    isa: int,
    params: int,
    weights: int,
    skip: int,
    segments: int,
    n_segments: int,
    sigma: int,
    /,
) -> None: ...
def apply_and_gram(
    kind: int,
    dtype: int,
    per_task: bool,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    numbers: int,
    state_0: int,
    stride_0: int,
    state_1: int,
    stride_1: int,
    state_2: int,
    stride_2: int,
    threads: int,
    isa: int,
    params: int,
    weights: int,
    skip: int,
    gram: int,
    /,
) -> None: ...
def gram(
    dtype: int,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    gram: int,
    threads: int,
    isa: int,
    /,
) -> None: ...
def combine(
    dtype: int,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    weights: int,
    out: int,
    threads: int,
    isa: int,
    /,
) -> None: ...
def perturb(
    dtype: int,
    rows: int,
    numel: int,
    params: int,
    out: int,
    out_stride: int,
    scale: int,
    draw: int,
    direction: int,
    direction_stride: int,
    seed: int,
    offset: int,
    threads: int,
    isa: int,
    /,
) -> None: ...
def all_finite(
    dtype: int,
    tasks: int,
    numel: int,
    grads: int,
    grads_stride: int,
    threads: int,
    isa: int,
    /,
) -> bool: ...
def step_constants(
    rows: int, hyper: int, counts: int, active: int, numbers: int, found: int, /
) -> None: ...
def count_step(rows: int, counts: int, active: int, found: int, tally: int, /) -> None: ...
def supported(isa: int, /) -> bool: ...

#: What `update_gram` takes before `gram`, then params, segments, n_segments and sigma.
_Run = tuple[int, ...]

class Plan:
    def __init__(
        self,
        rows: int,
        hyper: int,
        counts: int,
        numbers: int,
        tally: int,
        gram: int,
        clipped: bool,
        lambda_rel: float,
        lambda_abs: float,
        shared: tuple[_Run, ...],
        heads: tuple[_Run, ...],
        /,
    ) -> None: ...
    def look(self, rows: int, active: Sequence[bool], searches: bool, threads: int, /) -> bool: ...
    def move(self, weights: Sequence[float], searches: bool, threads: int, /) -> None: ...

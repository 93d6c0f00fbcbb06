"""The native solvers: ready numpy arrays in, `Result` out. Use `fastmto.solvers` instead."""

from typing import Generic, Literal, TypeVar

from numpy import float64
from numpy.typing import NDArray

Status = Literal[
    "solved",
    "not_finite",
    "not_symmetric",
    "zero_update",
    "not_psd",
    "near_stationary",
    "unbounded",
    "max_iterations",
]
STATUSES: tuple[Status, ...]

W_co = TypeVar("W_co", covariant=True)

class Result(Generic[W_co]):
    def __init__(
        self, weights: W_co | None, status: Status, iterations: int, residual: float, kappa: float
    ) -> None: ...
    @property
    def weights(self) -> W_co | None: ...
    @property
    def status(self) -> Status: ...
    @property
    def iterations(self) -> int: ...
    @property
    def residual(self) -> float: ...
    @property
    def kappa(self) -> float: ...
    @property
    def ok(self) -> bool: ...

def bargaining(
    gram: object,
    method: str,
    preference: object,
    warm_start: object,
    tol: float,
    max_steps: int,
    ridge: float,
    /,
) -> Result[NDArray[float64]] | None: ...
def ccp_step(
    gram: object, previous: object, preference: object, ridge: float, /
) -> Result[NDArray[float64]] | None: ...

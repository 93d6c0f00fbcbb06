"""What balancing adds to the peak memory of a process, as the system counts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")

NUMEL, TASKS = 1 << 23, 3
SCRIPT = r"""
import pathlib, re, sys, torch, fastmto
torch.set_num_threads(1)
numel, tasks = int(sys.argv[2]), int(sys.argv[3])
shared = torch.nn.Parameter(torch.zeros(numel))
direction = torch.randn(numel)
step = fastmto.PUB([torch.nn.Parameter(torch.zeros(3))], [[]])  # all imports are paid by both
if sys.argv[1] == "pub":
    optimizer = fastmto.PUB([shared], [[] for _ in range(tasks)], update_weights_every=1)
balancer = fastmto.get("nashmtl", passes=sys.argv[1] if sys.argv[1] == "batched" else "loop")
for _ in range(2):
    losses = [(shared * direction).sum() * (i + 1) for i in range(tasks)]
    if sys.argv[1] == "pub":
        optimizer.backward(losses)
        optimizer.step()
    elif sys.argv[1] in ("loop", "batched"):
        balancer.backward(losses, [shared], [])
        shared.grad = None
    else:
        for i, loss in enumerate(losses):
            torch.autograd.grad(loss, [shared])
# Not ru_maxrss, which a child inherits from the process that started it.
print(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


def peak_bytes(what: str) -> int:
    command = [sys.executable, "-c", SCRIPT, what, str(NUMEL), str(TASKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


pytestmark = pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the system shows no VmHWM"
)


def test_a_search_adds_the_task_gradients_and_moments_to_the_bare_backwards() -> None:
    """T rows of gradients and two moments; nothing else of the size of the parameters."""
    vectors = (peak_bytes("pub") - peak_bytes("bare")) / (4 * NUMEL)
    assert TASKS + 2 - 0.6 < vectors < TASKS + 2 + 0.6


@pytest.mark.parametrize(
    ("passes", "vectors"), [("loop", TASKS + 1), ("batched", TASKS + 3 * TASKS)]
)
def test_a_gradient_balancer_adds_what_its_docstring_says(passes: str, vectors: int) -> None:
    """Beside the gradient that a bare backward has as well: T rows and the joint one; batched,
    three vectors a task for its gradient on the way."""
    added = (peak_bytes(passes) - peak_bytes("bare")) / (4 * NUMEL)
    assert vectors - 0.6 < added < vectors + 0.6

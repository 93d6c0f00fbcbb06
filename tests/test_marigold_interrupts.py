"""What MARIGOLD leaves behind when a step is interrupted, or another thread trains meanwhile."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import fastmto
from fastmto.marigold import perturb, replay

FILES = (perturb.__file__, replay.__file__)


class World:
    """Two regressions on a trunk with BatchNorm and dropout."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        )
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.x = torch.randn(8, 3)

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [head(z).square().mean() for head in self.heads]


class Interrupt:
    """Raises KeyboardInterrupt before a line of what displaces and puts back, once."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, _: Any) -> Interrupt | None:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_an_interrupt_at_any_line_leaves_the_model_as_it_was() -> None:
    world = World()
    shared = list(world.trunk.parameters())
    balancer = fastmto.MARIGOLD(2)
    balancer.backward(world.losses(), shared, closure=world.losses)
    line, finished, wrong = 0, False, []
    while not finished:
        line += 1
        torch.manual_seed(1)
        losses = world.losses()
        tensors = [*shared, *world.trunk.buffers(), torch.get_rng_state()]
        before = [x.detach().clone() for x in tensors]
        places = [p.data_ptr() for p in shared]
        previous = sys.gettrace()
        sys.settrace(Interrupt(line))
        try:
            balancer.backward(losses, shared, closure=world.losses)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(previous)
        torch.set_grad_enabled(True)  # torch's own contexts may be interrupted as well
        tensors[-1] = torch.get_rng_state()
        same = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        if not same or [p.data_ptr() for p in shared] != places:
            wrong.append(line)
    assert line > 50
    assert not wrong


def test_modules_that_another_thread_trains_are_left_alone() -> None:
    """What that thread does within an evaluation is neither undone nor repeated."""
    ours, other = World(0), World(1)
    inside, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        inside.wait()
        other.losses()
        done.set()

    def closure() -> list[Tensor]:
        inside.set()
        assert done.wait(60)
        return ours.losses()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    fastmto.MARIGOLD(2).backward(ours.losses(), ours.trunk.parameters(), closure=closure)
    thread.join()
    assert other.trunk[1].num_batches_tracked.item() == 1
    assert ours.trunk[1].num_batches_tracked.item() == 1

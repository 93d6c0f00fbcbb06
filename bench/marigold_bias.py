"""Error of MARIGOLD's derivatives against the step, on a smooth network: docs/marigold_bias.png.

    python bench/marigold_bias.py

A tanh network of three layers, width 64, four tasks, after 50 steps of Adam (the table: before
them, too, where gradients are larger beside the curvature). For every step
length h = mu ||d|| the relative error ||y_hat - y|| / ||y|| over the tasks, y from exact gradients
in float64 (for the forward pass in bfloat16 too: what rounding adds is a part of the error). Left
in float64, where the bias is all there is: it falls like h (forward) and h^2 (central), as Lemma
3.1's kind of bound says. Right in the precisions people train in, where rounding grows like 1/h;
the dots are the default steps.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from fastmto import MARIGOLD
from fastmto.marigold.estimators import RELATIVE_STEPS

matplotlib.use("agg")
from matplotlib import pyplot

TASKS, WIDTH = 4, 64


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Linear(16, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
            nn.Linear(WIDTH, WIDTH), nn.Tanh(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(TASKS))
        self.x = torch.randn(256, 16)
        self.targets = [torch.sin((i + 1) * self.x[:, i : i + 3].sum(1)) for i in range(TASKS)]
        self.autocast = False

    def losses(self) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            dtype = self.heads[0].weight.dtype
            z = self.trunk(self.x.to(dtype))
            out = [head(z)[:, 0] for head in self.heads]
        return [
            (y.to(dtype) - target.to(dtype)).square().mean()
            for y, target in zip(out, self.targets, strict=True)
        ]

    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk.parameters())


def exact(model: Network) -> Tensor:
    wide = copy.deepcopy(model).double()
    wide.autocast = False
    rows = [torch.autograd.grad(loss, wide.shared(), retain_graph=True) for loss in wide.losses()]
    g = torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])
    return g @ g.mean(0)


def error(model: Network, y: Tensor, estimator: str, relative: float) -> float:
    balancer = MARIGOLD(estimator=estimator, relative_step=relative)
    _, info = balancer.backward(model.losses(), model.shared(), closure=model.losses)
    model.zero_grad()
    return float((info.derivatives - y).norm() / y.norm())


def defaults(model: Network) -> dict[tuple[str, str], float]:
    """Errors at the default steps by precision of the forward pass and estimator."""
    found = {}
    y = exact(model)
    for dtype in (torch.float32, torch.bfloat16):
        model.autocast = dtype is torch.bfloat16
        for estimator in ("forward", "central"):
            step = RELATIVE_STEPS[estimator][dtype]
            found[str(dtype).removeprefix("torch."), estimator] = error(model, y, estimator, step)
    model.autocast = False
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--plot", type=Path, default=root / "docs" / "marigold_bias.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| forward pass | estimator | h / theta | at the start | after 50 steps |")
    print("|---|---|---|---|---|")
    model = Network()
    before = defaults(model)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(50):
        adam.zero_grad()
        torch.stack(model.losses()).sum().backward()
        adam.step()
    y = exact(model)
    after = defaults(model)
    for (name, estimator), found in after.items():
        step = RELATIVE_STEPS[estimator][getattr(torch, name)]
        start = before[name, estimator]
        print(f"| {name} | {estimator} | {step:g} | {start:.1e} | {found:.1e} |")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    wide = copy.deepcopy(model).double()
    steps = torch.logspace(-6, -0.5, 23).tolist()
    for estimator, colour, order in (("forward", "C0", 1), ("central", "C1", 2)):
        errors = [error(wide, y, estimator, h) for h in steps]
        left.loglog(steps, errors, colour, marker="o", ms=3, label=f"{estimator}, float64")
        anchor = steps.index(min(steps, key=lambda h: abs(h - 1e-2)))
        guide = [errors[anchor] * (h / steps[anchor]) ** order for h in steps]
        left.loglog(steps, guide, colour, ls=":", lw=1, label=f"slope {order}")
        last = steps.index(min(steps, key=lambda h: abs(h - 1e-3)))
        slope = (
            torch.tensor(errors[anchor] / errors[last]).log10()
            / torch.tensor(steps[anchor] / steps[last]).log10()
        )
        print(f"{estimator}: slope {float(slope):.3f} between h = 1e-3 and 1e-2 of ||theta||")
    steps = [h for h in steps if h >= 1e-6]
    for dtype, style, marker in ((torch.float32, "-", "o"), (torch.bfloat16, "--", "s")):
        model.autocast = dtype is torch.bfloat16
        for estimator, colour in (("forward", "C0"), ("central", "C1")):
            name = str(dtype).removeprefix("torch.")
            errors = [error(model, y, estimator, h) for h in steps]
            right.loglog(steps, errors, colour, ls=style, label=f"{estimator}, {name}")
            right.plot(
                RELATIVE_STEPS[estimator][dtype], after[name, estimator], colour, marker=marker
            )
    for axes in (left, right):
        axes.set_xlabel("h / ||theta||")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("relative error of y")
    left.set_ylim(1e-10, 30)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()

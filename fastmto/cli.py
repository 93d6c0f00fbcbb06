"""The command `fastmto`.

Everything heavy is imported when it is needed: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from .data.base import MultiTaskData
    from .models.base import MultiTaskModel
    from .train import TrainResult

BALANCERS = ("equal", "pub", "pub_clippy", "pub_adatask", "adatask", "clippy")
MODELS = ("shared_bottom", "mmoe")
#: Packages of the extra "train", by the data that need them.
EXTRAS = {"digits": ("sklearn", "matplotlib", "tqdm"), "census": ("matplotlib", "tqdm")}


@dataclass(frozen=True)
class Defaults:
    """What `fastmto train` does with a data set unless told otherwise."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    #: Threads on a CPU; None leaves torch's choice.
    threads: int | None
    #: Constructor arguments of each model.
    sizes: dict[str, dict[str, Any]]


DEFAULTS = {
    "digits": Defaults(
        model="shared_bottom",
        epochs=10,
        batch_size=256,
        lr=1e-3,
        weight_decay=0.0,
        # Steps of a few milliseconds gain little from a second thread and wait long for it on a
        # busy machine: with both cores taken, 14.7 ms a step on two threads, 2.4 ms on one.
        threads=1,
        sizes={
            "shared_bottom": {"embedding": 256, "bottom": (256,), "tower_widths": (64,)},
            "mmoe": {
                "embedding": 128, "n_experts": 4, "expert_widths": (64,), "tower_widths": (64,),
            },
        },
    ),
    "census": Defaults(
        model="mmoe",
        epochs=3,
        batch_size=1024,
        lr=1e-3,
        weight_decay=1e-6,
        threads=None,
        sizes={
            "shared_bottom": {"embedding": 16, "bottom": (256, 128), "tower_widths": (64,)},
            "mmoe": {
                "embedding": 16, "n_experts": 8, "expert_widths": (128,), "tower_widths": (64,),
            },
        },
    ),
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def _parser() -> tuple[_Parser, _Parser]:
    """The parser of the command and that of its verb `train`."""
    parser = _Parser(prog="fastmto", description="Fast, exact multi-task optimization.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train}")
    train = verbs.add_parser(
        "train",
        help="train a multi-task model with several balancers and compare them",
        description="Trains the same model from the same start with each balancer in turn, then "
        "prints a table and writes a picture. Without arguments: embedded digits, under a minute.",
    )
    add = train.add_argument
    add("--data", choices=tuple(DEFAULTS), default="digits", help="data set (default: digits)")
    add("--root", type=Path, metavar="DIR", help="folder of the data's files; census needs it")
    add("--model", choices=MODELS, help="default: shared_bottom for digits, mmoe for census")
    add(
        "--balancer",
        nargs="+",
        choices=BALANCERS,
        default=["equal", "pub"],
        help="one or more, compared in this order (default: equal pub)",
    )
    add(
        "--update-weights-every",
        type=_positive_int,
        default=10,
        metavar="N",
        help="steps between two searches of task weights (default: 10)",
    )
    add("--epochs", type=_positive_int, metavar="N", help="default: 10 for digits, 3 for census")
    add(
        "--batch-size",
        type=_positive_int,
        metavar="N",
        help="default: 256 for digits, 1024 for census",
    )
    add("--lr", type=_positive_float, help="learning rate (default: 1e-3)")
    add("--seed", type=_seed, default=0, help="of the model, the batches and the digits' pairs")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        default=Path("fastmto-train.png"),
        help="the picture (default: fastmto-train.png)",
    )
    return parser, train


def _check_output(parser: _Parser, option: str, path: Path) -> None:
    """Ends in an error before a run whose results could not be written."""
    if path.is_dir():
        parser.error(f"argument {option}: {path} is a folder")
    if not path.parent.is_dir():
        parser.error(f"argument {option}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        parser.error(f"argument {option}: {path} cannot be written")


def _check_extras(parser: _Parser, data: str) -> None:
    missing = [name for name in EXTRAS[data] if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{", ".join(missing)} not installed: pip install "fastmto[train]"')


def _device(parser: _Parser, name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            parser.error(f"argument --device: must be cpu, cuda or cuda:N, got {name!r}")
        torch.empty(1, device=device)
    # A build of torch without CUDA answers with an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"argument --device: {name!r} is not available here: {reason}")
    return device


def _load(parser: _Parser, options: argparse.Namespace) -> MultiTaskData:
    from .data import load_census, load_digits

    if options.data == "digits":
        if options.root is not None:
            parser.error("argument --root: digits are embedded and read no files")
        return load_digits(options.seed)
    if options.root is None:
        from .data.census import SOURCE

        parser.error(f"--data census needs --root DIR. {SOURCE}")
    try:
        return load_census(options.root)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _build(name: str, data: MultiTaskData, sizes: dict[str, Any]) -> MultiTaskModel:
    from .models import MMOE, SharedBottom

    n_outputs = [task.n_outputs for task in data.tasks]
    if name == "mmoe":
        return MMOE(data.n_dense, data.field_sizes, n_outputs, **sizes)
    return SharedBottom(data.n_dense, data.field_sizes, n_outputs, **sizes)


def _table(results: Sequence[TrainResult]) -> str:
    """The comparison as text: test metrics after the last epoch and the cost of a step."""
    tasks = results[0].tasks
    baseline = next((result for result in results if result.name == "equal"), None)
    head = ["balancer", *(f"{task.name} {task.metric}" for task in tasks), "mean"]
    head += ["total s", "ms a step", "balancing*"]
    rows = [head]
    for result in results:
        scores = list(result.epochs[-1].test.values())
        share = "-" if result is baseline else f"{100 * result.timing.balancing_share:.1f} %"
        rows.append(
            [
                result.name,
                *(f"{score:.4f}" for score in [*scores, sum(scores) / len(scores)]),
                f"{sum(epoch.seconds for epoch in result.epochs):.1f}",
                f"{result.timing.step:.2f}",
                share,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


FOOTNOTE = """\
* share of a step beyond what equal weighting pays: one forward, one backward of the summed loss
  and one step of torch's fused Adam, timed beside the same run; "ms a step" and this share are
  of undisturbed steps (lower quartiles), "total s" is the sum of all steps"""


def _environment() -> dict[str, Any]:
    import numpy as np
    import torch

    from . import __version__

    return {
        "fastmto": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def _train(parser: _Parser, options: argparse.Namespace) -> None:
    """`fastmto train`: load, train with each balancer, table, picture, JSON."""
    defaults = DEFAULTS[options.data]
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            _check_output(parser, option, path)
    if len(set(options.balancer)) < len(options.balancer):
        parser.error(f"argument --balancer: named twice in {' '.join(options.balancer)}")
    _check_extras(parser, options.data)
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if options.plot.suffix[1:].lower() not in formats:
        parser.error(
            f"argument --plot: the name must end in one of {', '.join(sorted(formats))}, got "
            f"{str(options.plot)!r}"
        )

    import torch
    from tqdm import tqdm

    from .models.base import count
    from .plot import save_plot
    from .train import as_json, balancer, train

    device = _device(parser, options.device)
    if defaults.threads is not None:
        torch.set_num_threads(defaults.threads)
    data = _load(parser, options).to(device)
    name = options.model or defaults.model
    sizes = defaults.sizes[name]
    epochs = options.epochs or defaults.epochs
    batch_size = options.batch_size or defaults.batch_size
    lr = options.lr or defaults.lr

    # In a log file every redrawing of the bar is another line.
    interval = 0.2 if sys.stderr.isatty() else 5.0
    results = []
    shared = total = 0
    for balancer_name in options.balancer:
        torch.manual_seed(options.seed)
        model = _build(name, data, sizes).to(device)
        shared, total = count(model.shared_parameters()), count(model.parameters())
        n_steps = epochs * -(-len(data.train) // batch_size)
        with tqdm(total=n_steps, desc=balancer_name, unit="step", mininterval=interval) as bar:

            def advance(losses: torch.Tensor, bar: Any = bar) -> None:
                if bar.update():  # true when the bar was redrawn, a few times a second
                    bar.set_postfix_str(" ".join(f"{x:.3f}" for x in losses.tolist()))

            results.append(
                train(
                    model,
                    data,
                    balancer(
                        balancer_name,
                        lr=lr,
                        weight_decay=defaults.weight_decay,
                        update_weights_every=options.update_weights_every,
                    ),
                    epochs=epochs,
                    batch_size=batch_size,
                    seed=options.seed,
                    name=balancer_name,
                    on_step=advance,
                )
            )

    title = (
        f"{data.name}, {name}: {total:,} parameters, {shared:,} of them shared; "
        f"{epochs} epochs of {len(data.train):,} rows, batch {batch_size}"
    )
    print(f"\n{title}\ntest part, after the last epoch:\n\n{_table(results)}\n{FOOTNOTE}\n")
    save_plot(results, title, options.plot)
    print(f"picture: {options.plot}")
    if options.json is not None:
        report = {
            "config": {
                "data": data.name,
                "model": name,
                "sizes": sizes,
                "parameters": total,
                "shared_parameters": shared,
                "balancers": options.balancer,
                "update_weights_every": options.update_weights_every,
                "epochs": epochs,
                "batch_size": batch_size,
                "lr": lr,
                "weight_decay": defaults.weight_decay,
                "seed": options.seed,
                "device": str(device),
                "rows": {
                    part: len(getattr(data, part)) for part in ("train", "validation", "test")
                },
                "tasks": {task.name: task.metric for task in data.tasks},
            },
            "versions": _environment(),
            "runs": [as_json(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"figures: {options.json}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: those after the command's name; None takes the process's.

    Returns:
        0; mistakes leave by `SystemExit` with status 2, an interrupt by 130.
    """
    parser, train_parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _train(train_parser, options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0

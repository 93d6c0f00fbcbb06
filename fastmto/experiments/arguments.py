"""The arguments of the command `fastmto`; nothing heavy is imported here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastmto import __version__, available

#: What `train` and `compare` know: plain training, every method, and variants of PUB.
BALANCERS = ("equal", *available(), "pub_clippy", "pub_adatask", "adatask", "clippy")
MODELS = ("shared_bottom", "mmoe", "ple")
#: Packages of the extra "train", by the data that need them.
EXTRAS = {
    "digits": ("sklearn", "matplotlib", "tqdm"),
    "census": ("matplotlib", "tqdm"),
    "toy": ("matplotlib", "tqdm"),
}


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
        # busy machine: with both cores taken, 14.7 ms per step on two threads, 2.4 ms on one.
        threads=1,
        sizes={
            "shared_bottom": {"embedding": 256, "bottom": (256,), "tower_widths": (64,)},
            "mmoe": {
                "embedding": 128, "n_experts": 4, "expert_widths": (64,), "tower_widths": (64,),
            },
            "ple": {
                "embedding": 128, "extraction_widths": (64, 64), "n_shared_experts": 2,
                "n_task_experts": 2, "tower_widths": (64,),
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
            "ple": {
                "embedding": 16, "extraction_widths": (128, 128), "n_shared_experts": 4,
                "n_task_experts": 2, "tower_widths": (64,),
            },
        },
    ),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Mistakes end in one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(kind: type[float], what: str, low: float, high: float) -> Callable[[str], float]:
    """Reads a number with low < number < high."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return number


_positive_int = _number(int, "a whole number >= 1", 0, math.inf)
_seed = _number(int, "a whole number >= 0", -1, 2**63)
_positive_float = _number(float, "a number > 0", 0, math.inf)


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads "a,b,c", or "all" for all that are known."""

    def names(text: str) -> list[str]:
        if text == "all":
            return list(known)
        found = [name.strip() for name in text.split(",")]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"invalid choice: {name!r} (all, or names from {', '.join(known)} with commas "
                    "between)"
                )
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"named twice in {text}")
        return found

    return names


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    """The options that say what is trained, common to `train` and `compare`."""
    add = parser.add_argument
    add("--data", choices=tuple(DEFAULTS), default="digits", help="data set (default: digits)")
    add("--root", type=Path, metavar="DIR", help="folder of the data's files; census needs it")
    add("--model", choices=MODELS, help="default: shared_bottom for digits, mmoe for census")
    add(
        "--update-weights-every",
        type=_positive_int,
        metavar="N",
        help="steps between two searches of task weights (default: 1 for methods that look at the "
        "losses alone, 10 for those that need a backward pass per task)",
    )
    add("--epochs", type=_positive_int, metavar="N", help="default: 10 for digits, 3 for census")
    add(
        "--batch-size",
        type=_positive_int,
        metavar="N",
        help="default: 256 for digits, 1024 for census",
    )
    add("--lr", type=_positive_float, help="learning rate (default: 1e-3)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def _add_outputs(parser: argparse.ArgumentParser, picture: str) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        default=Path(picture),
        help=f"the picture (default: {picture})",
    )


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command and those of its verbs."""
    parser = Parser(prog="fastmto", description="Fast, exact multi-task optimization.")
    parser.add_argument("--version", action="version", version=f"fastmto {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{train,compare,toy}")
    kept = "Ctrl-C keeps what is finished: table, picture and JSON of the runs so far are written."

    train = verbs.add_parser(
        "train",
        help="train a multi-task model with several balancers and look at the runs",
        description="Trains the same model from the same start with each balancer in turn, then "
        "prints a table and writes a picture. Without arguments: embedded digits, under a minute. "
        + kept,
        epilog="balancers: " + ", ".join(BALANCERS),
    )
    train.add_argument(
        "--balancer",
        nargs="+",
        choices=BALANCERS,
        default=["equal", "pub"],
        metavar="NAME",
        help="one or more of those below, compared in this order (default: equal pub)",
    )
    _add_experiment(train)
    train.add_argument(
        "--seed", type=_seed, default=0, help="of the model, the batches and the digits' pairs"
    )
    _add_outputs(train, "fastmto-train.png")

    compare = verbs.add_parser(
        "compare",
        help="compare balancers over several seeds: metrics, step time, memory",
        description="Trains with each balancer and each seed, every balancer in a process of its "
        "own, then prints one table (test metric mean and standard deviation of each task, step "
        "time relative to equal weighting in the same run, peak memory) and draws it. " + kept,
        epilog="balancers: " + ", ".join(BALANCERS),
    )
    compare.add_argument(
        "--balancers",
        type=_names(BALANCERS),
        default=["equal", "famo", "nashmtl", "pub"],
        metavar="A,B,...",
        help="names of those below, or all (default: equal,famo,nashmtl,pub)",
    )
    compare.add_argument(
        "--seeds",
        type=_positive_int,
        default=3,
        metavar="N",
        help="runs per balancer, with seeds 0 to N-1 (default: 3)",
    )
    _add_experiment(compare)
    _add_outputs(compare, "fastmto-compare.png")

    toy = verbs.add_parser(
        "toy",
        help="run the two-task toy problem of the literature with every method",
        description="Descends with each method from the five starts of the toy problem of CAGrad, "
        "Nash-MTL and FAMO, in parallel processes, then prints the final losses and draws the "
        "ways beside the Pareto front. " + kept,
        epilog="methods: " + ", ".join(available()),
    )
    add = toy.add_argument
    add(
        "--balancers",
        type=_names(available()),
        default=available(),
        metavar="A,B,...",
        help="names of those below, or all (default: all)",
    )
    add("--s", type=_positive_float, default=0.1, help="factor of the first task (default: 0.1)")
    add("--lr", type=_positive_float, default=1e-3, help="learning rate (default: 1e-3)")
    add("--steps", type=_positive_int, default=50_000, metavar="N", help="default: 50000")
    add(
        "--processes",
        type=_positive_int,
        metavar="N",
        help="runs at a time (default: one per processor)",
    )
    _add_outputs(toy, "fastmto-toy.png")
    return parser, {"train": train, "compare": compare, "toy": toy}

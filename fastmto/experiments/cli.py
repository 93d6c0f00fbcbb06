"""The command `fastmto`.

Everything heavy is imported when it is needed: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..balancers.registry import available

if TYPE_CHECKING:
    import torch

    from .compare import Compared
    from .data.base import MultiTaskData
    from .experiment import Experiment
    from .toy import Row
    from .train import TrainResult

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
        # busy machine: with both cores taken, 14.7 ms a step on two threads, 2.4 ms on one.
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
        "losses alone, 10 for those that need a backward pass a task)",
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


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command and those of its verbs."""
    parser = _Parser(prog="fastmto", description="Fast, exact multi-task optimization.")
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
        help="runs a balancer, with seeds 0 to N-1 (default: 3)",
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
        help="runs at a time (default: one a processor)",
    )
    _add_outputs(toy, "fastmto-toy.png")
    return parser, {"train": train, "compare": compare, "toy": toy}


def _check_output(parser: _Parser, option: str, path: Path) -> None:
    """Ends in an error before a run whose results could not be written."""
    if path.is_dir():
        parser.error(f"argument {option}: {path} is a folder")
    if not path.parent.is_dir():
        parser.error(f"argument {option}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        parser.error(f"argument {option}: {path} cannot be written")


def _check(parser: _Parser, options: argparse.Namespace, needs: str) -> None:
    """Ends in an error where what comes out could not be written, or a package is missing."""
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            _check_output(parser, option, path)
    missing = [name for name in EXTRAS[needs] if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{", ".join(missing)} not installed: pip install "fastmto[train]"')
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if options.plot.suffix[1:].lower() not in formats:
        parser.error(
            f"argument --plot: the name must end in one of {', '.join(sorted(formats))}, got "
            f"{str(options.plot)!r}"
        )


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


def _load(parser: _Parser, options: argparse.Namespace, seed: int) -> MultiTaskData:
    from .data import load_census, load_digits

    if options.data == "digits":
        if options.root is not None:
            parser.error("argument --root: digits are embedded and read no files")
        return load_digits(seed)
    if options.root is None:
        from .data.census import SOURCE

        parser.error(f"--data census needs --root DIR. {SOURCE}")
    try:
        return load_census(options.root)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _experiment(options: argparse.Namespace) -> Experiment:
    from .experiment import Experiment

    defaults = DEFAULTS[options.data]
    model = options.model or defaults.model
    return Experiment(
        data=options.data,
        model=model,
        sizes=defaults.sizes[model],
        epochs=options.epochs or defaults.epochs,
        batch_size=options.batch_size or defaults.batch_size,
        lr=options.lr or defaults.lr,
        weight_decay=defaults.weight_decay,
        update_weights_every=options.update_weights_every,
    )


def _bar(total: int, unit: str) -> Any:
    from tqdm import tqdm

    # In a log file every redrawing of the bar is another line.
    interval = 0.2 if sys.stderr.isatty() else 5.0
    return tqdm(total=total, unit=unit, mininterval=interval)


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def _say_files(options: argparse.Namespace) -> None:
    print(f"picture: {options.plot}")
    if options.json is not None:
        print(f"figures: {options.json}")


def _train_table(results: Sequence[TrainResult]) -> str:
    """The comparison as text: test metrics after the last epoch and the cost of a step."""
    from .compare import columns

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
    return columns(rows)


TRAIN_FOOTNOTE = """\
* share of a step beyond what equal weighting pays: one forward, one backward of the summed loss
  and one step of torch's fused Adam, timed beside the same run; "ms a step" and this share are
  of undisturbed steps (lower quartiles), "total s" is the sum of all steps"""

COMPARE_FOOTNOTE = """\
*  step time over that of equal weighting, timed beside the same run; of undisturbed steps (lower
   quartiles), mean over the seeds
** {memory}"""

MEMORY = {
    "cpu": "largest resident set of the balancer's own process in its first steps, with Python and "
    "torch\n   in it: the difference to equal weighting is the method's",
    "cuda": "the most that torch's allocator gave out in the first steps, model and data included",
}

TOY_FOOTNOTE = """\
*  processor time a step, forward and Adam included
** largest difference in f1 and f2 to FAMO's released code at these settings, where it has the
   method; from C, LS and CAGrad are left out"""


def _train(parser: _Parser, options: argparse.Namespace) -> int:
    """`fastmto train`: load, train with each balancer, table, picture, JSON."""
    if len(set(options.balancer)) < len(options.balancer):
        parser.error(f"argument --balancer: named twice in {' '.join(options.balancer)}")
    _check(parser, options, options.data)

    import torch

    from .experiment import environment
    from .plot import save_plot
    from .train import as_json

    device = _device(parser, options.device)
    threads = DEFAULTS[options.data].threads
    if threads is not None:
        torch.set_num_threads(threads)
    data = _load(parser, options, options.seed).to(device)
    experiment = _experiment(options)
    title = experiment.title(data)
    results: list[TrainResult] = []
    ended: BaseException | None = None
    for name in options.balancer:
        with _bar(experiment.n_steps(data), "step") as bar:
            bar.set_description(name)

            def advance(losses: torch.Tensor, bar: Any = bar) -> None:
                if bar.update():  # true when the bar was redrawn, a few times a second
                    bar.set_postfix_str(" ".join(f"{x:.3f}" for x in losses.tolist()))

            try:
                results.append(experiment.train(data, name, options.seed, advance))
            except (KeyboardInterrupt, ValueError, RuntimeError) as error:
                ended = error
                break

    if results:
        print(
            f"\n{title}\ntest part, after the last epoch:\n\n{_train_table(results)}\n"
            f"{TRAIN_FOOTNOTE}\n"
        )
        save_plot(results, title, options.plot)
        report = {
            "config": {
                **experiment.as_json(data),
                "balancers": options.balancer,
                "seed": options.seed,
            },
            "versions": environment(),
            "runs": [as_json(result) for result in results],
        }
        _write_json(options.json, report)
        _say_files(options)
    if ended is None:
        return 0
    left = f"{len(results)} of {len(options.balancer)} runs finished"
    if isinstance(ended, KeyboardInterrupt):
        print(f"interrupted: {left}", file=sys.stderr)
        return 130
    print(f"{parser.prog}: error: {name}: {ended}; {left}", file=sys.stderr)
    return 1


def _compare(parser: _Parser, options: argparse.Namespace) -> int:
    """`fastmto compare`: every balancer with every seed, table, picture, JSON."""
    _check(parser, options, options.data)

    import torch

    from .compare import compare, save_data, table
    from .experiment import environment
    from .plot import save_comparison

    device = _device(parser, options.device)
    threads = DEFAULTS[options.data].threads
    experiment = _experiment(options)
    seeds = range(options.seeds)
    rows: list[Compared] = []
    interrupted = False
    with tempfile.TemporaryDirectory(prefix="fastmto-") as folder:
        # Digits are paired by the seed, a file's rows are always the same.
        n_files = options.seeds if options.data == "digits" else 1
        files = []
        for number in range(n_files):
            data = _load(parser, options, number)
            files.append(Path(folder, f"{number}.pt"))
            save_data(data, files[-1])
        if threads is not None:
            torch.set_num_threads(threads)
        title = f"{experiment.title(data)}; {options.seeds} seeds"
        report: dict[str, Any] = {
            "config": {
                **experiment.as_json(data),
                "balancers": options.balancers,
                "seeds": list(seeds),
                "device": str(device),
            },
            "versions": environment(),
        }
        n_steps = experiment.n_steps(data)

        def keep(so_far: list[Compared]) -> None:
            rows[:] = so_far
            _write_json(options.json, {**report, "balancers": [row.as_json() for row in so_far]})

        with _bar(len(options.balancers) * options.seeds * n_steps, "step") as bar:

            def advance(name: str, steps: int) -> None:
                before = options.balancers.index(name) * options.seeds * n_steps
                bar.set_description(name, refresh=False)
                bar.update(before + steps - bar.n)

            try:
                compare(
                    experiment,
                    options.balancers,
                    {seed: files[min(seed, n_files - 1)] for seed in seeds},
                    str(device),
                    threads,
                    advance,
                    keep,
                )
            except KeyboardInterrupt:
                interrupted = True

    rows = [row for row in rows if row.results or row.failure]
    if any(row.results for row in rows):
        footnote = COMPARE_FOOTNOTE.format(memory=MEMORY[device.type])
        print(f"\n{title}\ntest part, after the last epoch:\n\n{table(rows)}\n{footnote}\n")
        save_comparison(rows, title, options.plot)
        _say_files(options)
    return _end(
        parser,
        interrupted,
        f"{sum(len(row.results) for row in rows)} of {len(options.balancers) * options.seeds} runs",
        {row.name: row.failure for row in rows if row.failure},
    )


def _toy(parser: _Parser, options: argparse.Namespace) -> int:
    """`fastmto toy`: every method from every start, table, picture, JSON."""
    _check(parser, options, "toy")

    from . import toy
    from .experiment import environment
    from .plot import save_toy

    rows: list[Row] = []
    interrupted = False
    n_runs = len(options.balancers) * len(toy.STARTS)
    report = {
        "config": {name: getattr(options, name) for name in ("balancers", "s", "lr", "steps")},
        "versions": environment(),
    }

    def keep(so_far: list[Row]) -> None:
        rows[:] = so_far
        _write_json(options.json, {**report, "methods": [row.as_json() for row in so_far]})

    with _bar(n_runs * options.steps, "step") as bar:
        try:
            toy.run_all(
                options.balancers,
                options.s,
                options.lr,
                options.steps,
                options.processes or toy.processors(),
                lambda steps: bar.update(steps - bar.n),
                keep,
            )
        except KeyboardInterrupt:
            interrupted = True

    finished = sum(len(row.runs) for row in rows)
    if finished:
        title = (
            f"toy problem, s = {options.s:g}: {options.steps:,} steps of Adam with lr "
            f"{options.lr:g}, float64"
        )
        reference = toy.is_reference(options.s, options.lr, options.steps)
        text = toy.table(rows, reference)
        footnote = TOY_FOOTNOTE if reference else TOY_FOOTNOTE.splitlines()[0]
        print(f"\n{title}\nfinal f1, f2 from the five starts:\n\n{text}\n{footnote}\n")
        save_toy(rows, options.s, title, options.plot)
        _say_files(options)
    return _end(
        parser,
        interrupted,
        f"{finished} of {n_runs} runs",
        {row.name: row.failure for row in rows if row.failure},
    )


def _end(parser: _Parser, interrupted: bool, runs: str, failures: dict[str, str]) -> int:
    """Say on stderr what is missing; returns the exit status."""
    for name, failure in failures.items():
        print(f"{parser.prog}: error: {name}: {failure}", file=sys.stderr)
    if interrupted:
        print(f"interrupted: {runs} finished", file=sys.stderr)
        return 130
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: those after the command's name; None takes the process's.

    Returns:
        0; 1 where a method failed, 130 after Ctrl-C or SIGTERM, in both cases with what is
        finished written. Mistakes leave by `SystemExit` with status 2.
    """
    parser, verbs = _parser()
    options = parser.parse_args(arguments)
    verb = {"train": _train, "compare": _compare, "toy": _toy}[options.verb]
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:
        # Schedulers end jobs so; what is finished is kept then, too.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) or signal.SIG_DFL
    try:
        return verb(verbs[options.verb], options)
    except KeyboardInterrupt:  # before the first run, or after the last
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)

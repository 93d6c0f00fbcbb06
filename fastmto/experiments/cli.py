"""The command `fastmto`.

Everything heavy is imported when it is needed: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DEFAULTS, EXTRAS, Parser, parsers

if TYPE_CHECKING:
    import torch

    from .compare import Compared
    from .data.base import MultiTaskData
    from .experiment import Experiment
    from .records import TrainResult
    from .toy import Row


def _check(parser: Parser, options: argparse.Namespace, needs: str) -> None:
    """Ends in an error where what comes out could not be written, or a package is missing."""
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is None:
            continue
        if path.is_dir():
            parser.error(f"argument {option}: {path} is a folder")
        if not path.parent.is_dir():
            parser.error(f"argument {option}: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            parser.error(f"argument {option}: {path} cannot be written")
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


def _device(parser: Parser, name: str) -> torch.device:
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


def _load(parser: Parser, options: argparse.Namespace, seed: int) -> MultiTaskData:
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


def _write_json(path: Path | None, report: dict[str, Any], key: str, rows: Sequence[Any]) -> None:
    """Write the report with all that the rows hold under the key, if there is a file for it."""
    if path is not None:
        whole = {**report, key: [row.as_json() for row in rows]}
        path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n")


def _say_files(options: argparse.Namespace) -> None:
    print(f"picture: {options.plot}")
    if options.json is not None:
        print(f"figures: {options.json}")


def _train(parser: Parser, options: argparse.Namespace) -> int:
    """`fastmto train`: load, train with each balancer, table, picture, JSON."""
    if len(set(options.balancer)) < len(options.balancer):
        parser.error(f"argument --balancer: named twice in {' '.join(options.balancer)}")
    _check(parser, options, options.data)

    import torch

    from .experiment import environment
    from .plot import save_plot
    from .tables import train_table

    device = _device(parser, options.device)
    threads = DEFAULTS[options.data].threads
    if threads is not None:
        torch.set_num_threads(threads)
    data = _load(parser, options, options.seed).to(device)
    experiment = _experiment(options)
    title = experiment.title(data)
    results: list[TrainResult] = []
    failures: dict[str, str] = {}
    interrupted = False
    for name in options.balancer:
        with _bar(experiment.n_steps(data), "step") as bar:
            bar.set_description(name)

            def advance(losses: torch.Tensor, bar: Any = bar) -> None:
                if bar.update():  # true when the bar was redrawn, a few times a second
                    bar.set_postfix_str(" ".join(f"{x:.3f}" for x in losses.tolist()))

            try:
                results.append(experiment.train(data, name, options.seed, advance))
            except KeyboardInterrupt:
                interrupted = True
                break
            except (ValueError, RuntimeError) as error:
                failures[name] = str(error)
                break

    if results:
        print(f"\n{title}\ntest part, after the last epoch:\n\n{train_table(results)}\n")
        save_plot(results, title, options.plot)
        report = {
            "config": {
                **experiment.as_json(data),
                "balancers": options.balancer,
                "seed": options.seed,
            },
            "versions": environment(),
        }
        _write_json(options.json, report, "runs", results)
        _say_files(options)
    return _end(parser, interrupted, len(results), len(options.balancer), failures)


def _compare(parser: Parser, options: argparse.Namespace) -> int:
    """`fastmto compare`: every balancer with every seed, table, picture, JSON."""
    _check(parser, options, options.data)

    import torch

    from .compare import compare, save_data
    from .experiment import environment
    from .plot import save_comparison
    from .tables import compare_table

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
            _write_json(options.json, report, "balancers", so_far)

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
        text = compare_table(rows, device.type)
        print(f"\n{title}\ntest part, after the last epoch:\n\n{text}\n")
        save_comparison(rows, title, options.plot)
        _say_files(options)
    return _end(
        parser,
        interrupted,
        sum(len(row.results) for row in rows),
        len(options.balancers) * options.seeds,
        {row.name: row.failure for row in rows if row.failure},
    )


def _toy(parser: Parser, options: argparse.Namespace) -> int:
    """`fastmto toy`: every method from every start, table, picture, JSON."""
    _check(parser, options, "toy")

    from . import toy
    from .experiment import environment
    from .plot import save_toy
    from .tables import toy_table

    rows: list[Row] = []
    interrupted = False
    n_runs = len(options.balancers) * len(toy.STARTS)
    report = {
        "config": {name: getattr(options, name) for name in ("balancers", "s", "lr", "steps")},
        "versions": environment(),
    }

    def keep(so_far: list[Row]) -> None:
        rows[:] = so_far

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

    # Written once: all ways again after each of the runs would take as long as many of them.
    _write_json(options.json if rows else None, report, "methods", rows)
    finished = sum(len(row.runs) for row in rows)
    if finished:
        title = (
            f"toy problem, s = {options.s:g}: {options.steps:,} steps of Adam with lr "
            f"{options.lr:g}, float64"
        )
        text = toy_table(rows, toy.is_reference(options.s, options.lr, options.steps))
        print(f"\n{title}\nfinal f1, f2 from the five starts:\n\n{text}\n")
        save_toy(rows, options.s, title, options.plot)
        _say_files(options)
    return _end(
        parser,
        interrupted,
        finished,
        n_runs,
        {row.name: row.failure for row in rows if row.failure},
    )


def _end(
    parser: Parser, interrupted: bool, finished: int, total: int, failures: dict[str, str]
) -> int:
    """Say on stderr what is missing; returns the exit status."""
    runs = f"{finished} of {total} runs finished"
    for name, failure in failures.items():
        print(f"{parser.prog}: error: {name}: {failure}; {runs}", file=sys.stderr)
    if interrupted:
        print(f"interrupted: {runs}", file=sys.stderr)
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
    parser, verbs = parsers()
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

"""`tune`: its arguments, and the fits of a search."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback

from rexnet_lit.cli import shipped_configs
from rexnet_lit.cli.config import leaves
from rexnet_lit.cli.several_runs import SeveralRuns, options_parser, parse
from rexnet_lit.data.folder import fingerprint, scan
from rexnet_lit.data.settings import SplitSettings
from rexnet_lit.search import result
from rexnet_lit.search.space import read_space
from rexnet_lit.search.state import remember
from rexnet_lit.search.tune import Search
from rexnet_lit.training.callbacks.console import print_table
from rexnet_lit.training.optim import OptimizerSettings
from rexnet_lit.utils.errors import Stopped, UserError

_TEST_FRACTION = 0.15  # set aside where there is no test split


def run_tune(argv: Sequence[str]) -> int:
    """Run `tune`."""
    parser = options_parser("tune", "[--budget 30m] [--trials N] [--space FILE]", "Search for better settings.")
    parser.add_argument("--budget", metavar="TIME", help="how long to search, such as 90s, 30m or 2h; 30m by default")
    parser.add_argument("--trials", type=int, metavar="N", help="how many settings to try, instead of a time")
    parser.add_argument("--space", metavar="FILE", default="tune", help="what to search; the shipped tune by default")
    args, rest = parser.parse_known_args(argv[1:])
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune needs the package optuna; install the extra: pip install 'rexnet-lit[tune]'")
    budget = _seconds(args.budget or "30m") if args.budget or args.trials is None else None
    if args.trials is not None and args.trials < 1:
        raise UserError(f"--trials is {args.trials}; expected 1 or more")
    runs = parse(rest)
    root = Path(runs.settings["trainer"]["default_root_dir"] or ".")
    search, data = _search(runs, root, args.space, budget, args.trials)
    stopped: BaseException | None = None
    try:
        search.run()
    except Stopped as error:
        stopped = Stopped(error.exit_code - 128, "stopped; the same command goes on where this one has stopped")
        if not search.full:
            raise stopped from None
    except KeyboardInterrupt as error:
        stopped = error
        if not search.full:
            raise
    _finish_tune(search, root, data, runs.overlay, stopped=stopped is not None)
    if stopped is not None:
        raise stopped
    return 0


def _search(
    runs: SeveralRuns, root: Path, space_name: str, budget: float | None, trials: int | None
) -> tuple[Search, dict[str, Any]]:
    """Return the search, and the settings of its data; without a test split, one is set aside."""
    if runs.settings["trainer"]["max_time"] is not None:
        raise UserError("trainer.max_time: a search has a time of its own; use --budget")
    data, fixed = dict(runs.settings["data"]), dict[str, Any]()
    images = scan(data["root"], SplitSettings.of(data))
    if "test" not in images.splits and not data["test_fraction"]:
        fixed["data.test_fraction"] = data["test_fraction"] = _TEST_FRACTION
        images = scan(data["root"], SplitSettings.of(data))
        print(  # noqa: T201
            f"There is no test split: {len(images.splits['test'])} images are set aside to measure the result. They "
            "neither train nor choose anything (data.test_fraction).",
            flush=True,
        )
    if "val" not in images.splits:
        raise UserError(
            "data.val_fraction is 0, and there is no val split; a search needs validation images to choose by"
        )
    base = {**dict(leaves(runs.settings)), **fixed}
    if base["model.optimizer.lr"] is None:
        base["model.optimizer.lr"] = OptimizerSettings(name=base["model.optimizer.name"]).full_lr(runs.from_scratch)
    file = shipped_configs.find(space_name, "--space")
    space = read_space(yaml.safe_load(Path(file).read_text("utf-8")), space_name, base)
    described = {f"--space {key}": str(setting) for key, setting in space.items()}
    digests = {f"{name} images": fingerprint(samples) for name, samples in images.splits.items()}
    remember(root / "tuning", {**runs.identity, **fixed, **described, **digests})

    def train(changes: Mapping[str, Any], callbacks: Sequence[Callback] = ()) -> Path:
        return runs.train({**fixed, **changes}, callbacks)

    return Search(train, root / "tuning", space, base, budget, trials, base["model.select"]), data


def _finish_tune(
    search: Search, root: Path, data: Mapping[str, Any], overlay: Mapping[str, Any], *, stopped: bool
) -> None:
    """Ship the best weights so far, measure them on the test images unless the search was stopped, and print both."""
    run = result.ship(search, root, overlay)
    verdict = "" if stopped else result.describe_test(search, data)
    result.write_report(search, Path(data["root"]).name, verdict)
    best, default = search.best, search.done[0]
    rows = [
        ("validation top-1", f"{best.metrics['val/top1']:.4f} ({default.metrics['val/top1']:.4f} with the config's)")
    ]
    rows += [("validation loss", f"{best.loss:.4f} ({default.loss:.4f})")]
    rows += [("", f"{key}: {before} -> {after}") for key, (before, after) in result.changes(search).items()]
    rows += [("run folder", str(run)), ("model", str(run / "model.safetensors"))]
    rows += [("all runs", str(search.folder / "leaderboard.csv")), ("report", str(search.folder / "report.html"))]
    print_table(f"Search {'stopped' if stopped else 'finished'}: {len(search.done)} runs, {search.elapsed:.0f} s", rows)
    if verdict:
        print(f"{verdict}.", flush=True)  # noqa: T201


def _seconds(text: str) -> float:
    """Return the seconds of a time such as ``1h30m``; a bare number is minutes."""
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?|{number}", text.strip())
    if not match or not any(match.groups()):
        raise UserError(f"--budget is {text!r}; expected a time such as 90s, 30m or 2h")
    hours, minutes, seconds, alone = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * (minutes + alone) + seconds
    if total <= 0:
        raise UserError(f"--budget is {text!r}; expected more than no time")
    return total

"""Searching for better settings within a number of minutes.

The first run has the settings of the config, in full, so the result is never worse on the validation images than a fit.
Before its training it measures which symmetries the images have, which decides what is tried first, and what is not.
Then short runs try other settings, which Optuna proposes; the best of them are trained in full (successive halving;
Jamieson and Talwalkar 2016). In the rest of the time the best settings are trained again with another seed, and
training continues from the best weights; the weights with the best validation loss ship.

Every decision is a function of what is recorded, so that a search that was killed goes on as it would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from rexnet_lit.checks.symmetries import HFLIP, SETTINGS, Symmetries
from rexnet_lit.data.augmentation import AUTO, MIRRORED
from rexnet_lit.search.pace import Pace, TooLongError
from rexnet_lit.search.space import Setting, Values, propose
from rexnet_lit.search.state import TRIALS, finished_run, read_result
from rexnet_lit.search.symmetries import MeasureSymmetries, read_symmetries, wanted_settings
from rexnet_lit.search.trial import Trial, write_average, write_leaderboard
from rexnet_lit.training.parts import SELECT
from rexnet_lit.utils.errors import Stopped, UserError
from rexnet_lit.utils.files import write_file

SHORT = 4
"""A short run has this fraction of the epochs of a full one."""
_SHORT_SHARE, _FULL_SHARE = 0.35, 0.7
"""When the short and the full runs end, as shares of the time after the first run; the rest trains the best again."""
_LONGEST = 0.85
"""The share of the time that the first run may take, with the second one where the symmetries of the images ask for
other settings; if it would take more, all runs have fewer epochs."""
_LAST = ("again", "continued")
"""The stages after the choice of the settings."""
_LR, _EPOCHS = "model.optimizer.lr", "trainer.max_epochs"


class Search:
    """A search, and what it has recorded.

    Args:
        fit: Trains a run; it also takes callbacks of the trainer.
        folder: ``tuning/``.
        space: The settings to search.
        base: The settings of the config, by key.
        budget: Seconds, or None.
        trials: Short runs, or None for as many as the budget allows.
        select: What makes weights the best, as ``model.select``.
    """

    def __init__(
        self,
        fit: Callable[..., Path],
        folder: Path,
        space: Mapping[str, Setting],
        base: Mapping[str, Any],
        budget: float | None,
        trials: int | None,
        select: str,
    ) -> None:
        self.fit, self.folder, self.space, self._given = fit, folder, dict(space), dict(base)
        self.budget, self.count, self.select = budget, trials, select
        self.epochs, self.seed = int(base[_EPOCHS]), int(base["seed_everything"])
        self.done: list[Trial] = []
        self._earlier = 0.0
        self._start = time.monotonic()
        self._epochs_file, self._symmetries_file = folder / "epochs.json", folder / "symmetries.json"
        if self._epochs_file.is_file():
            self._shorten(json.loads(self._epochs_file.read_text("utf-8")))
        self._record = folder / TRIALS
        if self._record.is_file():
            rows = json.loads(self._record.read_text("utf-8"))
            self.done = [Trial(**{**row, "start": tuple(row.get("start", ()))}) for row in rows]
            self._earlier = sum(trial.seconds for trial in self.done)

    @property
    def base(self) -> Mapping[str, Any]:
        """The settings of the config, by key, with what the first run has chosen for `auto`."""
        auto = self._given.get(HFLIP) == AUTO and self.symmetries is not None
        return {**self._given, HFLIP: 0 if self._holds[HFLIP] is False else MIRRORED} if auto else self._given

    @property
    def symmetries(self) -> Symmetries | None:
        """What the first run has measured, before its training."""
        return read_symmetries(self._symmetries_file)

    @property
    def _wanted(self) -> Values:
        """The settings that the symmetries of the images ask for, where they are not the config's."""
        return wanted_settings(self.symmetries, self.base, self.space)

    @property
    def _holds(self) -> Mapping[str, bool | None]:
        """Whether each symmetry holds, by setting; empty where they are not known."""
        return self.symmetries.holds if self.symmetries is not None else {}

    @property
    def _uses_symmetries(self) -> bool:
        uses = not SETTINGS.isdisjoint(self.space) or self._given.get(HFLIP) == AUTO
        return uses and self._given["data.augment.name"] != "none"

    @property
    def _needed(self) -> int:
        """How many full runs there should be time for."""
        return 2 if self._wanted else 1

    @property
    def elapsed(self) -> float:
        """Seconds that the search has taken, without those when it was not running."""
        return self._earlier + time.monotonic() - self._start

    def run(self) -> None:
        """Run what is left of the search.

        Raises:
            Stopped: A signal has stopped it.
            UserError: The first run failed.
        """
        for trial in self._plan():
            try:
                finished = self._train(trial)
            except TooLongError as error:
                finished = self._train(dataclasses.replace(trial, epochs=self._epochs_that_fit(error)))
            if trial.stage == "default" and self.symmetries is not None:
                print(f"{self.symmetries}.", flush=True)  # noqa: T201
            if finished.stage == "default" and finished.status == "failed":
                raise UserError(f"the settings of the config fail: {finished.reason}")
            self.done.append(finished)
            rows = [dataclasses.asdict(each) for each in self.done]
            write_file(self._record, json.dumps(rows, indent=1) + "\n")
            order = sorted(self.done, key=lambda t: (t.stage == "short", t.status == "failed", *self._rank(t)))
            write_leaderboard(self.folder / "leaderboard.csv", order, {key: self.base[key] for key in self.space})
            self._print(finished)
            self._remove_checkpoints()

    def _epochs_that_fit(self, error: TooLongError) -> int:
        """Shorten all runs to what the budget allows; return the number of epochs."""
        budget = self.budget or 0.0
        for runs in (self._needed, 1):  # if there is no time for two, one of them
            epochs = int(((_LONGEST * budget - self.elapsed) / runs - error.begun) / error.epoch)
            if epochs >= 1:
                break
        else:
            raise UserError(
                f"--budget: an epoch takes about {error.epoch:.0f} s, too long for a search of {budget:.0f} s; allow "
                "more time, or make data.image_size smaller"
            )
        print(  # noqa: T201
            f"{self.epochs} epochs would take about {self.epochs * error.epoch:.0f} s, too long for a search of "
            f"{budget:.0f} s: its runs have {epochs} epochs.",
            flush=True,
        )
        self._shorten(epochs)
        write_file(self._epochs_file, f"{epochs}\n")
        shutil.rmtree(self.folder / "trials", ignore_errors=True)
        return epochs

    def _shorten(self, epochs: int) -> None:
        """Let all runs have so many epochs."""
        self.epochs = epochs
        self.space.pop(_EPOCHS, None)

    def _plan(self) -> Iterator[Trial]:
        """Yield the trials that are not recorded, one after the other."""
        if not self.done:
            yield Trial(0, "default", {}, self.epochs, self.seed)
        yield from self._short_trials()
        yield from self._full_trials()
        yield from self._last_trials()

    def _short_trials(self) -> Iterator[Trial]:
        """Yield short runs: first the config's settings, then what may matter most, then Optuna's proposals."""
        while not any(trial.stage in ("full", *_LAST) for trial in self.done):
            tried = [trial for trial in self.done if trial.stage == "short"]
            enough = self.count is not None and len(tried) > self.count
            runs = 1 if tried else 4 if self._wanted else 2  # one alone would show nothing
            if enough or not self._fits(self._seconds_of(runs * _short(self.epochs)), _SHORT_SHARE):
                return
            values = self._next(len(tried) - 1) if tried else {}
            epochs = _short(int(values.get(_EPOCHS, self.epochs)))
            yield Trial(len(self.done), "short", values, epochs, self.seed)

    def _last_trials(self) -> Iterator[Trial]:
        """Yield runs that continue from the best weights, and runs with another seed where these are no better."""
        first, wanted = self.done[0], self._wanted
        if len(self.done) == 1 and wanted:  # no short runs: what the symmetries ask for goes on from the first run
            most = int(self.base[_EPOCHS])
            if fitting := [n for n in range(1, most + 1) if self._fits(self._seconds_of(n))]:
                yield Trial(1, "continued", wanted, fitting[-1], self.seed + 1, start=(first.name,))
        while True:
            last = [trial for trial in self.done if trial.stage in _LAST]
            number, recipe = len(self.done), self._recipe
            epochs, seed = recipe.epochs, self.seed + 1 + len(last)
            ends = self.budget is None and any(trial.stage == "continued" for trial in last)
            if ends or (last and last[-1].status == "failed"):
                return
            improves = bool(last) and last[-1] is self.best and last[-1].stage == "continued"
            if not improves and not (last and last[-1].stage == "again") and self._fits(self._seconds_of(epochs)):
                yield Trial(number, "again", recipe.values, epochs, seed)
            elif fitting := [n for n in (epochs // 2, epochs // 4) if n and self._fits(self._seconds_of(n))]:
                rate = float(f"{self._value(recipe, _LR) / 2:.4g}")
                values = {**self.best.values, _LR: rate}
                yield Trial(number, "continued", values, fitting[0], seed, start=self._next_start)
            else:
                return

    @property
    def seen(self) -> list[tuple[Values, float]]:
        """The value of each searched setting in the short runs, and their validation loss."""
        short = [trial for trial in self.done if trial.stage == "short" and math.isfinite(trial.loss)]
        defaults = {key: self.base[key] for key in self.space}
        return [({**defaults, **trial.values}, trial.loss) for trial in short]

    def _next(self, number: int) -> Values:
        """Return the values to try: one change at a time of what matters most, then what Optuna proposes."""
        first, without = self._first_changes(), {**self.base, **self._wanted}
        if number < len(first):
            changed = first[number]
        else:
            failing = (key for key, holds in self._holds.items() if holds is False and key in self.space)
            fixed = {key: Setting(choices=(without[key],)) for key in failing}
            changed = propose({**self.space, **fixed}, self.seen, number, self.seed)
        return {key: value for key, value in changed.items() if value != self.base[key]}

    def _first_changes(self) -> list[Values]:
        """Return what to change first: what the symmetries ask for, those that are unknown, then the learning rate."""
        wanted, holds = self._wanted, self._holds
        found = [wanted] if wanted else []
        turns = self.space["data.augment.quarter_turns"].choices if "data.augment.quarter_turns" in self.space else ()
        for key in ("data.augment.hflip", "data.augment.vflip"):
            choices = self.space[key].choices if key in self.space and holds.get(key) is None else ()
            others = [value for value in choices if value != self.base[key]]
            turned = turns and key.endswith("vflip") and holds.get("data.augment.quarter_turns") is not False
            more = {"data.augment.quarter_turns": turns[-1]} if turned else {}
            found += [{**wanted, key: value, **more} for value in others[:1]]
        rates = self.space[_LR].choices if _LR in self.space else ()
        if self.base[_LR] in rates:
            place = rates.index(self.base[_LR])
            found += [{**wanted, _LR: rates[i]} for i in (place + 1, place - 1) if 0 <= i < len(rates)]
        return found

    def _full_trials(self) -> Iterator[Trial]:
        """Yield full runs of the settings whose short runs are better than that of the config's settings."""
        short = [trial for trial in self.done if trial.stage == "short"]
        if not short:
            return
        reference = short[0]
        better = sorted((trial for trial in short[1:] if trial.loss < reference.loss), key=lambda trial: trial.loss)
        most = max(1, (len(short) + 2) // 3)
        for candidate in better[:most]:
            full = [trial.values for trial in self.done if trial.stage == "full"]
            if candidate.values in full:
                continue
            if any(trial.stage in _LAST for trial in self.done):
                return
            epochs = int(candidate.values.get(_EPOCHS, self.epochs))
            if not self._fits(self._seconds_of(epochs), _FULL_SHARE if full else 1.0):
                continue
            yield Trial(len(self.done), "full", candidate.values, epochs, self.seed)

    def _seconds_of(self, epochs: int) -> float:
        """Return how long a run may take, by the runs so far."""
        rates = [trial.seconds / trial.epochs for trial in self.done if trial.status == "finished"]
        return epochs * max(rates[-3:], default=0.0)

    def _fits(self, seconds: float, share: float = 1.0) -> bool:
        """Return whether a run ends within a share of the time after the first run."""
        if self.budget is None:
            return True
        first = self.done[0].seconds
        return self.elapsed + seconds <= first + share * (self.budget - first)

    def _train(self, trial: Trial) -> Trial:
        """Run a trial; a failed one is recorded with its reason."""
        root, start = self.folder / "trials" / trial.name, time.monotonic()
        changes: Values = {"trainer.default_root_dir": str(root)}
        callbacks = list[Callback]()
        if trial.stage == "default" and self._uses_symmetries:
            callbacks.append(MeasureSymmetries(self._symmetries_file))
        if self.budget is not None:
            left, most = max(5.0, 1.05 * self.budget - self.elapsed), _LONGEST * self.budget
            changes["trainer.max_time"] = {"seconds": math.ceil(left)}
            if trial.stage == "default" and not self._epochs_file.is_file():
                callbacks.append(Pace(lambda: most / self._needed))
        try:
            changes |= self.settings_of(trial)
            run = finished_run(root)
            if run is None:
                with _screen_in(root / "screen.txt"):
                    run = self.fit(changes, callbacks)
        except (Stopped, KeyboardInterrupt, TooLongError):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return dataclasses.replace(
                trial, seconds=time.monotonic() - start, status="failed", reason=f"{type(error).__name__}: {reason}"
            )
        metrics = read_result(run)["metrics"]
        return dataclasses.replace(trial, seconds=round(time.monotonic() - start, 2), metrics=metrics)

    @property
    def full(self) -> list[Trial]:
        """The finished full runs: the config's settings come first."""
        return [trial for trial in self.done if trial.stage != "short" and trial.status == "finished"]

    @property
    def best(self) -> Trial:
        """The full run with the best weights; of equals the first."""
        return min(self.full, key=self._rank)

    @property
    def _recipe(self) -> Trial:
        """The best of the full runs that do not continue another."""
        return min((trial for trial in self.full if not trial.start), key=self._rank)

    def _value(self, trial: Trial, key: str) -> Any:
        return trial.values.get(key, self.base[key])

    @property
    def _next_start(self) -> tuple[str, ...]:
        """The runs from which training continues: the best, and from given weights the two best.

        Runs that started from the same weights have an average that is often better than each of them (Wortsman et al.,
        "Model soups", 2022, https://arxiv.org/abs/2203.05482).
        """
        given = self.base["model.weights"] or self.base["model.pretrained"]
        return tuple(trial.name for trial in sorted(self.full, key=self._rank)[: 2 if given else 1])

    def _rank(self, trial: Trial) -> tuple[float, float]:
        """Return what is lower for better weights: by ``model.select``, and of equals by the loss."""
        value = trial.metrics.get(f"val/{self.select}", 0.0)
        return -value if SELECT[self.select] == "max" else value, trial.loss

    def run_of(self, trial: Trial) -> Path:
        """Return the run folder of a finished trial."""
        run = finished_run(self.folder / "trials" / trial.name)
        if run is None:
            where = self.folder / "trials" / trial.name
            raise UserError(f"{where}: its files are missing; choose another --trainer.default_root_dir")
        return run

    def settings_of(self, trial: Trial) -> Values:
        """Return the settings by which a fit repeats a trial."""
        start = {"model.weights": str(self.start_file(trial).absolute())} if trial.start else {}
        later = trial.stage != "default"  # the first run has chosen it
        chosen = {key: value for key, value in self.base.items() if later and value != self._given[key]}
        return {**chosen, **trial.values, **start, _EPOCHS: trial.epochs, "seed_everything": trial.seed}

    def start_file(self, trial: Trial) -> Path:
        """Return the file with the weights that a trial starts from."""
        file = self.folder / "trials" / trial.name / "start.safetensors"
        if not file.is_file():
            by_name = {each.name: each for each in self.done}
            write_average([self.run_of(by_name[name]) / "model.safetensors" for name in trial.start], file)
        return file

    def _remove_checkpoints(self) -> None:
        """Keep the weights that may ship or be continued, and those of the config's settings."""
        kept = {*self._next_start, self.done[0].name}
        for trial in self.done:
            runs = (self.folder / "trials" / trial.name / "lightning_logs").glob("*")
            for run in runs if trial.name not in kept else ():
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
                (run / "model.safetensors").unlink(missing_ok=True)

    def _print(self, trial: Trial) -> None:
        shown = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in trial.values.items()) or "the config's"
        result = f"val top-1 {trial.metrics['val/top1']:.3f}, loss {trial.loss:.3f}" if trial.metrics else "failed"
        reason = f" ({trial.reason})" if trial.reason else ""
        left = f"; {max(0, self.budget - self.elapsed):.0f} s left" if self.budget is not None else ""
        best = f"; best so far {self.best.metrics['val/top1']:.3f}" if self.full else ""
        print(f"{trial.name} ({trial.stage}, {trial.seconds:.0f} s): {shown}: {result}{reason}{best}{left}", flush=True)  # noqa: T201


def _short(epochs: int) -> int:
    """Return the epochs of a short run."""
    return max(1, round(epochs / SHORT))


@contextlib.contextmanager
def _screen_in(file: Path) -> Iterator[None]:
    """Write what is printed into a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield

"""The search space: a YAML file with the candidates of each setting, and how Optuna proposes from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rexnet_lit.utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

Values = dict[str, Any]
"""The value of each searched setting, by key."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The candidates of a setting: ``choices``, or a range of numbers.

    Args:
        choices: Values to choose from; empty for a range.
        low: Lower end of the range.
        high: Upper end of the range.
        log: Whether the range is logarithmic.
        whole: Whether its numbers are integers.
    """

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        """Return the candidates as a user would write them."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"

    @property
    def distribution(self) -> BaseDistribution:
        """Optuna's description."""
        from optuna import distributions as kinds

        if self.choices:
            return kinds.CategoricalDistribution(self.choices)
        if self.whole:
            return kinds.IntDistribution(int(self.low), int(self.high), log=self.log)
        return kinds.FloatDistribution(self.low, self.high, log=self.log)

    def includes(self, value: Any) -> bool:
        """Return whether a value is a candidate."""
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


def read_space(content: Any, where: str, defaults: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings to search.

    Args:
        content: The mapping that a YAML file holds.
        where: Its name, for errors.
        defaults: All settings of the run by key; a key that is not among them is an error.

    Raises:
        UserError: A key is no setting, or its candidates are not understood.
    """
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: expected settings and their candidates, such as data.augment.hflip: [0, 0.5]")
    return {str(key): _setting(str(key), value, where, defaults) for key, value in content.items()}


def _setting(key: str, value: Any, where: str, defaults: Mapping[str, Any]) -> Setting:
    if key not in defaults:
        raise UserError(f"{where}: {key} is no setting of fit{did_you_mean(key, defaults)}")
    if isinstance(value, list) and len(value) > 1 and all(isinstance(v, str | int | float | None) for v in value):
        return Setting(choices=tuple(value))
    if isinstance(value, dict) and set(value) == {"times"} and isinstance(value["times"], list):
        base = defaults[key]
        if not isinstance(base, int | float):
            raise UserError(f"{where}: {key} is {base} by default, which cannot be multiplied; list its values")
        products = [base * factor for factor in value["times"]]
        return Setting(choices=tuple(round(p) if isinstance(base, int) else float(f"{p:.4g}") for p in products))
    if isinstance(value, dict) and {"low", "high"} <= set(value) <= {"low", "high", "log"}:
        low, high, log = value["low"], value["high"], bool(value.get("log", False))
        numbers = isinstance(low, int | float) and isinstance(high, int | float)
        if numbers and low < high and (low > 0 or not log):
            return Setting(low=low, high=high, log=log, whole=isinstance(low, int) and isinstance(high, int))
    raise UserError(
        f"{where}: {key} is {value!r}; expected a list of values, {{low: 0.1, high: 1.0}} or {{times: [0.5, 1, 2]}}"
    )


def propose(space: Mapping[str, Setting], seen: Sequence[tuple[Values, float]], number: int, seed: int) -> Values:
    """Return the values to try next, a function of its arguments alone: a search that was killed proposes the same.

    Args:
        space: The settings.
        seen: What was tried, and its validation loss.
        number: How many were proposed before.
        seed: The search's seed.
    """
    import optuna

    sampler = optuna.samplers.TPESampler(seed=1_000_003 * seed + number, n_startup_trials=6)
    study, distributions = _study_of(space, seen, sampler)
    tried = [values for values, _ in seen]
    for _ in range(20):  # of few combinations, one may come twice
        values: Values = dict(study.ask(distributions).params)
        if values not in tried:
            break
    return values


def _study_of(
    space: Mapping[str, Setting], seen: Sequence[tuple[Values, float]], sampler: BaseSampler | None = None
) -> tuple[Study, dict[str, BaseDistribution]]:
    """Return a study of what was tried, without the values that are no candidates, and what it may propose."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {key: setting.distribution for key, setting in space.items()}
    for values, loss in seen:
        known = {key: value for key, value in values.items() if space[key].includes(value)}
        own = {key: distributions[key] for key in known}
        study.add_trial(optuna.trial.create_trial(params=known, distributions=own, value=loss))
    return study, distributions


def importance(space: Mapping[str, Setting], seen: Sequence[tuple[Values, float]]) -> dict[str, float]:
    """Return the share of the loss's variation that each setting explains (fANOVA), largest first; none of few runs."""
    import optuna

    if len(seen) < 6 or len({loss for _, loss in seen}) < 3:
        return {}
    study, _ = _study_of(space, seen)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
    except (RuntimeError, ValueError):  # all runs agree in every setting
        return {}

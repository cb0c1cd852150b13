"""The findings of `check`, as data and on one screen of a terminal."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rexnet_lit.data.splits import Split
from rexnet_lit.data.verify import UnreadableFile
from rexnet_lit.utils.errors import plural

Severity = Literal["error", "warning", "info"]

SPOIL_SCORES = ("duplicate-across-splits", "near-duplicate-across-splits", "missing-class")
"""Codes of what makes the scores of a validation or test mislead: shown before everything else."""

_MOST_ROWS = 24  # classes shown, so that the findings stay on the screen
_MOST_PATHS = 3
_MOST_SUSPECTS = 10
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the user should know.

    Args:
        severity: ``error`` (training would fail or mislead), ``warning`` or ``info``.
        code: A short name, the same in all versions.
        message: What is wrong, in one line.
        advice: What to do.
        paths: All files concerned, relative to the folder.
    """

    severity: Severity
    code: str
    message: str
    advice: str = ""
    paths: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Suspect:
    """An image whose label may be wrong.

    Args:
        path: The image, relative to the folder.
        label: Its class in the folder.
        suggested: The class that the model predicts.
        prob_label: Probability of ``label``, predicted by a model that was not trained on the image.
        prob_suggested: Probability of ``suggested``.
        like_label: The most similar images of class ``label``, at most three, most similar first, without suspects and
            copies of the image.
        like_suggested: The same of class ``suggested``.
    """

    path: str
    label: str
    suggested: str
    prob_label: float
    prob_suggested: float
    like_label: tuple[str, ...] = ()
    like_suggested: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of `check.check`.

    Args:
        root: The folder.
        layout: ``split`` (DIR/train/CLASS), ``flat`` (DIR/CLASS) or ``file`` (a table).
        class_names: The classes in the order of their numbers.
        counts: Images by split and class, unreadable ones included.
        formats: Images by format.
        sizes: Smallest, median and largest ``width`` and ``height``.
        visible: Share of the images' area, as the mean over them, that the network is given outside training.
        animated: Number of images with more than one frame.
        clutter: Number of files and folders that were ignored.
        bad: The unreadable files.
        duplicates: Groups of files with the same bytes.
        near_duplicates: Groups of files that look the same; of files with the same bytes, only the first.
        findings: Errors first, then warnings (those that spoil the scores first), then the rest.
        suspects: Images whose label may be wrong, worst first; empty if labels were not checked.
        examples: Split, class and path of every image, for the report page; not in the JSON.
    """

    root: str
    layout: str
    class_names: tuple[str, ...]
    counts: dict[Split, dict[str, int]]
    formats: dict[str, int]
    sizes: dict[str, tuple[int, int, int]]
    visible: float
    animated: int
    clutter: int
    bad: tuple[UnreadableFile, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]
    suspects: tuple[Suspect, ...] = ()
    examples: tuple[tuple[Split, str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no errors."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Whether it is fit for training, and how many errors and warnings there are."""
        severities = [finding.severity for finding in self.findings]
        errors = plural(severities.count("error"), "error", "errors")
        warnings = plural(severities.count("warning"), "warning", "warnings")
        return f"{'fit' if self.ok else 'not fit'} for training: {errors}, {warnings}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the examples, for JSON."""
        rows = dataclasses.asdict(dataclasses.replace(self, examples=()))
        del rows["examples"]
        return {"ok": self.ok, **rows}


def print_result(result: CheckResult, console: Console) -> None:
    """Print a result. Names are shown with control characters escaped, and never as markup."""
    first = [finding for finding in result.findings if finding.code in SPOIL_SCORES]
    for finding in first:
        console.print(_finding(finding))
    console.print(_plain(f"{result.root}: {plural(len(result.class_names), 'class', 'classes')}, {_totals(result)}"))
    if result.counts:
        console.print(_class_table(result))
    if result.formats:
        formats = ", ".join(f"{count} {name}" for name, count in result.formats.items())
        sizes = [f"{side} {low} to {high} (median {median})" for side, (low, median, high) in result.sizes.items()]
        console.print(_plain(f"{formats}; {', '.join(sizes)}"))
        console.print(f"validation and prediction use {result.visible:.0%} of their area (see data.crop_mode)")
    for finding in result.findings:
        if finding not in first:
            console.print(_finding(finding))
    if result.suspects:
        console.print(_suspect_table(result.suspects))
    console.print(Text(result.verdict, style="bold green" if result.ok else "bold red"))


def _plain(text: str, style: str = "") -> Text:
    """Return text with control characters escaped, which is not parsed as markup."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), style=style)


def _totals(result: CheckResult) -> str:
    totals = {split: sum(by_class.values()) for split, by_class in result.counts.items()}
    return ", ".join(f"{count} {split}" for split, count in totals.items()) or "no images"


def _class_table(result: CheckResult) -> Table:
    """Show all classes, or the largest and smallest of very many."""
    names = list(result.class_names)
    hidden = len(names) - _MOST_ROWS
    if hidden > 0:
        first = next(iter(result.counts.values()))
        names.sort(key=lambda name: -first[name])
        names = names[: _MOST_ROWS // 2] + names[-_MOST_ROWS // 2 :]
    table = Table("class", *result.counts, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row, name in enumerate(names):
        if hidden > 0 and row == _MOST_ROWS // 2:
            table.add_row(Text(f"... {hidden} more", style="dim"))
        table.add_row(_plain(name), *(str(by_class[name]) for by_class in result.counts.values()))
    return table


def _suspect_table(suspects: tuple[Suspect, ...]) -> Table:
    table = Table("suspect", "label", "suggested", box=None, header_style="bold")
    for row in suspects[:_MOST_SUSPECTS]:
        label, suggested = f"{row.label} ({row.prob_label:.3f})", f"{row.suggested} ({row.prob_suggested:.3f})"
        table.add_row(_plain(row.path), _plain(label), _plain(suggested))
    if len(suspects) > _MOST_SUSPECTS:
        table.add_row(Text(f"... {len(suspects) - _MOST_SUSPECTS} more (--json lists all)", style="dim"))
    return table


def _finding(finding: Finding) -> Text:
    """Show what, what to do, and the first few files."""
    lines = [Text.assemble((f"{finding.severity}: ", _STYLES[finding.severity]), _plain(finding.message))]
    if finding.advice:
        lines.append(_plain(f"    {finding.advice}"))
    if finding.code == "suspect-label":  # a table follows
        return Text("\n").join(lines)
    lines += [_plain(f"    {path}", "dim") for path in finding.paths[:_MOST_PATHS]]
    if len(finding.paths) > _MOST_PATHS:
        lines.append(_plain(f"    and {len(finding.paths) - _MOST_PATHS} more (--json lists all)", "dim"))
    return Text("\n").join(lines)

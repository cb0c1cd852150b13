"""What the dataset doctor found, as data and on one screen of a terminal. Filled by `doctor`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rexnet_lit.data.splits import Split
from rexnet_lit.data.verify import UnreadableFile
from rexnet_lit.utils.errors import plural

_MOST_ROWS = 24  # classes shown, so that the findings stay on the screen
_MOST_PATHS = 3
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that the user should know.

    Args:
        severity: ``error`` (training would fail or mislead), ``warning`` or ``info``.
        code: A short name that stays the same between versions.
        message: What, in one line.
        advice: What to do.
        paths: All files it is about, relative to the folder.
    """

    severity: Literal["error", "warning", "info"]
    code: str
    message: str
    advice: str = ""
    paths: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """What `doctor.check` found.

    Args:
        root: The folder.
        layout: ``split`` (DIR/train/CLASS) or ``flat`` (DIR/CLASS).
        class_names: The classes in the order of their numbers.
        counts: Images by split and class, unreadable ones included.
        formats: Images by format.
        sizes: Smallest, median and largest ``width`` and ``height``.
        animated: How many have more than one frame.
        clutter: How many files and folders were left out.
        bad: The unreadable files.
        duplicates: Groups of files with the same bytes.
        near_duplicates: Groups of files that look the same; of files with the same bytes, only the first.
        findings: Errors first, then warnings, then the rest.
        examples: Split, class and path of every image, for pictures of them; not in the JSON.
    """

    root: str
    layout: str
    class_names: tuple[str, ...]
    counts: dict[Split, dict[str, int]]
    formats: dict[str, int]
    sizes: dict[str, tuple[int, int, int]]
    animated: int
    clutter: int
    bad: tuple[UnreadableFile, ...]
    duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]
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
        """Return everything but the examples as JSON takes it."""
        rows = dataclasses.asdict(dataclasses.replace(self, examples=()))
        del rows["examples"]
        return {"ok": self.ok, **rows}


def print_result(checkup: CheckResult, console: Console) -> None:
    """Print a checkup. Names are shown with control characters escaped, and never as markup."""
    console.print(_plain(f"{checkup.root}: {plural(len(checkup.class_names), 'class', 'classes')}, {_totals(checkup)}"))
    if checkup.counts:
        console.print(_class_table(checkup))
    formats = ", ".join(f"{count} {name}" for name, count in checkup.formats.items())
    if formats:
        width, height = checkup.sizes["width"], checkup.sizes["height"]
        console.print(
            _plain(
                f"{formats}; width {width[0]} to {width[2]} (median {width[1]}), "
                f"height {height[0]} to {height[2]} (median {height[1]})"
            )
        )
    for finding in checkup.findings:
        console.print(_finding(finding))
    style = "bold green" if checkup.ok else "bold red"
    console.print(Text(checkup.verdict, style=style))


def _plain(text: str, style: str = "") -> Text:
    """Return text that can neither move the cursor nor be taken as markup."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), style=style)


def _totals(checkup: CheckResult) -> str:
    totals = {split: sum(by_class.values()) for split, by_class in checkup.counts.items()}
    return ", ".join(f"{count} {split}" for split, count in totals.items()) or "no images"


def _class_table(checkup: CheckResult) -> Table:
    """Show all classes, or the largest and smallest of very many."""
    names = list(checkup.class_names)
    hidden = len(names) - _MOST_ROWS
    if hidden > 0:
        first = next(iter(checkup.counts.values()))
        names.sort(key=lambda name: -first[name])
        names = names[: _MOST_ROWS // 2] + names[-_MOST_ROWS // 2 :]
    table = Table("class", *checkup.counts, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row, name in enumerate(names):
        if hidden > 0 and row == _MOST_ROWS // 2:
            table.add_row(Text(f"... {hidden} more", style="dim"))
        table.add_row(_plain(name), *(str(by_class[name]) for by_class in checkup.counts.values()))
    return table


def _finding(finding: Finding) -> Text:
    """Show what, what to do, and the first few files."""
    lines = [Text.assemble((f"{finding.severity}: ", _STYLES[finding.severity]), _plain(finding.message))]
    if finding.advice:
        lines.append(_plain(f"    {finding.advice}"))
    lines += [_plain(f"    {path}", "dim") for path in finding.paths[:_MOST_PATHS]]
    if len(finding.paths) > _MOST_PATHS:
        lines.append(_plain(f"    and {len(finding.paths) - _MOST_PATHS} more (--json lists all)", "dim"))
    return Text("\n").join(lines)

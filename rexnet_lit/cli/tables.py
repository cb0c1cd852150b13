"""Tables on the screen."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from rexnet_lit.utils.errors import printable


def table(first: str, *titles: str, justify: Any = "right") -> Table:
    """Return an empty table of these columns; ``justify`` holds for all but the first."""
    empty = Table(first, box=None, header_style="bold")
    for title in titles:
        empty.add_column(Text(printable(title)), justify=justify)
    return empty

"""Class names as tables, files and figures show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rexnet_lit.utils.errors import printable


def shown_names(class_names: Sequence[str]) -> list[str]:
    """Return the names made printable and unique: ImageNet has two classes named "crane", shown as "crane (#134)"."""
    names = [printable(name) for name in class_names]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} (#{index})" for index, name in enumerate(names)]

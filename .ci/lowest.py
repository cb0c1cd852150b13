"""Prints pip's constraints for the lowest versions that pyproject.toml allows, for ``make lowest``.

torch and torchvision stay: the floors of their releases differ by Python version, and they are most of the download.
"""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
needed = text.partition("dependencies = [")[2].partition("notebook = [")[0]
for name, version in re.findall(r'"([\w.-]+)(?:\[\w+\])?>=([\w.]+)', needed):
    if name not in ("torch", "torchvision"):
        print(f"{name}=={version}")  # noqa: T201

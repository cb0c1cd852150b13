"""The shipped configs, and how ``--config`` finds one by its name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rexnet_lit.utils.errors import UserError, did_you_mean, question
from rexnet_lit.utils.files import expand_home

DEFAULT = "finetune"
"""The config of a ``fit`` that names none, or only overlays."""


def folder() -> Path:
    """Return the folder of the shipped configs: inside an installed package, beside that of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped() -> dict[str, Path]:
    """Return the shipped configs by name, such as ``finetune`` and ``hardware/ddp``, overlays last."""
    root = folder()
    files = sorted(root.rglob("*.yaml"), key=lambda file: (len(file.parts), file))
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in files}


def named(name: str) -> Path:
    """Return the shipped config of a name, which may end in ``.yaml``.

    Raises:
        UserError: There is none.
    """
    known, wanted = shipped(), name.removesuffix(".yaml")
    if wanted not in known:
        last = wanted.rpartition("/")[2]
        hint = question(other for other in known if other.rpartition("/")[2] == last) or did_you_mean(wanted, known)
        raise UserError(f"no shipped config is called {name!r}{hint or '; there are ' + ', '.join(known)}")
    return known[wanted]


def find(name: str, option: str = "--config") -> str:
    """Return the path of what ``option`` names: a file, or else a shipped config.

    Raises:
        UserError: There is neither, or it is a URL.
    """
    if "://" in name:
        raise UserError(f"{option}: {name!r} is a URL; configs are read from local files only")
    name = expand_home(name)
    if Path(name).exists() and not Path(name).is_dir():
        return name
    try:
        return str(named(name))
    except UserError as error:
        raise UserError(f"{option}: there is no file {name!r}, and {error}") from None


def needs_default(command: str, configs: Iterable[str]) -> bool:
    """Return whether a run starts from the default config: it has no other, or only overlays, which are not whole."""
    return command == "fit" and all(Path(config).parent.parent == folder() for config in configs)


def summary(file: Path) -> str:
    """Return the first line of a config's comment."""
    return file.read_text("utf-8").partition("\n")[0].removeprefix("# ")

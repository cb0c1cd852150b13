"""``completion``: a script that completes commands and settings in the shell, without starting Python."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

import shtab

from rexnet_lit.cli.config import ARGUMENTS
from rexnet_lit.cli.lightning_cli import RexNetCLI
from rexnet_lit.cli.settings_parser import keys


class PrintCompletion(RexNetCLI):
    """Builds the parsers of the runs, and prints the script instead of running one of them."""

    parser_of_commands: argparse.ArgumentParser
    """The parser with all commands, which knows no settings."""

    def parse_arguments(self, parser: Any, argv: Any) -> None:
        """Print the script for the shell that ``argv`` names after the command, and exit."""
        _add_settings(self.parser_of_commands, self._subcommand_parsers)
        print(shtab.complete(self.parser_of_commands, shell=argv[1]))  # noqa: T201
        raise SystemExit(0)


def _add_settings(parser: argparse.ArgumentParser, runs: Mapping[str, Any]) -> None:
    """Add the settings of the runs to the parser of all commands, and how to complete files."""
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    for name, run in runs.items():
        for metavar in ARGUMENTS[name]:
            commands[name].add_argument(metavar.lower(), metavar=metavar)
        known = keys(run, name)
        for action in run._actions:
            if action.nargs == 0 or action.dest in known:
                _add_option(commands[name], action)
    for command in commands.values():
        for action in command._actions:
            if re.match("DIR|FILE|MODEL|PATH", str(action.metavar)):
                action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE


def _add_option(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    names = [name for name in action.option_strings if not name.endswith("+")]
    if action.nargs == 0:
        parser.add_argument(*names, action="store_true", help=action.help)
        return
    path = action.dest == "config" or any(action.dest in arguments.values() for arguments in ARGUMENTS.values())
    choices = re.fullmatch(r"\{(.*)\}", str(action.metavar))
    text = " ".join((action.help or "").replace("`", "").split()).partition(". ")[0].replace("%", "%%")
    parser.add_argument(
        *names, help=text, metavar="FILE" if path else None, choices=choices[1].split(",") if choices else None
    )

"""The entry point: runs a command from the registry, and turns exceptions into one line and an exit code.

A setting goes through ``config`` (files and options), ``lightning_cli`` (parsed, and passed to the objects it builds),
and the settings classes, which check it. An error of the user becomes a `UserError` where it is found, or in
``messages`` where another library raises it; `main` prints it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from rexnet_lit import __version__
from rexnet_lit.cli import suggestions
from rexnet_lit.cli.commands import COMMANDS
from rexnet_lit.cli.messages import Parser, user_message
from rexnet_lit.utils.errors import Stopped, UserError, printable


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the runs parse their settings themselves."""
    parser = Parser(
        prog="rexnet-lit",
        allow_abbrev=False,
        description="Fine-tune ReXNet image classifiers on your own folder of images.",
        epilog="Every command has its own --help. --debug (or REXNET_LIT_DEBUG=1) shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"rexnet_lit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        own = command.arguments is not None
        subparser = commands.add_parser(
            name, help=command.help, description=command.help, add_help=own, allow_abbrev=False
        )
        for argument, keywords in (command.arguments or {}).items():
            subparser.add_argument(argument, **keywords)
    return parser


def _check_names(argv: Sequence[str]) -> None:
    """Raise `UserError` for a command, or an option of one, that does not exist; the runs check their own options."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "--version"):
        return
    if name not in COMMANDS:
        hint = suggestions.which(name, COMMANDS)
        raise UserError(f"there is no command {name!r}{hint or '; there are ' + ', '.join(COMMANDS)}")
    arguments = COMMANDS[name].arguments
    options = [option for option in arguments or () if option.startswith("--")]
    for argument in argv[1:] if arguments is not None else ():
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in (*options, "--help", "--"):
            hint = suggestions.which(option.removeprefix("--"), [known.removeprefix("--") for known in options])
            raise UserError(f"{name}: unrecognized arguments: {option}{hint or f'; see: rexnet-lit {name} --help'}")


def _dispatch(argv: list[str]) -> int:
    _check_names(argv)
    args, rest = build_parser().parse_known_args(argv)
    command = COMMANDS[args.command]
    if rest and command.arguments is not None:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see: rexnet-lit {args.command} --help")
    args.argv = argv
    return command.run(args)


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The exit code: 0 for success; 1 for findings of `check` and for bugs; 2 for an error that the user can fix; 143,
        130 and 129 if the run was stopped by SIGTERM, Ctrl-C or the end of its terminal.
    """
    arguments = [a for a in argv if a != "--debug"]
    debug = len(arguments) < len(argv) or os.environ.get("REXNET_LIT_DEBUG") == "1"
    try:
        return _dispatch(arguments)
    except Stopped as stop:
        print(f"rexnet-lit: {stop}", file=sys.stderr)  # noqa: T201
        return stop.exit_code
    except KeyboardInterrupt:  # where no signal handlers are installed
        return 130
    except BrokenPipeError:  # the reader of the output has gone, as with `| head`
        sys.stderr.close()
        return 1
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, without a code
            return 143
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if debug:
            traceback.print_exception(error)
        print(f"rexnet-lit: error: {printable(message)}", file=sys.stderr)  # noqa: T201
        return 2

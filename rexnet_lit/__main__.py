"""``python -m rexnet_lit``: set the process up, then hand over to the command line."""

from __future__ import annotations

import signal
import sys

from rexnet_lit.process import tune


def main() -> int:
    """Run the command line and return its exit code."""
    signal.signal(signal.SIGTERM, _told)  # a training run has its own answer, which saves
    tune()  # before torch is imported, which happens below
    try:
        from rexnet_lit import cli
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return cli.main(sys.argv[1:])


def _told(number: int, frame: object) -> None:
    """End as the shell's convention has it, through the clean-up that an exception runs."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

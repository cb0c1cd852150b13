"""``python -m rexnet_lit``: set the process up, then hand over to the command line."""

from __future__ import annotations

import sys

from rexnet_lit import process


def main() -> int:
    """Run the command line and return its exit code."""
    process.have_streams()
    process.answer_signals()
    process.tune()  # before torch is imported, which happens below
    from rexnet_lit import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""``python -m rexnet_lit``: set the process up, then hand over to the command line."""

from __future__ import annotations

import sys

from rexnet_lit.process import tune


def main() -> int:
    """Run the command line and return its exit code."""
    tune()  # before torch is imported, which happens below
    from rexnet_lit import cli

    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

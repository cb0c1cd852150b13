"""``python -m rexnet_lit``: prepare the process, then run the command line."""

from __future__ import annotations

import sys

from rexnet_lit.utils import process


def main() -> int:
    """Run the command line and return its exit code."""
    process.open_missing_streams()
    process.escape_unencodable()
    process.install_signal_handlers()
    process.configure_allocator()  # before torch is imported, which the next line may do
    from rexnet_lit.cli import main

    return main.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

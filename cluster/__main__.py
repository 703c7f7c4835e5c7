"""Entry point of the `prox24` command and of `python -m cluster`."""

from __future__ import annotations

import sys

from cluster.command_line import run


def main() -> None:
    """Runs the command line and exits with its status."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

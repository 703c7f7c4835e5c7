"""Entry point of the `prox24` command and of `python -m cluster`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["status"]:
        # Answers at once, without the seconds that importing torch takes.
        from cluster.commands.status import main as status

        sys.exit(status(arguments[1:]))
    from cluster.command_line import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()

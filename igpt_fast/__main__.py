"""``python -m igpt_fast``, and the start of the ``igpt`` command: Ctrl-C counts from the first import on."""

import sys


def main() -> int:
    """Runs the command line of this process; returns the exit code."""
    try:
        from igpt_fast.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        print("igpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

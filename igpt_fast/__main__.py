"""``python -m igpt_fast``, and the start of the ``igpt`` command: Ctrl-C counts from the first import on."""

import os
import sys


def sleep_soon() -> None:
    """OpenMP's threads sleep after some 100 microseconds without work, not after milliseconds, which they take from
    other processes; libgomp reads it when torch is imported. What the user has set stays.
    """
    if os.environ.get("GOMP_SPINCOUNT") is None and os.environ.get("OMP_WAIT_POLICY") is None:
        os.environ["GOMP_SPINCOUNT"] = "2000"


def main() -> int:
    """Runs the command line of this process; returns the exit code."""
    sleep_soon()
    try:
        from igpt_fast.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        print("igpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

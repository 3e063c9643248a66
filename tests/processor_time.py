"""What a child process takes of the processor."""

import os
import subprocess
import sys


def processor_seconds(*command: str) -> float:
    """Processor time of a Python child, whatever its exit code; other work on the machine changes it little."""
    before = os.times()
    subprocess.run([sys.executable, *command], capture_output=True, check=False)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system

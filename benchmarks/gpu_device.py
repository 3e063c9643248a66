"""The GPU that is checked: what it is, and what is installed for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The GPU that is checked."""

    name: str
    capability: tuple[int, int]
    driver: str
    memory_gib: float
    versions: dict[str, str]

    @property
    def architecture(self) -> str:
        """For IGPT_CUDA_ARCHS; 9.0 has instructions of its own."""
        major, minor = self.capability
        return f"{major}{minor}{'a' if self.capability == (9, 0) else ''}-real"


PROBE = """
import json, platform, torch
if not torch.cuda.is_available():
    print(json.dumps("torch has no CUDA device" if torch.version.cuda else "this torch is a build without CUDA"))
else:
    p = torch.cuda.get_device_properties(0)
    print(json.dumps([p.name, [p.major, p.minor], p.total_memory / 2**30, {
        "python": platform.python_version(), "torch": torch.__version__, "torch_cuda": torch.version.cuda}]))
"""


def find_device() -> Device | str:
    """The GPU, or why there is none. Another process asks, so that this one holds none of its memory."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"torch cannot be asked: {done.stderr.strip()[-300:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    if isinstance(found, str):
        return found
    name, (major, minor), memory, versions = found
    versions["nvcc"] = _first_match("release", _ask([nvcc() or "nvcc", "--version"]))
    driver = _ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]).strip()
    return Device(name, (major, minor), driver or "unknown", round(memory, 1), versions)


def _ask(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _first_match(word: str, text: str) -> str:
    return next((line.strip() for line in text.splitlines() if word in line), "unknown")


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

"""The oldest declared torch, the pinned and the newest, and every Python: import, a picture, a slice of the tests.

``make check-versions``: each torch on the first Python, the newest on the others. Each pair gets an environment of its
own in build/versions, which is removed afterwards: a CUDA build of torch takes 5 GB. ``TORCH_INDEX`` is an index to
take torch from. Arguments are interpreters (``make check-versions PYTHONS="/a/python3.12"``); without, those of PATH.
Writes docs/versions.md, and fails where a row does.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import check_wheel

ROOT = Path(__file__).resolve().parents[1]
HERE, TABLE = ROOT / "build" / "versions", ROOT / "docs" / "versions.md"
MINORS = (11, 12, 13, 14)
# Beside igpt_fast[hf]: what the slice imports.
TOOLS = ("pytest>=8,!=9.2.0", "hypothesis", "scipy", "onnx", "onnxruntime", "onnxscript")
SLICE = (
    "tests/ops/test_rms_norm.py",
    "tests/ops/test_quantize.py",
    "tests/ops/test_causal_attention_cpu.py",
    "tests/model/test_parity.py",
    "tests/engines/cpu/test_decoder.py",
    "tests/sampling/test_decoding.py",
    "tests/model/test_export.py",
)
HEAD = """# Versions of Python and torch

`make check-versions`, on {date}, commit {commit}, {machine}. One wheel for each Python, whatever its
torch is: the compiled module knows nothing of torch. The slice of the tests: numerics of the ops against their
definitions, models against transformers', the CPU decoder, sampling, export; without the CUDA kernels' emulator.

| Python | torch | compiled module | one picture | tests |
|---|---|---|---|---|
{rows}

What fails with torch 2.6: its exporter (`torch.export`) cannot follow a model that returns a `ModelOutput` (`strict`), cannot
read back what it wrote of an exported model, and keeps `quantize` and `dequantize` as ops of this package. One
error of attention at the level `generic` is 2.3 times that of 2.6's own expression, where the tests allow 2. Whoever
exports models needs a newer torch; `torch.compile` and training have not been tested with 2.6.

`torch>=2.6` has no upper bound: a newer one than those above is expected to work. `constraints.txt` pins what all
tests run on.
"""


class FailedError(Exception):
    """A step went wrong; the message is one line."""


@dataclass(frozen=True)
class Python:
    path: str
    version: str

    @property
    def minor(self) -> int:
        return int(self.version.split(".")[1])


def run(*command: object, **options: object) -> str:
    """Its standard output.

    Raises:
        FailedError: With the last line that it says.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        print(done.stdout + done.stderr, file=sys.stderr)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise FailedError((lines or [f"status {done.returncode}"])[-1][:200])
    return str(done.stdout)


def interpreters(given: list[str]) -> list[Python]:
    """By version; a name that does not start, such as that of a version manager which has none, is left out."""
    found = {}
    for name in given or [f"python3.{minor}" for minor in MINORS]:
        path = shutil.which(name)
        try:
            version = run(path, "-c", "import platform; print(platform.python_version())").strip() if path else ""
        except FailedError:
            version = ""
        if not version and given:
            sys.exit(f"check-versions: {name} does not start")
        if version:
            found[int(version.split(".")[1])] = Python(str(path), version)
    return [found[minor] for minor in sorted(found)]


def torches() -> dict[str, str]:
    """Requirements: the oldest that pyproject.toml declares, what constraints.txt pins, and the newest."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert oldest is not None
    assert pinned is not None
    return {"oldest": f"torch=={oldest[1]}.*", "pinned": f"torch=={pinned[1]}", "newest": "torch"}


def build(python: Python) -> Path:
    """The wheel for a Python; what does not include Python's headers is compiled once for all."""
    folder = HERE / f"wheel-{python.version}"
    environment = {
        **os.environ,
        "IGPT_CUDA": "OFF",
        "CMAKE_CXX_COMPILER_LAUNCHER": f"{sys.executable};{ROOT / 'tests' / 'compile_once.py'}",
    }
    command = (python.path, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", folder)
    run(*command, "-C", f"build-dir=build/versions/objects-{python.version}", ROOT, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: Python, wheel: Path, requirement: str, folder: Path) -> None:
    """An environment of a torch, the wheel, and what the slice of the tests needs."""
    if not folder.exists():
        run(python.path, "-m", "venv", folder)
    index = os.environ.get("TORCH_INDEX")
    extra = ("--extra-index-url", index) if index else ()
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", *extra, requirement, f"{wheel}[hf]", *TOOLS)


def check(python: Python, wheel: Path, requirement: str) -> list[str]:
    """The cells of a row; the first that fails says why, and those behind it are empty."""
    folder = HERE / f"{python.version}-{requirement}"
    programs, row = folder / "bin", [python.version, requirement]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "IGPT_FAST_BACKEND": "cpu"}
    try:
        install(python, wheel, requirement, folder)
        row[1] = run(programs / "python", "-c", "import torch; print(torch.__version__)").strip()
        report = json.loads(run(programs / "python", "-c", check_wheel.REPORT, cwd=HERE, env=environment))
        if report["module"] is None or len(report["openmp"]) != 1:
            raise FailedError(f"module {report['module']}, OpenMP {', '.join(report['openmp'])}")
        row.append("loads")
        picture = ("--seed", "0", "--out", folder / "one.png")
        run(programs / "igpt", "sample", "-n", "1", *picture, cwd=HERE, env=environment)
        row.append("drawn")
        del environment["IGPT_FAST_BACKEND"]  # tests choose for themselves
        options = ("-p", "no:cacheprovider", "-k", "not emulated", "-m", "not clock and not mutation")
        said = run(programs / "pytest", *options, *SLICE, cwd=ROOT, env=environment)
        row.append(re.sub(r"in .*|\d+ (deselected|warnings?),? ?", "", said.splitlines()[-1]).strip("= ,"))
    except FailedError as error:
        row.append(f"**fails**: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [*row, "", "", ""][:5]


def main(given: list[str]) -> int:
    HERE.mkdir(parents=True, exist_ok=True)
    pythons, rows = interpreters(given), []
    if not pythons:
        sys.exit("check-versions: no Python from 3.11 on in PATH")
    wanted = torches()
    for python in pythons:
        try:
            wheel = build(python)
        except FailedError as error:
            rows.append([python.version, "", f"**fails**: {error}", "", ""])
            continue
        for name in wanted if python is pythons[0] else ("newest",):
            print(f"check-versions: Python {python.version}, {wanted[name]}", file=sys.stderr, flush=True)
            rows.append(check(python, wheel, wanted[name]))
    missing = [minor for minor in MINORS if minor not in {python.minor for python in pythons}]
    rows += [[f"3.{minor}", "", "not verified: there was no such interpreter", "", ""] for minor in missing]
    commit = run("git", "rev-parse", "--short", "HEAD", cwd=ROOT).strip()
    text = HEAD.format(
        date=datetime.date.today().isoformat(),
        commit=commit,
        machine=f"{platform.system()} {platform.machine()}, no GPU",
        rows="\n".join(f"| {' | '.join(row)} |" for row in rows),
    )
    TABLE.write_text(text, "utf-8")
    print(text)
    return int(any("**fails**" in cell for row in rows for cell in row))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

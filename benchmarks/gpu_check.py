"""Everything that needs a GPU, as one command: build, conformance, tests, determinism, sanitizers, benchmarks.

    python benchmarks/gpu_check.py [--commit NAME] [--out FILE] [--steps NAME ...]

Needs nvcc, a C++ compiler, torch with CUDA, pip, pytest, pybind11, scikit-build-core, cmake and ninja; no network, and
no git: a copy of the tree is enough. The module is built into ``build/gpu_check``, for this GPU alone; what each step
prints lies beside it. Every step runs, whatever became of those before it, unless it needs their result; each is put
down with its time, its outcome and the end of what it printed, after every step anew.

Exit status: 0 if every step passed (or was skipped for a reason that is written down), 1 if one failed, 3 if there is
no GPU, when nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

ROOT = common.ROOT
WORK = ROOT / "build" / "gpu_check"
SITE = WORK / "site"
REPORT = WORK / "junit.xml"
ROWS = WORK / "ops.json"
SAMPLING = WORK / "sampling.json"
OUT = common.RESULTS / "gpu_check.json"
BUDGET = 480.0  # seconds, for all steps together
TAIL = 4000  # characters of a step's output that are kept

# The tests with the marker gpu stand here; those of models need the packages that models need.
GPU_TESTS = ("tests/ops", "tests/emulator")
MODEL_TESTS = ("tests/model/test_outputs.py",)
MODELS_NEED = ("numpy", "safetensors", "huggingface_hub")
CONFORMANCE = ("tests/emulator/test_ptx.py", "tests/emulator/test_hopper.py")
DETERMINISM = "thousand"  # in the names of its tests


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
    versions["nvcc"] = _first_match("release", _ask([_nvcc() or "nvcc", "--version"]))
    driver = _ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]).strip()
    return Device(name, (major, minor), driver or "unknown", round(memory, 1), versions)


def _ask(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def _first_match(word: str, text: str) -> str:
    return next((line.strip() for line in text.splitlines() if word in line), "unknown")


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


# ---- Steps --------------------------------------------------------------------------------------------------

Look = Callable[[], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Of the step.
        command: Of the subprocess, which runs in the root of the tree.
        seconds: After these it is ended, and has failed.
        environment: Added to the process's.
        needs: Steps without whose success it cannot run.
        skip: Why it does not run here, where it does not.
        look: Called after the command: (why the step failed, though the command did not, or "", more of its result).
        before: Called first.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    skip: str = ""
    look: Look | None = None
    before: Callable[[], None] | None = None


def run_step(step: Step, seconds: float) -> dict[str, Any]:
    """Runs a step for at most ``seconds``; its result for the file."""
    result: dict[str, Any] = {"name": step.name, "status": "failed", "command": _plain(shlex.join(step.command))}
    start = time.perf_counter()
    try:
        if step.before:
            step.before()
        log = WORK / f"{step.name}.log"
        returncode, output = _run(step.command, os.environ | step.environment, seconds, log)
        result["tail"] = _plain(output)[-TAIL:]
        reason = "" if returncode == 0 else f"exit status {returncode}"
        if returncode is None:
            reason = f"ended after {seconds:.0f} s"
        if step.look:
            try:
                problem, more = step.look()
            except (OSError, ValueError, LookupError, xml.etree.ElementTree.ParseError) as error:
                problem, more = f"no result: {error}", {}
            result |= more  # of a step that failed, too: what it had when it ended
            reason = reason or problem
    except Exception as error:  # whatever it is, the other steps still run
        reason = f"{type(error).__name__}: {error}"
    result |= {"status": "failed", "reason": reason} if reason else {"status": "passed"}
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _plain(text: str) -> str:
    """Without the folders of this machine."""
    return text.replace(sys.executable, "python").replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")


def _run(command: Sequence[str], environment: dict[str, str], seconds: float, log: Path) -> tuple[int | None, str]:
    """(exit status, or None when the time was over; stdout and stderr together, which stay in ``log``)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
        try:
            returncode: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the group that start_new_session made
                process.wait()
    return returncode, log.read_text("utf-8", errors="replace")


def run_steps(steps: Sequence[Step], report: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> bool:
    """Runs the steps one after another, fills ``report["steps"]`` and saves after each; whether all is well."""
    results: list[dict[str, Any]] = report.setdefault("steps", [])
    start = time.perf_counter()
    for number, step in enumerate(steps, 1):
        left = BUDGET - (time.perf_counter() - start)
        passed = {result["name"] for result in results if result["status"] == "passed"}
        missing = [name for name in step.needs if name not in passed]
        if step.skip:
            result: dict[str, Any] = {"name": step.name, "status": "skipped", "reason": step.skip, "seconds": 0.0}
        elif missing:
            reason = f"needs {', '.join(missing)}"
            result = {"name": step.name, "status": "failed", "reason": reason, "seconds": 0.0}
        elif left < 1:
            reason = f"the {BUDGET:.0f} s for all steps are over"
            result = {"name": step.name, "status": "failed", "reason": reason, "seconds": 0.0}
        else:
            common.say(f"[{number}/{len(steps)}] {step.name} ...")
            result = run_step(step, min(step.seconds, left))
        results.append(result)
        why = f": {result['reason']}" if result.get("reason") else ""
        common.say(f"[{number}/{len(steps)}] {step.name} {result['status']} after {result['seconds']} s{why}")
        if result["status"] == "failed" and result.get("tail"):
            common.say(_indented(result["tail"][-1500:]))
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["passed"] = len(results) == len(steps) and all(r["status"] != "failed" for r in results)
        save(report)
    return bool(report["passed"])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


# ---- What the steps are -------------------------------------------------------------------------------------

# An editable installation would answer for igpt_fast before the folder that this check has built.
SITECUSTOMIZE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "igpt_fast" not in getattr(f, "known_source_files", ())]
"""
CHECK_MODULE = """
import sys
from igpt_fast import backend
reason = backend.unavailable("cuda")
if reason is None and not backend._C.__file__.startswith(sys.argv[1]):
    reason = f"the module that is found is another one: {backend._C.__file__}"
backend.show_config()
sys.exit(reason)
"""


def clean_site() -> None:
    """An empty folder for the module."""
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    (SITE / "sitecustomize.py").write_text(SITECUSTOMIZE, "utf-8")


def tests_that_ran() -> tuple[str, dict[str, Any]]:
    """Reads pytest's report: no test at all, or one skipped for want of a GPU, is a failure."""
    counts: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: dict[str, int] = {}
    for case in xml.etree.ElementTree.parse(REPORT).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif skipped is not None:
            counts["skipped"] += 1
            reason = skipped.get("message", "")
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    without = [reason for reason in reasons if reason.startswith("gpu:")]
    problem = f"tests were skipped: {without[0]}" if without else "" if counts["passed"] else "no test ran"
    return problem, {"tests": counts, "skipped_because": reasons}


def rows_that_came(path: Path) -> tuple[str, dict[str, Any]]:
    """A benchmark's rows."""
    written = json.loads(path.read_text("utf-8"))
    return "" if written["rows"] else "no row", {key: written[key] for key in written if key != "machine"}


def forget(path: Path) -> Callable[[], None]:
    """A result of an earlier run must not pass for this one's."""
    return lambda: path.unlink(missing_ok=True)


def _missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _pytest(*arguments: str) -> list[str]:
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--durations=5", f"--junitxml={REPORT}"]
    # Where pytest-xdist is installed, side by side: most of a test's time is the host's.
    options += [] if _missing("xdist") else ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def make_steps(device: Device) -> list[Step]:
    """The steps for a GPU, in their order."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(_nvcc() or "").parent), os.environ["PATH"]])
    modules = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SITE)]), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    building = {"IGPT_CUDA": "ON", "IGPT_CUDA_ARCHS": device.architecture, "IGPT_WERROR": "ON", "PATH": path}
    install = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(SITE), "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *install, "-C", f"build-dir={WORK / 'objects'}", "--upgrade"]
    without = _missing(*MODELS_NEED)
    tests = GPU_TESTS + (() if without else MODEL_TESTS)
    ignored = [f"--ignore={path}" for path in CONFORMANCE]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    # Every tensor is an allocation of its own, so that its end is a border that memcheck sees.
    watched = modules | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    needs = ("build", "module")
    look: dict[str, Any] = {"environment": modules, "needs": needs, "look": tests_that_ran, "before": forget(REPORT)}

    def sanitize(tool: str) -> Step:
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", sys.executable, "tests/ops/run_cases.py"]
        skip = "" if sanitizer else "compute-sanitizer is not installed"
        return Step(tool, command, 120, watched, needs, skip=skip)

    def bench(name: str, script: str, path: Path, seconds: float) -> Step:
        command = [sys.executable, *script.split(), "--json", str(path)]
        look = functools.partial(rows_that_came, path)
        return Step(name, command, seconds, modules, needs, look=look, before=forget(path))

    return [
        Step("build", [*pip, str(ROOT)], 240, building, before=clean_site),
        Step("module", [sys.executable, "-c", CHECK_MODULE, str(SITE)], 60, modules, ("build",)),
        Step("conformance", _pytest(*CONFORMANCE), 120, **look),
        Step("tests", _pytest("-k", f"not {DETERMINISM}", *ignored, *tests), 180, **look),
        Step("determinism", _pytest("-k", DETERMINISM, *tests), 120, **look),
        sanitize("memcheck"),
        sanitize("racecheck"),
        bench("benchmark", "benchmarks/bench_ops.py --device cuda", ROWS, 200),
        bench("sampling", "benchmarks/bench_sample_cuda.py", SAMPLING, 120),
    ]


def make_report(device: Device, commit: str) -> dict[str, Any]:
    """What the file says besides the steps."""
    without = _missing(*MODELS_NEED)
    left_out = {name: f"needs {', '.join(without)}" for name in MODEL_TESTS} if without else {}
    return {
        "commit": commit,
        "device": device.name,
        "capability": ".".join(map(str, device.capability)),
        "memory_gib": device.memory_gib,
        "driver": device.driver,
        "versions": device.versions,
        "cores": os.cpu_count(),
        "passed": False,
        "tests_left_out": left_out,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="what the file says where there is no git to ask")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write; default: %(default)s")
    parser.add_argument("--steps", nargs="+", help="only these, and what they need")
    options = parser.parse_args(arguments)
    device = find_device()
    if isinstance(device, str):
        common.say(f"gpu-check: nothing was checked: {device}")
        return 3
    steps = make_steps(device)
    if options.steps:
        if unknown := set(options.steps) - {step.name for step in steps}:
            parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in steps)}")
        wanted = set(options.steps).union(*(step.needs for step in steps if step.name in options.steps))
        steps = [step for step in steps if step.name in wanted]
    report = make_report(device, options.commit or common.commit())
    common.say(f"gpu-check: {report['device']}, driver {report['driver']}, commit {report['commit']}")

    def save(report: dict[str, Any]) -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")

    passed = run_steps(steps, report, save)
    common.say(f"gpu-check {'passed' if passed else 'failed'} after {report['seconds']} s; wrote {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

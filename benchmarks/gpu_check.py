"""Everything that needs a GPU, as one command: build, figures, tests, sanitizers.

    python benchmarks/gpu_check.py [--only PART,...] [--all] [--commit NAME] [--out FILE]

Needs nvcc, a C++ compiler, torch with CUDA, pip, pytest, pybind11, scikit-build-core, cmake and ninja; no network, and
no git: a copy of the tree is enough. The module is built into ``build/gpu_check``, for this GPU alone; what each part
prints lies beside it. Every part runs, whatever became of those before it, unless it needs their result; each is put
down with its time, its outcome and the end of what it printed, after every part anew, and what an earlier run on the
same GPU put down of the others stays, each with its commit. What is measured comes first; what rarely changes comes
last, and is left as it is where its sources are those of the run that it passed in (``SOURCES``). The whole takes
``BUDGET`` seconds at most, each part those of ``SECONDS`` and the tables behind it.

Exit status: 0 if every part passed (or was skipped for a reason that is written down), 1 if one failed, 2 for wrong
usage, 3 if there is no GPU, when nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
from gpu_device import Device, find_device, nvcc

ROOT = common.ROOT
WORK = ROOT / "build" / "gpu_check"
SITE = WORK / "site"
REPORT = WORK / "junit.xml"
OUT = common.RESULTS / "gpu_check.json"
BUDGET = 480.0  # seconds, for all parts together
TAIL = 4000  # characters of a part's output that are kept

# Part -> the seconds after which it is ended. Those that every run has are the budget together; those that run where
# their sources have changed have what the first leave of it; the last run where they are named. Of a run that names its
# parts these share the budget, in the same proportions.
SECONDS = {
    "build": 50,
    "module": 10,
    "sampling": 60,
    "steps": 70,
    "profile": 15,
    "gpt-fast": 75,
    "forward": 20,
    "attention-tests": 20,
    "training": 50,
    "decoder-tests": 40,
    "decoder-memcheck": 20,
    "decoder-racecheck": 20,
    "commands": 30,
}
SECONDS_IF_CHANGED = {
    "conformance": 60,
    "tests": 120,
    "determinism": 80,
    "memcheck": 30,
    "racecheck": 40,
    "benchmark": 150,
}
SECONDS_IF_NAMED = {"ab": 130, "likelihoods": 45, "compiled": 120, "training-compiled": 130, "training-graphs": 100}
PARTS = SECONDS | SECONDS_IF_CHANGED | SECONDS_IF_NAMED
# What the result of a part depends on, besides the GPU and the versions of torch and nvcc.
KERNELS = ("csrc/cuda/**/*", "csrc/bind/*", "CMakeLists.txt", "igpt_fast/ops/*.py", "igpt_fast/backend.py")
KERNELS += ("igpt_fast/reference.py", "tests/ops/*.py")
MEASURING = ("bench_ops", "cuda_ops", "cuda_timing", "workloads", "peers")  # single ops
SOURCES = {
    "conformance": ("csrc/cuda/*.cuh", "csrc/emulator/**/*", "tests/emulator/*"),
    # The latter of the engines as well: it alone replays their graphs a thousand times.
    **dict.fromkeys(("tests", "determinism"), ("csrc/**/*", "CMakeLists.txt", "igpt_fast/**/*.py", "tests/**/*.py")),
    "memcheck": KERNELS,
    "racecheck": KERNELS,
    "benchmark": (*KERNELS[:-1], *(f"benchmarks/{name}.py" for name in MEASURING)),
}

# The tests with the marker gpu stand here; those of models, and of transformers' tools, need packages of their own.
GPU_TESTS = ("tests/ops", "tests/emulator")
MODEL_TESTS, LEARNING_TESTS = ("tests/model/test_outputs.py",), ("tests/learning/test_training_step.py",)
TOOL_TESTS = ("tests/hf/test_accelerate.py",)
MODELS_NEED = ("numpy", "safetensors", "huggingface_hub")
LEARNING_NEEDS = (*MODELS_NEED, "PIL")
TOOLS_NEED = (*MODELS_NEED, "transformers", "accelerate", "peft")
COMMANDS_NEED = (*LEARNING_NEEDS, "tyro", "tqdm")
CONFORMANCE = ("tests/emulator/test_ptx.py", "tests/emulator/test_hopper.py")
# Of the engine that draws and its kernels: few seconds, and most of what goes wrong.
DECODER_TESTS = (
    "tests/emulator/test_decoder.py",
    "tests/emulator/test_cuda_graphs.py",
    "tests/emulator/test_fp8_values.py",
    "tests/ops/test_attention_decode.py",
    "tests/ops/test_gemv.py",
    "tests/ops/test_sample.py",
)
# The kernels that training stands on most, before its figures.
ATTENTION_TESTS = ("-k", "hopper or only_hidden or poison", "tests/emulator/test_attention.py")
DETERMINISM = "thousand"  # in the names of its tests


# ---- Steps --------------------------------------------------------------------------------------------------

Look = Callable[[], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Step:
    """One part: a command.

    Attributes:
        name: Of the part.
        command: Of the subprocess, which runs in the root of the tree.
        seconds: After these it is ended, and has failed.
        environment: Added to the process's.
        needs: Parts without whose success it cannot run.
        skip: Why it does not run here, where it does not.
        look: Called after the command: (why the part failed, though the command did not, or "", more of its result).
        before: Called first.
        sources: A digest of all that its result depends on; "": it runs every time.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    skip: str = ""
    look: Look | None = None
    before: Callable[[], None] | None = None
    sources: str = ""


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


def run_steps(
    steps: Sequence[Step],
    report: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    earlier: Sequence[dict[str, Any]] = (),
    again: bool = True,
) -> bool:
    """Runs the parts one after another and saves after each; whether all is well.

    Args:
        steps: The parts.
        report: Its "steps" are filled, in the order of ``steps`` before those of other runs.
        save: Called with the report.
        earlier: Results of an earlier run, which stay until there are new ones.
        again: Whether a part runs whose sources are those that it passed with.
    """
    results: list[dict[str, Any]] = []
    before = {result["name"]: result for result in earlier}
    start = time.perf_counter()
    for number, step in enumerate(steps, 1):
        left = BUDGET - (time.perf_counter() - start)
        was = before.get(step.name, {})
        if not again and step.sources and was.get("status") == "passed" and was.get("sources") == step.sources:
            result = was
            common.say(f"[{number}/{len(steps)}] {step.name} is unchanged since it passed, at {was.get('commit')}")
        else:
            result = _result(step, left, {r["name"] for r in results if r["status"] == "passed"})
            result |= {"commit": report.get("commit"), **({"sources": step.sources} if step.sources else {})}
            why = f": {result['reason']}" if result.get("reason") else ""
            common.say(f"[{number}/{len(steps)}] {step.name} {result['status']} after {result['seconds']} s{why}")
            if result["status"] == "failed" and result.get("tail"):
                common.say(_indented(result["tail"][-1500:]))
        results.append(result)
        named = {result["name"] for result in results}
        report["steps"] = results + [result for result in earlier if result["name"] not in named]
        report["seconds"] = round(time.perf_counter() - start, 1)
        report["passed"] = len(results) == len(steps) and all(r["status"] != "failed" for r in results)
        save(report)
    return bool(report["passed"])


def _result(step: Step, left: float, passed: set[str]) -> dict[str, Any]:
    """Of a part that has at most the seconds that are left, after others passed."""
    if step.skip:
        return {"name": step.name, "status": "skipped", "reason": step.skip, "seconds": 0.0}
    if missing := [name for name in step.needs if name not in passed]:
        return {"name": step.name, "status": "failed", "reason": f"needs {', '.join(missing)}", "seconds": 0.0}
    if left < 1:
        reason = f"the {BUDGET:.0f} s for all parts are over; make gpu-check ONLY={step.name} runs it"
        return {"name": step.name, "status": "failed", "reason": reason, "seconds": 0.0}
    common.say(f"{step.name} ...")
    return run_step(step, min(step.seconds, left))


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


def digest(patterns: Sequence[str], device: Device) -> str:
    """Of the files under the root that the patterns name, of their names, and of what they run on."""
    found = hashlib.sha256(repr((device.name, device.capability, sorted(device.versions.items()))).encode())
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            found.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()


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


def tests_left_out() -> dict[str, str]:
    """Tests whose packages are not here, and what they need."""
    needs = {MODEL_TESTS: MODELS_NEED, LEARNING_TESTS: LEARNING_NEEDS, TOOL_TESTS: TOOLS_NEED}
    missing = {names: _missing(*packages) for names, packages in needs.items()}
    return {name: f"needs {', '.join(lacks)}" for names, lacks in missing.items() if lacks for name in names}


def make_steps(device: Device) -> list[Step]:
    """The steps for a GPU, in their order."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(nvcc() or "").parent), os.environ["PATH"]])
    modules = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(SITE)]), "PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    strict = modules | {"IGPT_FAST_BACKEND": "cuda"}  # no op of ours falls back where figures are made
    building = {"IGPT_CUDA": "ON", "IGPT_CUDA_ARCHS": device.architecture, "IGPT_WERROR": "ON", "PATH": path}
    install = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(SITE), "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *install, "-C", f"build-dir={WORK / 'objects'}", "--upgrade"]
    without, left_out = _missing(*MODELS_NEED), tests_left_out()
    tests = [*GPU_TESTS, *(name for name in MODEL_TESTS + LEARNING_TESTS + TOOL_TESTS if name not in left_out)]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    # Every tensor is an allocation of its own, so that its end is a border that memcheck sees.
    watched = modules | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    look: dict[str, Any] = {"look": tests_that_ran, "before": forget(REPORT)}
    no_models = f"needs {', '.join(without)}" if without else ""
    no_commands = f"needs {', '.join(missing)}" if (missing := _missing(*COMMANDS_NEED)) else ""

    def step(name: str, command: Sequence[str], environment: dict[str, str] = modules, **more: Any) -> Step:
        sources = digest(SOURCES[name], device) if name in SOURCES else ""
        needs = more.pop("needs", ("build", "module"))
        return Step(name, command, PARTS[name], environment, needs, sources=sources, **more)

    def sanitize(name: str, script: str, skip: str = "") -> Step:
        # Our kernels alone, by their namespace: cuBLAS's, which the decoder calls as well, are others' business.
        watch = ["--tool", name.rpartition("-")[2], "--kernel-name", "kns=igpt", "--error-exitcode", "9"]
        command = [sanitizer or "", *watch, sys.executable, script]
        return step(name, command, watched, skip=skip or ("" if sanitizer else "compute-sanitizer is not installed"))

    def bench(name: str, script: str, skip: str = "", environment: dict[str, str] = modules) -> Step:
        path, look = WORK / f"{name}.json", functools.partial(rows_that_came, WORK / f"{name}.json")
        command = [sys.executable, *script.split(), "--json", str(path)]
        return step(name, command, environment, look=look, before=forget(path), skip=skip)

    apart = [f"--ignore={path}" for path in (*CONFORMANCE, *DECODER_TESTS)]
    return [
        step("build", [*pip, str(ROOT)], building, needs=(), before=clean_site),
        step("module", [sys.executable, "-c", CHECK_MODULE, str(SITE)], needs=("build",)),
        bench("sampling", "benchmarks/bench_sample_cuda.py --only sampling", no_models),
        bench("steps", "benchmarks/bench_sample_cuda.py --only steps", no_models),
        bench("profile", "benchmarks/bench_sample_cuda.py --only profile", no_models),
        bench("gpt-fast", "benchmarks/bench_sample_cuda.py --only gpt-fast", no_models),
        bench("forward", "benchmarks/bench_model_cuda.py --only forward", no_models, strict),
        step("attention-tests", _pytest(*ATTENTION_TESTS), **look),
        bench("training", "benchmarks/bench_train_cuda.py --only eager", no_models, strict),
        step("decoder-tests", _pytest("-k", f"not {DETERMINISM}", *DECODER_TESTS), **look),
        sanitize("decoder-memcheck", "tests/emulator/run_decoder.py", no_models),
        sanitize("decoder-racecheck", "tests/emulator/run_decoder.py", no_models),
        bench("commands", "benchmarks/bench_commands.py", no_commands, strict),
        step("conformance", _pytest(*CONFORMANCE), **look),
        step("tests", _pytest("-k", f"not {DETERMINISM}", *apart, *tests), **look),
        step("determinism", _pytest("-k", DETERMINISM, *tests), **look),
        sanitize("memcheck", "tests/ops/run_cases.py"),
        sanitize("racecheck", "tests/ops/run_cases.py"),
        bench("benchmark", "benchmarks/bench_ops.py --device cuda"),
        bench("ab", "benchmarks/bench_sample_cuda.py --ab", no_models),
        bench("likelihoods", "benchmarks/bench_model_cuda.py --only score,features", no_models, strict),
        bench("compiled", "benchmarks/bench_model_cuda.py --only compiled", no_models, strict),
        bench("training-compiled", "benchmarks/bench_train_cuda.py --only compiled,opaque", no_models, strict),
        bench("training-graphs", "benchmarks/bench_train_cuda.py --only graphs,loop", no_models, strict),
    ]


def make_report(device: Device, commit: str) -> dict[str, Any]:
    """What the file says besides the steps."""
    left_out = tests_left_out()
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


def earlier_results(path: Path, device: Device) -> list[dict[str, Any]]:
    """What the file has of this GPU, each part with its commit; nothing where there is none, or another GPU's."""
    try:
        report = json.loads(path.read_text("utf-8"))
        results = [{"commit": report["commit"], **step} for step in report["steps"] if step["name"] in PARTS]
        return results if report["device"] == device.name else []
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError) as error:
        common.say(f"{path} is no report of this check, and is written anew: {type(error).__name__}: {error}")
        return []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="what the file says where there is no git to ask")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write; default: %(default)s")
    parser.add_argument(
        "--only",
        type=common.chosen(tuple(PARTS)),
        metavar="PART,...",
        help=f"these, and what they need: {', '.join(PARTS)}",
    )
    parser.add_argument("--all", action="store_true", help="also what is unchanged since it passed")
    options = parser.parse_args(arguments)
    device = find_device()
    if isinstance(device, str):
        common.say(f"gpu-check: nothing was checked: {device}")
        return 3
    steps = make_steps(device)
    if options.only:
        wanted = set(options.only).union(*(step.needs for step in steps if step.name in options.only))
        share = BUDGET / sum(step.seconds for step in steps if step.name in wanted)
        steps = [replace(step, seconds=max(1, share) * step.seconds) for step in steps if step.name in wanted]
    else:
        steps = [step for step in steps if step.name not in SECONDS_IF_NAMED]
    report = make_report(device, options.commit or common.commit())
    common.say(f"gpu-check: {report['device']}, driver {report['driver']}, commit {report['commit']}")
    earlier = earlier_results(options.out, device)
    save = functools.partial(common.replace, options.out)
    passed = run_steps(steps, report, save, earlier, again=options.all or bool(options.only))
    common.say(f"gpu-check {'passed' if passed else 'failed'} after {report['seconds']} s; wrote {options.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

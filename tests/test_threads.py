"""Threads of the CPU engines: the barrier, the processors that they may use, the bits for any number of them."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling_cpu
import contention
import pytest
import torch
from small_models import small

from igpt_fast import backend, ops
from igpt_fast.__main__ import sleep_soon
from igpt_fast.engines.cpu import forward as forwards
from igpt_fast.engines.cpu import weights
from igpt_fast.engines.cpu.decoder import CpuDecoder

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
needs_cpu = pytest.mark.skipif(weights.no_native_decoder() is not None, reason="the compiled module is not there")


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the tests run outside the repository")
def test_the_barrier_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """More threads than processors, some of which come late, so that the others sleep."""
    program = tmp_path / "barrier"
    flags = ["-std=c++17", "-O1", "-pthread", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "tests/native/barrier.cpp")
    subprocess.run([str(COMPILER), *flags, source, "-o", str(program)], check=True, timeout=120)
    for threads, rounds in ((1, 10), (2, 1000), (3, 300), (16, 30)):
        done = subprocess.run([str(program), str(threads), str(rounds)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stderr


GROUPS = {
    "no file": ({}, 0.0),
    "v2": ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
    "v2, that of the parent is less": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "v2, a container's root": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
    "v1": (
        {
            "proc/self/cgroup": "3:cpuset:/\n4:cpu,cpuacct:/docker/x\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "v1, none": (
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        0.0,
    ),
    "nonsense": ({"proc/self/cgroup": "0::a\n:::\n\n", "sys/fs/cgroup/cpu.max": "x y\n"}, 0.0),
}


@needs_cpu
@pytest.mark.parametrize("name", GROUPS)
def test_the_quota_of_control_groups(name: str, tmp_path: Path) -> None:
    files, want = GROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert backend._C.cpu_limits(str(tmp_path))[1] == want  # type: ignore[union-attr]


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_the_affinity_mask() -> None:
    code = (
        "import os, torch; from igpt_fast import backend\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(backend._C.cpu_limits()[0])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@needs_cpu
def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Here no more than there are processors; see the next test."""
    model = small()
    half = small(torch.bfloat16)
    tokens = torch.randint(model.config.vocab_size - 1, (2, 12), generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(9000, 3) * 2 - 1
    found: list[list[torch.Tensor]] = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        decoder = CpuDecoder(model, 2, 12)
        numbers = [decoder.step(column) for column in tokens.unbind(1)]
        if forwards.why_not(half.transformer, tokens) is None:
            numbers.append(half.transformer(tokens).last_hidden_state)
        numbers.append(ops.quantize(pixels, pixels[:300]))
        x = pixels.T.contiguous().requires_grad_()
        numbers += torch.autograd.grad(ops.rms_norm(x, torch.ones(9000)).sum(), x)
        found.append(numbers)
    assert all(all(map(torch.equal, each, found[0])) for each in found)


@needs_cpu
@pytest.mark.skipif(bool(compiling_cpu.software_tiles_unavailable()), reason=compiling_cpu.software_tiles_unavailable())
def test_more_threads_than_processors() -> None:
    """Modules that are built for tests have as many as are asked for: this file's test, and those of the engines."""
    folder = ROOT / "tests"
    named = [f"{__file__}::test_any_number_of_threads_gives_the_same_bits"]
    named.append(f"{folder / 'engines/cpu/test_decoder.py'}::test_more_threads_than_cores")
    command = [sys.executable, str(folder / "run_software_tiles.py"), *named]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "2 passed" in done.stdout


@needs_cpu
@pytest.mark.parametrize("name", ["OMP_THREAD_LIMIT", "OMP_DYNAMIC"])
def test_a_region_with_fewer_threads_than_asked(name: str) -> None:
    value = "1" if name == "OMP_THREAD_LIMIT" else "true"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "any_number"]
    environment = {**os.environ, name: value}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout


@needs_cpu
@pytest.mark.parametrize("name", contention.CASES)
def test_when_regions_give_way(name: str) -> None:
    busy, threads, region, want = contention.CASES[name]
    assert contention.changes(backend._C.GivingWay(), busy, threads, region) == want  # type: ignore[union-attr]


@needs_cpu
def test_what_was_before_all_threads_run_again_does_not_count() -> None:
    """Its first look in a probe is of the rest and before: the next one decides."""
    policy = backend._C.GivingWay()  # type: ignore[union-attr]
    for ms in (20, 40, 60):
        policy.look(ms * 1_000_000, True)
    policy.begin(260_000_000)
    policy.look(260_000_000, True)
    assert (policy.halvings, policy.next) == (0, 280_000_000)
    policy.look(280_000_000, False)
    for ms in (300, 320):
        policy.look(ms * 1_000_000, True)
    assert policy.halvings == 0


@needs_cpu
@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system does not say who waits")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor has one thread")
def test_regions_give_way_to_other_processes_and_bits_stay() -> None:
    processors = len(os.sched_getaffinity(0))
    if backend._C.cpu_limits()[1]:  # type: ignore[union-attr]
        pytest.skip("a quota holds the others back as well")
    code = (
        "import time, torch; from igpt_fast import backend; from small_models import small\n"
        "from igpt_fast.engines.cpu.decoder import CpuDecoder\n"
        "model = small(); token = torch.tensor([3])\n"
        "def numbers():\n"
        "    decoder = CpuDecoder(model, 1, 64)\n"
        "    return torch.cat([decoder.step(token) for _ in range(64)])\n"
        f"torch.set_num_threads(1); want = numbers(); torch.set_num_threads({processors})\n"
        "print('ready', flush=True); input(); end = time.monotonic() + 60\n"
        "while backend._C.cpu_given_way() == 0 and time.monotonic() < end:\n"
        "    assert torch.equal(numbers(), want)\n"
        "print(backend._C.cpu_given_way() > 0, torch.equal(numbers(), want))"
    )
    with contextlib.ExitStack() as stack:

        def start(text: str, **options: Any) -> subprocess.Popen[str]:
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", text], text=True, **options))
            stack.callback(process.kill)
            return process

        engine = start(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT / "tests")
        assert engine.stdout is not None
        assert engine.stdout.readline() == "ready\n"
        for _ in range(2 * processors):
            start("while True: pass")
        assert engine.communicate("\n", timeout=100)[0] == "True True\n"


@pytest.mark.parametrize("name", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_about_waiting_stays(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {} if name is None else {name: "x"}
    monkeypatch.setattr(os, "environ", environment)
    sleep_soon()
    assert environment == ({"GOMP_SPINCOUNT": "2000"} if name is None else {name: "x"})

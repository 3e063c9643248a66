"""Threads of the CPU engines: the barrier, the processors that they may use, the bits for any number of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import small

from igpt_fast import backend
from igpt_fast.__main__ import sleep_soon
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
    model = small()
    tokens = torch.randint(model.config.vocab_size - 1, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        decoder = CpuDecoder(model, 2, 12)
        found.append(torch.stack([decoder.step(column) for column in tokens.unbind(1)]))
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("name", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_about_waiting_stays(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {} if name is None else {name: "x"}
    monkeypatch.setattr(os, "environ", environment)
    sleep_soon()
    assert environment == ({"GOMP_SPINCOUNT": "2000"} if name is None else {name: "x"})

"""Registered ops refuse what would have their kernels read or write where they may not: see run_fuzz.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import compiling
import pytest
import run_fuzz

from igpt_fast import backend

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guards are Linux's mprotect")
REGISTERED = {  # of each, what is registered under its name
    "cpu": "quantize dequantize cross_entropy cross_entropy_bwd rms_norm add_rms_norm rms_norm_bwd layer_norm"
    " add_layer_norm layer_norm_bwd quick_gelu quick_gelu_bwd gelu_tanh gelu_tanh_bwd gelu_erf gelu_erf_bwd",
}
REGISTERED["emulated"] = (
    REGISTERED["cpu"] + " sample sample_next sample_step gemv attention_decode causal_attention causal_attention_bwd"
    " causal_attention_packed causal_attention_packed_bwd"
)


@pytest.mark.parametrize("kind", REGISTERED)
def test_no_call_ends_the_process(kind: str, request: pytest.FixtureRequest) -> None:
    reason = compiling.unavailable() if kind == "emulated" else backend.native_reason
    if reason:
        pytest.skip(reason)
    calls = 1000 if request.config.getoption("--soak") else 60
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", run_fuzz.__file__, kind, "0", str(calls)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = json.loads(done.stdout)
    assert set(refused) >= set(REGISTERED[kind].split())
    assert min(refused.values()) > calls // 10

"""All kernels under the address, undefined-behaviour and thread sanitizers, as a program of their own."""

import re

import compiling
import pytest

OPS = sorted(
    name
    for path in compiling.HERE.glob("driver_*.cpp")
    for cases in re.findall(r"^const driver::Case .*", path.read_text("utf-8"), re.MULTILINE)
    for name in re.findall(r'\w+\("(\w+)"', cases)
)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_clean(sanitizer: str, op: str) -> None:
    reason = compiling.unavailable() or compiling.sanitizer_unavailable(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    done = compiling.run_driver(sanitizer, op)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]

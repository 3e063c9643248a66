"""All kernels under the address, undefined-behaviour and thread sanitizers, as a program of their own."""

import compiling
import pytest

OPS = sorted(path.stem.removeprefix("driver_") for path in compiling.HERE.glob("driver_*.cpp"))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("op", OPS)
def test_clean(sanitizer: str, op: str) -> None:
    reason = compiling.unavailable() or compiling.sanitizer_unavailable(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    done = compiling.run_driver(sanitizer, op)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]

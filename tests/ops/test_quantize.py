"""quantize: the C++ twin against the definition in float64, its registration with torch, its errors."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from igpt_fast import backend, ops, reference

needs_cpu = pytest.mark.skipif(bool(backend.unavailable("cpu")), reason=f"no native CPU: {backend.unavailable('cpu')}")


def palette(k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(k, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def all_colours() -> torch.Tensor:
    """(2**24, 3) uint8."""
    code = torch.arange(1 << 24)
    return torch.stack([code >> 16, (code >> 8) & 255, code & 255], dim=1).to(torch.uint8)


def distances(x: torch.Tensor, clusters: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Squared float64 distance of each colour to the cluster of its token, channel by channel as defined."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    chosen = clusters.double()[tokens]
    return sum((levels[x[:, c].long()] - chosen[:, c]).square() for c in range(3))


@needs_cpu
@pytest.mark.parametrize("k", [128, 512])
def test_every_colour_gets_a_nearest_cluster(k: int) -> None:
    """All 16.7 M colours, by distance: only true ties may differ from the definition's argmin."""
    x, clusters = all_colours(), palette(k)
    with backend.use_backend("cpu"):
        tokens = ops.quantize(x, clusters)
    mine = distances(x, clusters, tokens)
    best = torch.full_like(mine, float("inf"))
    for row in range(k):  # a loop over clusters: no N x K temporary here either
        best = torch.minimum(best, distances(x, clusters, torch.full((1,), row).expand(len(x))))
    assert torch.equal(mine, best)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 15, 16, 17, 127, 513, 3000])
@pytest.mark.parametrize("n", [0, 1, 5, 16, 1023, 40_000])
def test_native_equals_the_reference(dtype: torch.dtype, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n * 7919 + k)
    x = torch.randint(0, 256, (n, 3), generator=generator, dtype=torch.uint8)
    if dtype == torch.float32:
        x = torch.rand(n, 3, generator=generator) * 2 - 1
    clusters = palette(k, seed=k)
    with backend.use_backend("cpu"):
        tokens = ops.quantize(x, clusters)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (n,)
    expected = reference.quantize(x, clusters)
    if dtype == torch.uint8:
        assert torch.equal(tokens, expected)
        return
    # fp32: by distance, within the rounding of the squared distance itself.
    gap = (x.double() - clusters.double()[tokens]).square().sum(-1) - (
        x.double() - clusters.double()[expected]
    ).square().sum(-1)
    assert float(gap.abs().max(dim=0).values if n else 0.0) <= 12 * 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_ties_go_to_the_lowest_index(name: str) -> None:
    grey = torch.tensor([[1.0] * 3, [-1.0] * 3, [-1.0] * 3, [1.0] * 3])
    with backend.use_backend(name):
        assert ops.quantize(torch.tensor([[0, 0, 0], [255, 255, 255]], dtype=torch.uint8), grey).tolist() == [1, 0]
        # 0.0 lies exactly between the two colours.
        assert ops.quantize(torch.zeros(20, 3), grey).tolist() == [0] * 20


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_shapes_and_strides(name: str) -> None:
    x = torch.randint(0, 256, (3, 5, 8, 3), dtype=torch.uint8)
    clusters = palette(40)
    expected = reference.quantize(x, clusters)
    with backend.use_backend(name):
        assert torch.equal(ops.quantize(x, clusters), expected)
        assert torch.equal(ops.quantize(x.permute(2, 0, 1, 3), clusters), expected.permute(2, 0, 1))
        assert torch.equal(ops.quantize(x.flip(1), clusters), expected.flip(1))
        wide = torch.zeros(40, 6)
        wide[:, ::2] = clusters
        assert torch.equal(ops.quantize(x, wide[:, ::2]), expected)
        assert ops.quantize(x[0, 0, 0], clusters).shape == ()


@needs_cpu
@pytest.mark.parametrize("isa", [name for name, has in (backend._C.cpu_isas() if backend._C else []) if has])
def test_every_instruction_set_agrees(isa: str) -> None:
    """In a process of its own: the instruction set is chosen once, when the package starts."""
    code = """
import torch
from igpt_fast import backend, ops, reference
torch.manual_seed(0)
assert backend.config()["isa"]["live"] == "%s"
for k in (1, 9, 512):
    clusters = torch.rand(k, 3) * 2 - 1
    u8 = torch.randint(0, 256, (30_001, 3), dtype=torch.uint8)
    assert torch.equal(ops.quantize(u8, clusters), reference.quantize(u8, clusters))
    f32 = torch.rand(30_001, 3) * 2 - 1
    agree = (ops.quantize(f32, clusters) == reference.quantize(f32, clusters)).float().mean()
    assert agree > 0.9999, agree
""" % isa
    environment = {**os.environ, "IGPT_FAST_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_cpu
def test_not_a_number_still_gives_a_token() -> None:
    x = torch.full((33, 3), float("nan"))
    with backend.use_backend("cpu"):
        tokens = ops.quantize(x, palette(20))
    assert ((tokens >= 0) & (tokens < 20)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_opcheck(dtype: torch.dtype) -> None:
    x = (torch.rand(4, 6, 3) * 255).to(dtype)
    torch.library.opcheck(torch.ops.igpt_fast.quantize.default, (x / 255 if dtype.is_floating_point else x, palette(9)))


def test_compiles_without_a_graph_break() -> None:
    x, clusters = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8), palette(16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: ops.quantize(a, b) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, clusters), ops.quantize(x, clusters) + 1)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, None)])
def test_vmap(in_dims: tuple[int | None, int | None]) -> None:
    x = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8)
    clusters = torch.stack([palette(11, seed) for seed in range(4)]) if in_dims[1] == 0 else palette(11)
    rows = []
    for i in range(4):
        part = x if in_dims[0] is None else x.select(in_dims[0], i)
        rows.append(ops.quantize(part, clusters if in_dims[1] is None else clusters[i]))
    assert torch.equal(torch.vmap(ops.quantize, in_dims)(x, clusters), torch.stack(rows))


def test_grad_stops_here() -> None:
    x = torch.zeros(4, 3, requires_grad=True)
    assert not ops.quantize(x, palette(5)).requires_grad


def test_meta_tensors_give_a_shape() -> None:
    out = ops.quantize(torch.empty(2, 3, 3, device="meta"), torch.empty(5, 3, device="meta"))
    assert out.device.type == "meta"
    assert out.shape == (2, 3)


@pytest.mark.parametrize(
    ("x", "clusters", "error", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(5, 3), TypeError, "int32"),
        (torch.zeros(4, 3), torch.zeros(5, 3, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(4, 4), torch.zeros(5, 3), ValueError, r"\(4, 4\)"),
        (torch.zeros(()), torch.zeros(5, 3), ValueError, r"\(\)"),
        (torch.zeros(4, 3), torch.zeros(0, 3), ValueError, r"\(0, 3\)"),
        (torch.zeros(4, 3), torch.zeros(5, 3, device="meta"), ValueError, "one device"),
    ],
)
def test_wrong_arguments(x: torch.Tensor, clusters: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.quantize(x, clusters)


def test_a_backend_that_does_not_serve_the_device_raises() -> None:
    if backend.unavailable("cuda") is None:
        with backend.use_backend("cuda"), pytest.raises(backend.BackendUnavailableError, match="on cpu"):
            ops.quantize(torch.zeros(4, 3), palette(5))
    else:
        with pytest.raises(backend.BackendUnavailableError, match="not available"):
            backend.set_backend("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("k", [1, 17, 512, 5000])
def test_cuda_equals_the_reference(dtype: torch.dtype, k: int) -> None:
    x = torch.randint(0, 256, (50_001, 3), dtype=torch.uint8)
    if dtype == torch.float32:
        x = torch.rand(50_001, 3) * 2 - 1
    clusters = palette(k)
    with backend.use_backend("cuda"):
        tokens = ops.quantize(x.cuda(), clusters.cuda()).cpu()
    if dtype == torch.uint8:
        assert torch.equal(tokens, reference.quantize(x, clusters))
    else:
        mine = (x.double() - clusters.double()[tokens]).square().sum(-1)
        best = (x.double() - clusters.double()[reference.quantize(x, clusters)]).square().sum(-1)
        np.testing.assert_allclose(mine.numpy(), best.numpy(), rtol=0, atol=1e-5)

"""quantize: the C++ twin against the definition in float64, its registration with torch, its errors."""

import functools
import importlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from implementations import ISAS

from igpt_fast import backend, ops, reference

needs_cpu = pytest.mark.skipif(bool(backend.unavailable("cpu")), reason=f"no native CPU: {backend.unavailable('cpu')}")


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@functools.cache
def crowds() -> dict[str, torch.Tensor]:
    """The palettes of the benchmark, none when the tests run outside the repository."""
    if not BENCHMARKS.is_dir():
        return {}
    sys.path.insert(0, str(BENCHMARKS))
    palettes = importlib.import_module("palettes")
    sys.path.remove(str(BENCHMARKS))
    return {kind: palettes.palette(kind) for kind in palettes.KINDS}


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
@pytest.mark.parametrize("kind", ["random", "on the uint8 grid"])
def test_every_colour_gets_a_nearest_cluster(kind: str) -> None:
    """All 16.7 M colours, by float64 distance to what a k-d tree finds. The grid makes for true ties."""
    from scipy import spatial

    x, clusters = all_colours(), palette(512)
    if kind != "random":
        x, clusters = x[::9], torch.round((clusters + 1.0) * 127.5) / 127.5 - 1.0
    with backend.use_backend("cpu"):
        tokens = ops.quantize(x, clusters)
    tree = spatial.cKDTree(clusters.double().numpy())
    for part, found in zip(x.split(1 << 20), tokens.split(1 << 20), strict=True):
        colours = part.double() / 127.5 - 1.0
        nearest = torch.from_numpy(tree.query(colours.numpy(), workers=2)[1])
        mine, best = distances(part, clusters, found), distances(part, clusters, nearest)
        assert (mine <= best).all()
        if kind == "random":
            assert torch.equal(found[mine == best], nearest[mine == best])


@needs_cpu
@pytest.mark.parametrize("seed", range(3))
def test_ties_on_the_uint8_grid(seed: int) -> None:
    """Palettes with doubles on a coarse grid: the index, not only the distance, is the definition's."""
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randint(0, 9, (300, 3), generator=generator) / 4.0 - 1.0
    x = torch.randint(0, 256, (50_000, 3), generator=generator, dtype=torch.uint8)
    x[:25_000] = x[:25_000] // 17 * 17
    with backend.use_backend("cpu"):
        assert torch.equal(ops.quantize(x, clusters), reference.quantize(x, clusters))
        f32 = torch.randint(0, 17, (50_000, 3), generator=generator) / 8.0 - 1.0
        assert torch.equal(ops.quantize(f32, clusters), reference.quantize(f32, clusters))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("scale", [3.0, 1e3, 1e9, 1e18, 3e38])
def test_clusters_and_colours_far_outside(dtype: torch.dtype, scale: float) -> None:
    """Neither the bounds of the cells nor their overflow may lose the nearest cluster."""
    clusters = palette(97) * scale
    x = torch.randint(0, 256, (9_000, 3), dtype=torch.uint8)
    if dtype == torch.float32:
        x = x / 127.5 - 1.0
        x[4_000:] *= scale
        x[8_000:8_100] = float("inf")
        x[8_200:8_300, 1] = float("nan")
    for palettes in (clusters, torch.cat([clusters, palette(60, seed=1)]), clusters + scale / 2):
        with backend.use_backend("cpu"):
            assert torch.equal(ops.quantize(x, palettes), reference.quantize(x, palettes))


@needs_cpu
def test_clusters_that_are_all_the_same() -> None:
    """But for one: the others count once."""
    clusters = torch.zeros(20_000, 3)
    clusters[-1] = 0.5
    x = torch.randint(0, 256, (9_000, 3), dtype=torch.uint8)
    levels = x.double() / 127.5 - 1.0
    expected = (levels - 0.5).square().sum(-1) < levels.square().sum(-1)
    with backend.use_backend("cpu"):
        assert torch.equal(ops.quantize(x, clusters), expected * 19_999)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("n", "k"),
    [(0, 5), (1, 1), (5, 3000), (64, 24), (65, 25), (1023, 513), (2048, 17), (8191, 128), (40_000, 2), (40_000, 513)],
)
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
    assert torch.equal(tokens, expected)


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


def native(x: torch.Tensor, clusters: torch.Tensor, threads: int = 1, work: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((len(x),), -1)
    addresses = {"x": x.data_ptr(), "clusters": clusters.data_ptr(), "out": out.data_ptr()}
    sizes = {"n": len(x), "k": len(clusters), "place": threads, "work": 0 if work is None else work.data_ptr()}
    backend._C.quantize_cpu(is_u8=x.dtype == torch.uint8, **addresses, **sizes)
    return out


@functools.cache
def adversaries() -> dict[str, torch.Tensor]:
    """Palettes by what they are hard for."""
    generator = torch.Generator().manual_seed(0)
    broken = palette(120, seed=2)
    broken[::7, 1] = float("nan")
    broken[::11, 2] = float("inf")
    broken[0] = -float("inf")
    close = palette(24, seed=3)
    angle = torch.linspace(0, 6.2, 300)[:, None]
    across, along = torch.tensor([[0.5, -0.5, 0.0]]), torch.tensor([[0.25, 0.25, -0.5]])
    return {
        **crowds(),
        # All are equally near to a grey, and float64's rounding decides.
        "a ring about the greys": angle.cos() * across + angle.sin() * along * (4 / 3) ** 0.5,
        "tiny": palette(200) * 1e-20,
        "within a rounding of float32": palette(300) * 2e-7 + 0.5,
        "a clump and one far away": torch.cat([palette(200) * 0.01, palette(1) * 1e12]),
        "random": palette(512),
        "one": palette(1),
        "two": palette(2),
        "a block": palette(16),
        "a block and one": palette(17),
        "on the uint8 grid": torch.randint(0, 16, (256, 3), generator=generator) * 17 / 127.5 - 1.0,
        "doubles": palette(40).repeat(3, 1),
        "all equal": torch.full((70, 3), 0.25),
        "a rounding apart": torch.cat([torch.nextafter(close, torch.full_like(close, 2.0)), close]),
        # Far from the greys many clusters are almost equally near: long lists.
        "greys": torch.linspace(-1, 1, 200)[torch.randperm(200, generator=generator)].reshape(-1, 1).repeat(1, 3),
        "far": torch.cat([palette(30) * 1e9, palette(30, seed=1) * 3e38]),
        "overflow": palette(30, seed=1) * 3e38,
        # Groups of many, which few pixels meet as well.
        "clumps": torch.cat([palette(150, seed) * 1e-5 + 0.3 * seed for seed in range(3)]),
        "a clump, and few far": torch.cat([palette(200) * 1e-4, palette(20, seed=1)]),
        "far, and almost equal": torch.cat([torch.full((60, 1), 3e38), palette(60)[:, 1:] * 3e-7], dim=1),
        "broken": broken,
        "nothing finite": torch.full((20, 3), float("nan")),
        # Enough to be put in order, with boxes.
        "many broken": torch.cat([broken, palette(400), broken]),
        "many far": torch.cat([palette(300) * 1e9, palette(300, seed=1) * 3e38]),
        "many doubles": palette(130).repeat(4, 1),
        "many and nothing finite": torch.full((400, 3), float("nan")),
    }


@functools.cache
def colours_and_tokens(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """66,000 colours, many on a grid or grey, and the definition's tokens of every fifth."""
    x = torch.randint(0, 256, (66_000, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    x[::3] = x[::3] // 17 * 17
    x[1::30] = x[1::30, :1]
    colours = x if dtype == torch.uint8 else x / 127.5 - 1.0
    return colours, reference.quantize(colours[::5], adversaries()[kind])


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", adversaries())
def test_every_instruction_set_agrees(isa: str, kind: str, dtype: torch.dtype) -> None:
    """The numbers of pixels choose how far the cells are refined; token by token."""
    clusters = adversaries()[kind]
    x, expected = colours_and_tokens(kind, dtype)
    for n, threads in ((333, 1), (2_001, 1), (9_003, 2), (len(x), 1)):
        tokens = native(x[:n], clusters, threads)[::5]
        assert torch.equal(tokens, expected[: len(tokens)]), (isa, n)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("kind", crowds())
def test_no_palette_takes_more_work_than_comparing_all_with_all(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Candidates that lists were made of and pixels compared with, those in float64 twice; no clock."""
    clusters = crowds()[kind]
    for n in (1_024, 10_000, 65_536):
        x = torch.randint(0, 256, (n, 3), dtype=torch.uint8)
        x = x if dtype == torch.uint8 else x / 127.5 - 1.0
        work = torch.zeros(1, dtype=torch.int64)
        native(x, clusters, work=work)
        assert 0.0 < int(work) / n / len(clusters) < (0.3 if kind == "spread" and n > 10_000 else 1.3), (n, int(work))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("n", [10_000, 65_536, 131_072])
def test_thousands_of_colours_that_are_almost_equal(isa: str, n: int, dtype: torch.dtype) -> None:
    """At most about twice the work of all with all. With the most pixels the lists fill their memory."""
    clusters = torch.linspace(-1, 1, 4_096)[:, None].repeat(1, 3)
    x = torch.randint(0, 256, (n, 3), dtype=torch.uint8)
    x = x if dtype == torch.uint8 else x / 127.5 - 1.0
    work = torch.zeros(1, dtype=torch.int64)
    tokens = native(x, clusters, work=work)
    assert torch.equal(tokens[::97], reference.quantize(x[::97], clusters))
    assert int(work) / n / len(clusters) < 2.0


@needs_cpu
def test_a_palette_of_65536(isa: str) -> None:
    """Lists of many blocks; a part of the tokens by brute force in float64."""
    clusters = palette(65_536)
    x = torch.randint(0, 256, (8_200, 3), generator=torch.Generator().manual_seed(6), dtype=torch.uint8) // 8
    some = torch.arange(0, len(x), 101)
    levels = x[some].double() / 127.5 - 1.0
    distance = sum((levels[:, c, None] - clusters[:, c].double()).square() for c in range(3))
    assert torch.equal(native(x, clusters, 2)[some], distance.argmin(dim=1))


@needs_cpu
def test_the_environment_chooses_the_instruction_set() -> None:
    """In a process of its own: it is chosen once, when the package starts."""
    code = "import sys; from igpt_fast import environment; assert environment.config()['isa']['live'] == sys.argv[1]"
    environment = {**os.environ, "IGPT_FAST_ISA": ISAS[0]}
    subprocess.run([sys.executable, "-c", code, ISAS[0]], env=environment, check=True)


@needs_cpu
def test_not_a_number_gives_the_first_token() -> None:
    x = torch.full((33, 3), float("nan"))
    with backend.use_backend("cpu"):
        assert ops.quantize(x, palette(20)).tolist() == [0] * 33


@needs_cpu
def test_any_number_of_threads_gives_the_same() -> None:
    x, clusters = torch.randint(0, 256, (4_097, 3), dtype=torch.uint8), palette(64)
    expected = reference.quantize(x, clusters)
    for threads in (-1, 0, 1, 2, 3, 7, 1000):
        assert torch.equal(native(x, clusters, threads), expected)


@needs_cpu
@pytest.mark.parametrize("k", [0, -1, 2**31])
def test_the_module_refuses_a_number_of_clusters_that_it_cannot_count(k: int) -> None:
    with pytest.raises(ValueError if k < 1 else TypeError, match="rows" if k < 1 else "k: the number is too large"):
        backend._C.quantize_cpu(x=0, is_u8=True, clusters=0, out=0, n=0, k=k, place=1, work=0)


@needs_cpu
def test_memory_that_cannot_be_had_raises() -> None:
    """2 G clusters, which are never read: the driver asks for their memory first and outside the parallel region."""
    code = """
import resource, torch
from igpt_fast import backend
x, out = torch.zeros(8192, 3, dtype=torch.uint8), torch.zeros(8192).long()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (8 << 30)  # above what torch has mapped already, which differs by build
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    places = {"x": x.data_ptr(), "clusters": 0, "out": out.data_ptr()}
    backend._C.quantize_cpu(**places, is_u8=True, n=8192, k=2**31 - 1, place=2, work=0)
except MemoryError:
    print("caught")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "caught\n", done.stderr


@needs_cpu
def test_other_python_threads_go_on() -> None:
    """The interpreter's lock is released: another thread wakes many times during one call."""
    x, clusters = all_colours(), palette(512)
    worker = threading.Thread(target=ops.quantize, args=(x, clusters))
    worker.start()
    turns = 0
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns >= 5


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child() -> None:
    """OpenMP's threads do not survive a fork; a region that waits for them would hang, as DataLoader workers do."""
    code = """
import os, signal, torch
from igpt_fast import ops
torch.set_num_threads(2)
x, clusters = torch.randint(0, 256, (200_000, 3), dtype=torch.uint8), torch.rand(64, 3)
before = ops.quantize(x, clusters).numpy()
if os.fork() == 0:
    signal.alarm(60)
    os._exit(int((ops.quantize(x, clusters).numpy() != before).any()))
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


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


def test_a_tensor_with_the_negative_bit_is_resolved_first() -> None:
    """Its memory holds the opposite signs, which the direct path must not read as they are."""
    x, clusters = torch.rand(50, 3) * 2 - 1, palette(20)
    assert torch.equal(ops.quantize(torch._neg_view(x), clusters), reference.quantize(-x, clusters))

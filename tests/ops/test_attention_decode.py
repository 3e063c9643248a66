"""attention_decode: the definition against attention over everything, the kernels against the definition."""

from __future__ import annotations

import checks_attention_decode as checks
import pytest
import torch
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, ops, reference
from igpt_fast.ops.attention_decode import dequantize_e4m3, quantize_e4m3
from igpt_fast.ops.dispatch import HEAD_DIMS

OP = "attention_decode"
LAUNCHES_NOTHING = {"test_empty_batch", "test_fake_and_meta"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _launched(request: pytest.FixtureRequest):
    """Under the emulator a test that calls the op shall have launched a kernel."""
    if "implementation" not in request.fixturenames or request.node.originalname in LAUNCHES_NOTHING:
        yield
        return
    implementation = request.getfixturevalue("implementation")
    if implementation.module is not None:
        implementation.module.reset_counters()
    yield
    if implementation.module is not None:
        assert implementation.module.counters()["launches"] > 0


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions(implementation, dtype: torch.dtype, dim: int, starts: bool) -> None:
    checks.check_positions(implementation.device, dtype, dim, starts)


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("scaled", [1, 2])
def test_positions_of_8_bits(implementation, scaled: int, dtype: torch.dtype, dim: int, starts: bool) -> None:
    checks.check_positions(implementation.device, dtype, dim, starts, scaled)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("scaled", [1, 2])
def test_long_cache_of_8_bits(implementation, scaled: int, dim: int) -> None:
    checks.check_long(implementation.device, torch.bfloat16, dim, scaled)


@pytest.mark.parametrize(("prefixes", "rows", "prefix"), checks.PREFIXES[1:4])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("scaled", [1, 2])
def test_prefix_before_8_bits(implementation, scaled: int, dim: int, prefixes: int, rows: int, prefix: int) -> None:
    checks.check_prefix(implementation.device, torch.bfloat16, dim, prefixes, rows, prefix, scaled)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_code(implementation, dim: int) -> None:
    checks.check_codes(implementation.device, torch.bfloat16, dim)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 96), (torch.bfloat16, 32)])
def test_every_value_is_quantized_as_torch_does(implementation, dtype: torch.dtype, dim: int) -> None:
    checks.check_quantizing(implementation.device, dtype, dim)


def test_scaled_values_are_near() -> None:
    """Half a unit of 4 bits of those between an eighth of the largest and it; a scale of the largest and no other."""
    v = torch.randn(50, 64) * torch.randn(50, 1).exp()
    codes, scales = quantize_e4m3(v)
    back, largest = dequantize_e4m3(codes, scales, torch.float32), v.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(back.abs().amax(dim=1, keepdim=True), largest, rtol=1e-6, atol=0.0)
    assert ((back - v).abs() <= torch.maximum(v.abs() * 2.0**-4, largest * 2.0**-10 / 448.0) * 1.001).all()


@pytest.mark.parametrize(("prefixes", "rows", "prefix"), checks.PREFIXES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefix(implementation, dtype: torch.dtype, dim: int, prefixes: int, rows: int, prefix: int) -> None:
    checks.check_prefix(implementation.device, dtype, dim, prefixes, rows, prefix)


def test_long_cache(implementation) -> None:
    checks.check_long(implementation.device)


def test_many_blocks(implementation) -> None:
    checks.check_many_blocks(implementation.device)


def test_position_outside_the_cache(implementation) -> None:
    checks.check_outside(implementation.device)


@pytest.mark.parametrize("scaled", [0, 1, 2])
@pytest.mark.parametrize("prefixes", [0, 2])
def test_nan_stays_in_its_row(implementation, prefixes: int, scaled: int) -> None:
    checks.check_nan_stays(implementation.device, prefixes, scaled)


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_shapes_of_position(implementation, shape: tuple[int, ...]) -> None:
    made = checks.case(implementation.device, torch.bfloat16, 64, 66)
    position = torch.full(shape, 66, dtype=torch.int32, device=implementation.device)
    arguments = made.q, made.k, made.v, made.k_cache.clone(), made.v_cache.clone()
    assert torch.equal(ops.attention_decode(*arguments, position), made.op()[0])


@pytest.mark.parametrize("position", [5, 63, 64, 129])
def test_limit(implementation, position: int) -> None:
    """It says how many blocks are launched, and is no border."""
    made = checks.case(implementation.device, torch.bfloat16, 64, position)
    arguments = made.q, made.k, made.v, made.k_cache, made.v_cache, made.position
    plain, exact = made.definition(torch.bfloat16), made.definition(torch.float64)
    launches = []
    for limit in (1, 64, 65, 130):
        if implementation.module is not None:
            implementation.module.reset_counters()
        assert_parity(ops.attention_decode(*arguments, limit=limit), plain, exact, f"limit {limit}")
        if implementation.module is not None:
            launches.append(implementation.module.counters()["launches"])
    assert launches in ([], [1, 1, 2, 2])
    assert torch.equal(ops.attention_decode(*arguments), ops.attention_decode(*arguments, limit=130))


def test_scale(implementation) -> None:
    made = checks.case(implementation.device, torch.float32, 32, 20)
    arguments = made.k, made.v, made.k_cache, made.v_cache, made.position
    twice = ops.attention_decode(2 * made.q, *arguments, scale=0.25)
    assert torch.equal(ops.attention_decode(made.q, *arguments, scale=0.5), twice)


def test_layouts_that_are_copied(implementation) -> None:
    """Strides and addresses that a kernel cannot load vectors from, of a prefix too; strided positions and starts."""
    device = implementation.device
    made = checks.case(device, torch.bfloat16, 64, [3, 40, 60, 69], 70, 4, starts=[0, 1, 2, 3], prefixes=2, prefix=9)
    want = made.op()
    q = made.q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.empty(made.k.numel() + 1, dtype=made.k.dtype, device=device)[1:].view(made.k.shape).copy_(made.k)
    v = made.v[..., None].expand(*made.v.shape, 2).contiguous()[..., 0]
    prefix_k = made.prefix_k.transpose(1, 2).contiguous().transpose(1, 2)
    prefix_v = torch.cat([made.prefix_v, made.prefix_v], dim=2)[:, :, :9]
    position, starts = (x[:, None].expand(4, 2).contiguous()[:, 0] for x in (made.position, made.starts))
    caches = made.k_cache.clone(), made.v_cache.clone()
    out = ops.attention_decode(q, k, v, *caches, position, starts, prefix_k=prefix_k, prefix_v=prefix_v)
    assert torch.equal(out, want[0])
    assert torch.equal(caches[0].nan_to_num(), want[1].nan_to_num())
    # The beginning of a longer cache, as it is.
    shared = [torch.cat([x, x], dim=2)[:, :, :9] for x in (made.prefix_k, made.prefix_v)]
    out = ops.attention_decode(
        made.q, made.k, made.v, *caches, made.position, made.starts, prefix_k=shared[0], prefix_v=shared[1]
    )
    assert torch.equal(out, want[0])


def test_empty_batch(implementation) -> None:
    device = implementation.device
    q, cache = torch.zeros(0, 2, 64, device=device), torch.zeros(0, 2, 5, 64, device=device)
    for position in (torch.tensor(1), torch.tensor([1]), torch.zeros(0)):
        out = ops.attention_decode(q, q, q, cache, cache.clone(), position.int().to(device))
        assert out.shape == (0, 2, 64)


@pytest.mark.parametrize(("prefixes", "starts"), [(0, None), (1, [0, 2, 5])])
def test_steps_are_causal_attention(implementation, prefixes: int, starts: list[int] | None) -> None:
    """Decoding one after another is attention over all at once: of nothing, or of a common beginning."""
    device, heads, dim, t = implementation.device, 2, 32, 7
    before = 3 if prefixes else 0
    q, k, v = (torch.randn(3, heads, t, dim).bfloat16().to(device) for _ in range(3))
    shared = [torch.randn(1, heads, before, dim).bfloat16().to(device) for _ in range(2)]
    keys, values = (torch.cat([x.expand(3, -1, -1, -1), y], dim=2) for x, y in zip(shared, (k, v), strict=True))
    first = torch.tensor(starts or [0, 0, 0], dtype=torch.int32, device=device)
    mask = torch.arange(before + t, device=device) >= first[:, None]
    exact, _ = reference.causal_attention(q.double(), keys.double(), values.double(), dim**-0.5, mask)
    plain, _ = reference.causal_attention(q, keys, values, dim**-0.5, mask)
    caches = [torch.full((3, heads, t, dim), torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2)]
    position, outs = torch.zeros(1, dtype=torch.int32, device=device), []
    for i in range(t):
        prefix = dict(zip(("prefix_k", "prefix_v"), shared, strict=True)) if prefixes else {}
        new = q[:, :, i], k[:, :, i], v[:, :, i]
        outs.append(ops.attention_decode(*new, *caches, position, first if starts else None, **prefix))
        position += 1
    checks.assert_parity(torch.stack(outs, dim=2), plain, exact)
    assert torch.equal(caches[0], k)
    assert torch.equal(caches[1], v)


@pytest.mark.parametrize("heads_per_row", [1, 40])
def test_schedules(emulation, heads_per_row: int) -> None:
    for order, seed in [("random", 3), ("skewed", 3)]:
        emulation.schedule(order, seed)
        checks.check(checks.case("cpu", torch.bfloat16, 96, [0, 70, 129], heads=heads_per_row))
        checks.check_prefix("cpu", torch.float16, 96, 2, 10, 65)


def operands(dtype: torch.dtype = torch.bfloat16, prefix: bool = False, scaled: int = 0) -> list[Tensor | None]:
    """Arguments of the registered op, without NaN."""
    made = checks.case("cpu", dtype, 32, [1, 66, 5, 9], 70, 4, starts=[0, 1, 2, 0], prefixes=2, prefix=9)
    keys, values = made.k_cache.nan_to_num(), made.v_cache.nan_to_num()
    scales: list[Tensor | None] = [None, None]
    if scaled:
        values, scales[0] = quantize_e4m3(values)
    if scaled == 2:
        keys, scales[1] = quantize_e4m3(keys)
    tensors = made.q, made.k, made.v, keys, values, made.position, made.starts
    shared = [made.prefix_k.nan_to_num(), made.prefix_v.nan_to_num()] if prefix else [None, None]
    return [*tensors, *shared, *scales]


@pytest.mark.parametrize("scaled", [0, 1, 2])
@pytest.mark.parametrize("prefix", [False, True])
def test_opcheck(emulation, prefix: bool, scaled: int) -> None:
    made = operands(prefix=prefix, scaled=scaled)
    checked = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not scaled:  # it multiplies what is written to, as torch does not in float8
        checked.append("test_schema")
    torch.library.opcheck(
        torch.ops.igpt_fast.attention_decode.default, (*made, 0.2, made[3].shape[2]), test_utils=checked
    )


@pytest.mark.parametrize("scaled", [0, 1, 2])
@pytest.mark.parametrize("prefix", [False, True])
def test_compile(implementation, prefix: bool, scaled: int) -> None:
    """The caches that a compiled function is given are written to."""
    made = operands(prefix=prefix, scaled=scaled)
    *tensors, prefix_k, prefix_v, v_scale, k_scale = (None if t is None else t.to(implementation.device) for t in made)

    def step(q, k, v, k_cache, v_cache, v_scale, k_scale, position, starts):
        shared = {"prefix_k": prefix_k, "prefix_v": prefix_v, "v_scale": v_scale, "k_scale": k_scale}
        out = ops.attention_decode(2 * q, k, v, k_cache, v_cache, position, starts, **shared)
        return out + k_cache.float().sum() * 0

    def run(function) -> list[Tensor]:
        q, k, v, *caches, position, starts = tensors
        caches = [None if t is None else t.clone() for t in (*caches, v_scale, k_scale)]
        out = function(q, k, v, *caches, position, starts)
        return [out, *(t.float() for t in caches if t is not None)]

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(run(compiled), run(step), strict=True):
        assert torch.equal(ours, wanted)


def test_fake_and_meta(implementation) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t.to(implementation.device)) for t in operands()]
        out = ops.attention_decode(*fakes[:7])
    assert (out.shape, out.dtype, out.device.type) == ((4, 2, 32), torch.bfloat16, implementation.device)
    metas = [None if t is None else t.to("meta") for t in operands()]
    with backend.use_backend("auto"):
        out = ops.attention_decode(*metas[:7])
    assert (out.shape, out.device.type) == ((4, 2, 32), "meta")


def test_autocast(implementation) -> None:
    """Everything is of the cache's dtype, which autocast leaves alone."""
    made = checks.case(implementation.device, torch.bfloat16, 64, 66)
    want = made.op()[0]
    with torch.autocast(implementation.device, dtype=torch.bfloat16):
        assert torch.equal(made.op()[0], want)


def test_registered_op_is_the_function(emulation) -> None:
    tensors = operands()
    direct = ops.attention_decode(*(t if t is None else t.clone() for t in tensors[:7]))
    registered = torch.ops.igpt_fast.attention_decode(*tensors, float(32**-0.5), tensors[3].shape[2])
    assert torch.equal(direct, registered)


def test_what_the_kernel_does_not_cover_goes_the_other_way(emulation) -> None:
    emulation.module.reset_counters()
    checks.check(checks.case("cpu", torch.bfloat16, 48, 66))
    checks.check(checks.case("cpu", torch.float64, 64, 66))
    checks.check(checks.case("cpu", torch.float32, 64, 6, 9, 4, prefixes=2, prefix=5))
    checks.check(checks.case("cpu", torch.float32, 64, 6, 9, 4, scaled=2))
    checks.check(checks.case("cpu", torch.bfloat16, 48, 66, scaled=True))
    assert emulation.module.counters()["launches"] == 0


@pytest.mark.gpu
def test_graph_replay() -> None:
    """A captured step goes on as the position and the starts change in place."""
    made = checks.case("cuda", torch.bfloat16, 64, 0, t_max=200, starts=[0, 0, 0])
    q, k, v, k_cache, v_cache = (t.clone() for t in (made.q, made.k, made.v, made.k_cache, made.v_cache))
    position, starts = made.position.clone(), made.starts.clone()
    with backend.use_backend("cuda"):
        ops.attention_decode(q, k, v, k_cache, v_cache, position, starts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attention_decode(q, k, v, k_cache, v_cache, position, starts)
        eager_k, eager_v = k_cache.clone(), v_cache.clone()
        for at in range(150):
            for tensor in (q, k, v):
                tensor.normal_()
            position.fill_(at)
            starts.fill_(at // 3)
            graph.replay()
            want = ops.attention_decode(q, k, v, eager_k, eager_v, position, starts)
            assert torch.equal(out, want), at


@pytest.mark.gpu
def test_thousand_repeats() -> None:
    made = checks.case("cuda", torch.bfloat16, 64, 300, 320, 2, prefixes=1, prefix=150)
    with backend.use_backend("cuda"):
        first = made.op()[0]
        assert all(torch.equal(made.op()[0], first) for _ in range(1000))


def _misuse() -> dict[str, tuple[dict[str, object], type[Exception], str]]:
    zeros, float8 = torch.zeros, torch.float8_e4m3fn
    eight = {"v_cache": zeros(2, 4, 5, 32).to(float8)}
    return {
        "q's shape": ({"q": zeros(2, 4)}, ValueError, r"q has shape \(2, 4\); want \(B, H, D\)"),
        "q's type": ({"q": [1.0]}, TypeError, "q is list; want a floating-point tensor"),
        "k's shape": ({"k": zeros(3, 4, 32)}, ValueError, r"k has shape \(3, 4, 32\); want \(2, 4, 32\), q's"),
        "v's dtype": ({"v": zeros(2, 4, 32).half()}, TypeError, "v is torch.float16; want torch.float32"),
        "cache's shape": ({"k_cache": zeros(2, 4, 32)}, ValueError, r"k_cache has shape \(2, 4, 32\); want \(2, 4, T"),
        "cache's dtype": ({"v_cache": zeros(2, 4, 5, 32).bfloat16()}, TypeError, "v_cache is torch.bfloat16"),
        "8 bits": ({"v_cache": zeros(2, 4, 5, 32).to(float8)}, TypeError, "v_cache is .*8.*; want torch.float32"),
        "scales": ({"v_scale": zeros(2, 4, 5)}, TypeError, "v_cache is torch.float32; want torch.float8"),
        "scale's shape": (eight | {"v_scale": zeros(2, 4, 6)}, ValueError, r"v_scale has .*; want \(2, 4, 5\)"),
        "scale's dtype": (eight | {"v_scale": zeros(2, 4, 5).half()}, TypeError, "v_scale is torch.float16; want .*32"),
        "keys alone": ({"k_scale": zeros(2, 4, 5)}, ValueError, "k_scale comes with v_scale; want both, v_scale alone"),
        "keys": (eight | dict.fromkeys(("v_scale", "k_scale"), zeros(2, 4, 5)), TypeError, "k_cache is torch.float32"),
        "scale's strides": (eight | {"v_scale": zeros(4, 2, 5).transpose(0, 1)}, ValueError, "v_scale has strides"),
        "no room": ({"k_cache": zeros(2, 4, 0, 32)}, ValueError, "k_cache has shape"),
        "two caches": ({"v_cache": zeros(2, 4, 6, 32)}, ValueError, "v_cache has shape .*; want .*, k_cache's"),
        "strides": ({"k_cache": zeros(2, 5, 4, 32).transpose(1, 2)}, ValueError, "k_cache has strides .*; want a cont"),
        "int64": ({"position": torch.tensor(1)}, TypeError, "position is torch.int64; want an int32 tensor"),
        "an int": ({"position": 1}, TypeError, "position is int; want an int32 tensor"),
        "positions": ({"position": zeros(3).int()}, ValueError, r"position has .*; want \(\) or \(1,\) or \(2,\)"),
        "starts": ({"starts": zeros(1).int()}, ValueError, r"starts has shape \(1,\); want \(2,\)"),
        "devices": ({"position": zeros(1, device="meta").int()}, ValueError, "position is on meta"),
        "devices of k": ({"k": zeros(2, 4, 32, device="meta")}, ValueError, "k is on meta"),
        "half a prefix": ({"prefix_k": zeros(1, 4, 3, 32)}, ValueError, "prefix_k and prefix_v come together"),
        "prefixes": (dict.fromkeys(("prefix_k", "prefix_v"), zeros(4, 4, 3, 32)), ValueError, "prefix_k has shape"),
        "no prefix": (dict.fromkeys(("prefix_k", "prefix_v"), zeros(0, 4, 3, 32)), ValueError, ".* want one prefix"),
        "empty": (dict.fromkeys(("prefix_k", "prefix_v"), zeros(1, 4, 0, 32)), ValueError, "prefix_k has shape"),
        "limit": ({"limit": 6}, ValueError, "limit is 6; want an integer in 1..5, the cache's length"),
        "no limit": ({"limit": 0}, ValueError, "limit is 0; want"),
        "gradient": ({"q": zeros(2, 4, 32, requires_grad=True)}, ValueError, "q wants a gradient; .* torch.no_grad"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _misuse())
def test_misuse(name: str) -> None:
    changes, error, message = _misuse()[name]
    arguments = {x: torch.zeros(2, 4, 32) for x in ("q", "k", "v")}
    arguments |= {x: torch.zeros(2, 4, 5, 32) for x in ("k_cache", "v_cache")}
    arguments |= {"position": torch.tensor(1, dtype=torch.int32)}
    ops.attention_decode(**arguments)
    with pytest.raises(error, match="attention_decode: " + message):
        ops.attention_decode(**(arguments | changes))


def test_misaligned_cache(emulation) -> None:
    cache = torch.zeros(2 * 4 * 5 * 32 + 1)[1:].view(2, 4, 5, 32)
    q = torch.zeros(2, 4, 32)
    with pytest.raises(ValueError, match=r"attention_decode: v_cache begins at 0x.*; want a multiple of 16 bytes"):
        ops.attention_decode(q, q, q, cache.clone(), cache, torch.tensor(1, dtype=torch.int32))


def test_without_gradients_a_parameter_will_do(implementation) -> None:
    made = checks.case(implementation.device, torch.bfloat16, 64, 66)
    q = torch.nn.Parameter(made.q)
    with torch.no_grad():
        out = ops.attention_decode(q, made.k, made.v, made.k_cache.clone(), made.v_cache.clone(), made.position)
    assert torch.equal(out, made.op()[0])

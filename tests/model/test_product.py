"""Products of numbers that the processor does not multiply: computed in float32, rounded once, and said by igpt env."""

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import ids, small
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import backend, environment, ops, reference
from igpt_fast.engines.network import logits_of
from igpt_fast.learning.distributed import autocasts
from igpt_fast.learning.settings import TrainConfig
from igpt_fast.ops import dispatch

pytestmark = pytest.mark.skipif(
    backend._C is None or sys.platform != "linux", reason="instruction sets are chosen by name on x86-64"
)
WITHOUT = [
    name
    for name, has in dict(backend._C.cpu_isas() if backend._C else {}).items()
    if has and name in ("generic", "avx2", "neon")
]
LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=WITHOUT)
def without(request: pytest.FixtureRequest) -> str:
    """An instruction set without products of bfloat16."""
    assert backend._C is not None
    before = backend._C.cpu_isa()
    assert backend._C.select_cpu_isa(request.param)
    yield request.param
    backend._C.select_cpu_isa(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that torch's products get."""
    found: list[torch.dtype] = []

    def watch(module: object, name: str) -> None:
        function = getattr(module, name)

        def watched(*tensors: Tensor, **keywords: object) -> Tensor:
            found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensors[0].dtype)
            return function(*tensors, **keywords)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((torch, "addmm"), (F, "linear"), (F, "scaled_dot_product_attention")):
        watch(module, name)
    return found


def test_which_do(isa: str) -> None:
    pairs = "bf16" in isa or isa == "amx"
    assert backend._C is not None
    assert backend._C.cpu_bf16_products() == pairs
    cpu = torch.device("cpu")
    assert (backend.no_products(torch.bfloat16, cpu) is None) == pairs
    assert backend.no_products(torch.float16, cpu) == "this package multiplies no float16 on a CPU"
    assert (dispatch.widened(torch.ones(1, dtype=torch.bfloat16)) is None) == pairs
    for dtype in (torch.float32, torch.float64):
        assert backend.no_products(dtype, cpu) is None
        assert dispatch.widened(torch.ones(1, dtype=dtype)) is None
    assert backend.no_products(torch.bfloat16, torch.device("cuda", 0)) is None
    want = {"runs": "bfloat16", "reason": ""}
    if not pairs:
        want = {"runs": "float32", "reason": f"the instruction set {isa!r} does not multiply bfloat16"}
    report = environment.config()
    assert report["products"]["bfloat16"] == want
    line = f"in {want['runs']}" + f" [{want['reason']}]" * (not pairs)
    assert f"products   of bfloat16  cpu: {line}\n" in environment.format_config(report)
    with backend.use_backend("reference"):
        plain = {"runs": "bfloat16", "reason": ""}, {"runs": "float16", "reason": ""}
        assert tuple(environment.config()["products"].values()) == plain
        assert autocasts(TrainConfig(bf16=True), cpu)


@pytest.mark.parametrize("dtype", LOW)
def test_rounded_once(without: str, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 24), (12, 24), (12,)))
    want = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
    assert torch.equal(dispatch.product(F.linear, x, weight, bias), want)
    with torch.autocast("cpu", dtype):
        got = dispatch.product(F.linear, x.float(), weight.float(), None)
    assert torch.equal(got, F.linear(x.float(), weight.float()).to(dtype))
    with pytest.raises(RuntimeError, match="dtype"):
        dispatch.product(F.linear, x, weight.float(), None)
    q, k, v = torch.randn(3, 1, 2, 6, 40).to(dtype)
    wide = reference.causal_attention(q.float(), k.float(), v.float(), 0.1)
    for got, part in zip(ops.causal_attention(q, k, v, 0.1, need_weights=True), wide, strict=True):
        assert torch.equal(got, part.to(dtype))
    for like in (q, q.float()):  # results are of the dtypes that they have everywhere
        with torch.autocast("cpu", dtype):
            got = ops.causal_attention(like, like, like, need_weights=True)
            with backend.use_backend("reference"):
                want = ops.causal_attention(like, like, like, need_weights=True)
        assert [part.dtype for part in got] == [part.dtype for part in want]


def run(model: Any, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Logits and gradients."""
    model.zero_grad()
    out = model(tokens, labels=tokens, attention_mask=mask, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("how", ["plain", "autocast", "masked"])
@pytest.mark.parametrize("dtype", LOW)
def test_a_model(without: str, seen: list[torch.dtype], dtype: torch.dtype, how: str) -> None:
    """No product of torch's is in the dtype of the weights, forward or backward; results have it still."""
    model = small(torch.float32 if how == "autocast" else dtype)
    found: list[list[list[Tensor]]] = [[], [], []]  # of several inputs, for the largest error of a few elements is luck
    for seed in range(8):
        tokens = ids(model, 2, 9, seed) % 16
        mask = torch.ones_like(tokens) if how == "masked" else None
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            with backend.use_backend("reference"):
                found[1].append(run(model, tokens, mask))
            seen.clear()
            found[0].append(run(model, tokens, mask))
        assert set(seen) == {torch.float32}
        found[2].append(run(copy.deepcopy(model).double(), tokens, mask))
    got, plain, exact = ([torch.stack(results) for results in zip(*runs, strict=True)] for runs in found)
    assert got[0].dtype == dtype
    assert all(x.dtype == model.dtype for x in got[1:])
    for names in zip(got, plain, exact, strict=True):
        assert_parity(*names)


def test_the_head_is_torchs_linear_layer(without: str) -> None:
    """What tools look for; in float32 as other products, but where something else stands there."""
    model, states = small(torch.bfloat16).requires_grad_(False), torch.randn(5, 48).bfloat16()
    assert type(model.lm_head) is torch.nn.Linear
    want = F.linear(states.float(), model.lm_head.weight.float()).bfloat16()
    assert torch.equal(logits_of(model.lm_head, states), want)
    compiled = torch.compile(lambda x: logits_of(model.lm_head, x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(states), want)
    model.lm_head.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(logits_of(model.lm_head, states), torch.zeros(1))


def test_compiled(without: str) -> None:
    """The graph has the product in float32."""
    x, weight = torch.randn(5, 24).bfloat16(), torch.randn(12, 24).bfloat16()
    seen: list[torch.dtype] = []

    def watch(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(node.args[0].meta["example_value"].dtype for node in graph.graph.nodes if node.target is F.linear)
        return graph.forward

    compiled = torch.compile(lambda x, y: dispatch.product(F.linear, x, y), backend=watch, fullgraph=True)
    assert torch.equal(compiled(x, weight), dispatch.product(F.linear, x, weight))
    assert seen == [torch.float32]
    torch.compiler.reset()


def test_the_reference_and_exports_stay_as_defined(without: str, seen: list[torch.dtype]) -> None:
    model = small(torch.bfloat16)
    tokens = ids(model, 1, 9)
    with backend.use_backend("reference"), torch.no_grad():
        model(tokens)
    assert set(seen) == {torch.bfloat16}
    graph = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False).graph
    assert "aten.linear.default" in str(graph)
    assert "autocast" not in str(graph)

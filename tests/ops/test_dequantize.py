"""dequantize: colours of tokens, on every implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from igpt_fast import backend, ops, reference

if TYPE_CHECKING:
    from implementations import Implementation

OP = "dequantize"


def palette(k: int) -> torch.Tensor:
    return torch.rand(k, 3) * 2.2 - 1.1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (97,), (3, 32, 32)])
def test_parity(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens, clusters = torch.randint(0, 100, shape).to(dtype), palette(100)
    ours = ops.dequantize(tokens.to(implementation.device), clusters.to(implementation.device))
    assert ours.dtype == torch.uint8
    assert ours.is_contiguous()
    assert torch.equal(ours.cpu(), reference.dequantize(tokens, clusters))
    if implementation.module is not None and dtype != torch.int8 and tokens.numel():
        implementation.module.reset_counters()
        ops.dequantize(tokens, clusters)
        assert implementation.module.counters()["launches"] == 1


def test_it_undoes_quantize(implementation: Implementation) -> None:
    colours = torch.randperm(1 << 24)[:512]
    colours = torch.stack([colours >> 16, colours >> 8 & 255, colours & 255], dim=1).to(torch.uint8)
    clusters = (colours / 127.5 - 1.0).to(implementation.device)
    tokens = ops.quantize(colours.to(implementation.device), clusters)
    assert torch.equal(tokens.cpu(), torch.arange(512))
    assert torch.equal(ops.dequantize(tokens, clusters).cpu(), colours)


def test_rounding_and_clipping(implementation: Implementation) -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5, -1.0 + 0.5 / 127.5, -1.0 + 1.5 / 127.5, torch.inf, -torch.inf])
    clusters = values[:, None].expand(-1, 3).contiguous().to(implementation.device)
    ours = ops.dequantize(torch.arange(len(values)).to(implementation.device), clusters)
    # 127.5 and what rounds to 0.5 and 1.5: to the even one.
    expected = torch.round(127.5 * (values + 1.0)).clamp(0, 255)
    assert ours[:, 0].cpu().tolist() == expected.tolist()
    assert ours[:5, 0].tolist() == [0, 0, 128, 255, 255]


def test_negative_tokens_count_from_the_end(implementation: Implementation) -> None:
    clusters = palette(7).to(implementation.device)
    forward, backward = torch.arange(7), torch.arange(-7, 0)
    found = [ops.dequantize(t.to(implementation.device), clusters).cpu() for t in (forward, backward)]
    assert torch.equal(*found)


@pytest.mark.parametrize("token", [7, -8])
@pytest.mark.parametrize("native", ["emulation", "native_cpu"])
def test_tokens_out_of_range(token: int, native: str, request: pytest.FixtureRequest) -> None:
    tokens, clusters = torch.tensor([0, token]), palette(7)
    with pytest.raises(IndexError):
        reference.dequantize(tokens, clusters)
    request.getfixturevalue(native)
    # On a GPU it would end the process's use of the device.
    expected = (RuntimeError, "trap") if native == "emulation" else (IndexError, f"dequantize: token {token} is out of")
    with pytest.raises(expected[0], match=expected[1]):
        ops.dequantize(tokens, clusters)


def test_strides_and_alignment(implementation: Implementation) -> None:
    tokens = torch.randint(0, 50, (40, 30)).to(implementation.device)
    clusters = palette(100).to(implementation.device)[::2]
    for view in (tokens.T, tokens[:, ::3], tokens.flatten()[1:], tokens.flip(0)):
        assert torch.equal(ops.dequantize(view, clusters).cpu(), reference.dequantize(view.cpu(), clusters.cpu()))


def test_what_the_kernel_does_not_cover(emulation: Implementation) -> None:
    assert emulation.module is not None
    emulation.module.reset_counters()
    tokens = torch.randint(0, 50, (40,))
    for clusters in (palette(50).double(), palette(50).bfloat16(), palette(8193)):
        assert torch.equal(ops.dequantize(tokens, clusters), reference.dequantize(tokens, clusters))
    assert emulation.module.counters()["launches"] == 0


def test_no_gradient(implementation: Implementation) -> None:
    clusters = palette(5).to(implementation.device).requires_grad_()
    assert not ops.dequantize(torch.tensor([1, 2], device=implementation.device), clusters).requires_grad


def test_opcheck(emulation: Implementation) -> None:
    torch.library.opcheck(torch.ops.igpt_fast.dequantize.default, (torch.randint(0, 9, (4, 6)), palette(9)))


def test_compile_vmap_and_meta(implementation: Implementation) -> None:
    tokens, clusters = torch.randint(0, 9, (4, 6)).to(implementation.device), palette(9).to(implementation.device)
    expected = reference.dequantize(tokens, clusters)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(ops.dequantize, backend="aot_eager", fullgraph=True)(tokens, clusters), expected)
    assert torch.equal(torch.vmap(ops.dequantize, (0, None))(tokens, clusters), expected)
    with backend.use_backend("auto"):
        assert ops.dequantize(tokens.to("meta"), clusters.to("meta")).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("tokens", "clusters", "error", "message"),
    [
        (torch.zeros(2), torch.zeros(5, 3), TypeError, "tokens has dtype torch.float32; want integers"),
        (torch.zeros(2, dtype=torch.bool), torch.zeros(5, 3), TypeError, "torch.bool"),
        (torch.zeros(2).long(), torch.zeros(5, 4), ValueError, r"clusters has shape \(5, 4\); want"),
        (torch.zeros(2).long(), torch.zeros(5, 3, device="meta"), ValueError, "tokens is on cpu, clusters on meta"),
    ],
)
def test_misuse(tokens: torch.Tensor, clusters: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="dequantize: .*" + message):
        ops.dequantize(tokens, clusters)

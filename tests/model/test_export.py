"""torch.export, torch.onnx and torch.jit.trace write the definitions down: torch's own ops, for every declared size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from implementations import Implementation
from torch import Tensor

from igpt_fast import ImageGPTConfig, model, ops

HEADS = ["ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"]
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=1024)
# Little work for the CPU's kernels, which leave it to torch, and much.
LITTLE, MUCH = (3, 7), (64, 60)


def small(head: str) -> Any:
    """A model that returns tensors, as whatever reads an exported program knows them."""
    sizes = {"n_layer": 1, "n_positions": 1024, "vocab_size": 9, "n_embd": 32, "n_head": 2, "num_labels": 3}
    return getattr(model, head)(ImageGPTConfig(**sizes, use_cache=False, return_dict=False)).eval()


def ids_of(shape: tuple[int, int]) -> Tensor:
    return torch.randint(8, shape)


def check(found: Callable[[Tensor], Tensor], network: Any, *shapes: tuple[int, int]) -> None:
    for ids in map(ids_of, shapes):
        with torch.no_grad():
            torch.testing.assert_close(found(ids), network(ids)[0], atol=1e-4, rtol=1e-4)


def exported(network: Any, example: tuple[int, int], strict: bool = False) -> torch.export.ExportedProgram:
    dynamic = {"input_ids": {0: BATCH, 1: LENGTH}}
    return torch.export.export(network, (ids_of(example),), dynamic_shapes=dynamic, strict=strict)


@pytest.mark.parametrize(
    ("head", "example", "strict"),
    [*((head, LITTLE, False) for head in HEADS), (HEADS[1], MUCH, False), (HEADS[1], LITTLE, True)],
)
def test_export(head: str, example: tuple[int, int], strict: bool) -> None:
    network = small(head)
    program = exported(network, example, strict)
    assert not [node for node in program.graph.nodes if "igpt_fast" in str(node.target)]
    check(lambda ids: program.module()(ids)[0], network, LITTLE, MUCH, (1, 1), (2, 1), (1, 9))


STRANGER = """
import sys, torch
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "igpt_fast":
            raise ImportError("igpt_fast is not here")
sys.meta_path.insert(0, Nowhere())
program = torch.export.load(sys.argv[1]).module()
for ids, want in torch.load(sys.argv[2]):
    torch.testing.assert_close(program(ids)[0], want, atol=1e-4, rtol=1e-4)
assert "igpt_fast" not in sys.modules
"""


def test_an_exported_program_runs_where_the_package_is_not(tmp_path: Path) -> None:
    network = small(HEADS[1])
    torch.export.save(exported(network, MUCH), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save([(ids, network(ids)[0]) for ids in map(ids_of, (LITTLE, MUCH, (1, 1)))], tmp_path / "calls.pt")
    command = [sys.executable, "-c", STRANGER, tmp_path / "model.pt2", tmp_path / "calls.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_onnx(head: str, dynamo: bool, tmp_path: Path) -> None:
    network, path = small(head), tmp_path / "model.onnx"
    sizes: dict[str, Any] = {"dynamic_shapes": ({0: BATCH, 1: LENGTH},)}
    if not dynamo:
        sizes = {"dynamic_axes": {"ids": {0: "batch", 1: "length"}}}
    torch.onnx.export(network, (ids_of((16, 1024)),), path, input_names=["ids"], dynamo=dynamo, verbose=False, **sizes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda ids: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])  # noqa: E731
    check(run, network, (16, 1024), LITTLE, (1, 1))


@pytest.mark.filterwarnings("ignore")
def test_traced() -> None:
    network = small(HEADS[1])
    traced = torch.jit.trace(network, ids_of(LITTLE), check_trace=False)
    assert "igpt_fast::" not in str(traced.inlined_graph)
    check(lambda ids: traced(ids)[0], network, LITTLE, MUCH)


OPS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (ops.rms_norm, [torch.rand(3, 8), torch.rand(8)]),
    "layer_norm": (ops.layer_norm, [torch.rand(3, 8), torch.rand(8), torch.rand(8)]),
    "activation": (lambda x: ops.activation(x, "quick_gelu"), [torch.rand(3, 8)]),
    "cross_entropy": (ops.cross_entropy, [torch.rand(3, 8), torch.arange(3)]),
    "quantize": (ops.quantize, [torch.rand(4, 3), torch.rand(5, 3)]),
    "dequantize": (ops.dequantize, [torch.arange(4), torch.rand(5, 3)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.filterwarnings("ignore")
def test_every_op(native_cpu: Implementation, name: str) -> None:
    """Whose kernel serves any size here."""
    function, tensors = OPS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    native_cpu.module.reset_counters()
    want = function(*tensors)
    assert native_cpu.module.counters()["launches"] == 1
    program = torch.export.export(Module(), tuple(tensors))
    traced = torch.jit.trace(Module(), tuple(tensors), check_trace=False)
    assert native_cpu.module.counters()["launches"] == 1
    assert "igpt_fast." not in str(program.graph)
    assert "igpt_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(program.module()(*tensors), want)
    torch.testing.assert_close(traced(*tensors), want)


def test_export_behind_a_cache_and_with_a_mask() -> None:
    """Of any length both."""
    network, past = small(HEADS[1]), torch.export.Dim("past", min=1, max=20)
    length = torch.export.Dim("length", min=2, max=100)

    def call(shape: tuple[int, int], before: int) -> dict[str, Any]:
        with torch.no_grad():
            cache = network(ids_of((shape[0], before)), use_cache=True)[1]
        mask = torch.arange(before + shape[1]) >= torch.arange(shape[0])[:, None]
        return {"input_ids": ids_of(shape), "past_key_values": cache, "attention_mask": mask, "use_cache": True}

    sizes = {"input_ids": {0: BATCH, 1: length}, "past_key_values": [[{0: BATCH, 2: past}]] * 2, "use_cache": None}
    dynamic = {**sizes, "attention_mask": {0: BATCH, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(network, (), call(LITTLE, 5), dynamic_shapes=dynamic)
    for shape, before in ((MUCH, 9), ((4, 2), 5)):
        arguments = call(shape, before)
        with torch.no_grad():
            found, grown = program.module()(**arguments)  # the given cache stays as it is
            torch.testing.assert_close(found, network(**arguments)[0], atol=1e-4, rtol=1e-4)
        assert grown.get_seq_length() == before + shape[1]

"""quantize on CUDA tensors: both ways give the definition's tokens; the life of the tables of colours."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from igpt_fast import ops, reference
from igpt_fast.ops import colour_table

if TYPE_CHECKING:
    from implementations import Implementation

OP = "quantize"
PIXELS, K = 300, 40


@pytest.fixture
def tables(emulation: Implementation, monkeypatch: pytest.MonkeyPatch) -> Iterator[colour_table.ColourTables]:
    """An empty set of tables, each worth two calls; the emulator runs 64 blocks of a launch: the darkest cells."""
    fresh = colour_table.ColourTables()
    monkeypatch.setattr(colour_table, "tables", fresh)
    monkeypatch.setattr(colour_table, "WORK", 2 * PIXELS * K)
    emulation.module.set_blocks(0, 64)
    yield fresh
    emulation.module.set_blocks()


def palette(seed: int, k: int = K) -> torch.Tensor:
    """Clusters among the darkest colours."""
    dark = torch.rand(k, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([8, 16, 256])
    return dark / 127.5 - 1.0


def pixels(n: int = PIXELS) -> torch.Tensor:
    """Of the first 64 cells: r < 8, g < 16."""
    return torch.stack([torch.randint(0, end, (n,)) for end in (8, 16, 256)], dim=1).to(torch.uint8)


class Calls:
    """Calls quantize, compares with the definition, and says which kernels ran."""

    def __init__(self, emulation: Implementation) -> None:
        assert emulation.module is not None
        self.module = emulation.module

    def __call__(self, clusters: torch.Tensor, n: int = PIXELS) -> str:
        x = pixels(n)
        self.module.reset_counters()
        tokens = ops.quantize(x, clusters)
        counted = self.module.counters()
        assert torch.equal(tokens, reference.quantize(x, clusters))
        # Looking up meets no barrier; comparing and building do.
        name = "look up" if counted["barriers"] == 0 else "compare"
        return "build" if counted["launches"] == 2 else name


@pytest.fixture
def calls(emulation: Implementation) -> Calls:
    return Calls(emulation)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 3), (2, 5, 7, 3), (97, 3), (3, 64, 3)])
def test_parity(implementation: Implementation, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    x = x / 127.5 - 1.0 if dtype == torch.float32 else x
    clusters = torch.rand(50, 3) * 2 - 1
    tokens = ops.quantize(x.to(implementation.device), clusters.to(implementation.device))
    assert torch.equal(tokens.cpu(), reference.quantize(x, clusters))


def test_strides_and_alignment(implementation: Implementation) -> None:
    clusters = (torch.rand(6, 50) * 2 - 1).to(implementation.device).T[:, ::2]
    x = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8).to(implementation.device)
    packed = torch.randint(0, 256, (91,), dtype=torch.uint8).to(implementation.device)
    for view in (x.movedim(0, -1), packed[1:].reshape(30, 3)):
        assert torch.equal(ops.quantize(view, clusters).cpu(), reference.quantize(view.cpu(), clusters.cpu()))


def test_a_table_is_built_when_it_pays_and_then_used(tables: colour_table.ColourTables, calls: Calls) -> None:
    clusters = palette(0)
    assert [calls(clusters) for _ in range(4)] == ["compare", "build", "look up", "look up"]
    assert calls(clusters, 1) == "look up"
    assert len(tables) == 1


def test_large_inputs_build_at_once(tables: colour_table.ColourTables, calls: Calls) -> None:
    assert calls(palette(0), 2 * PIXELS) == "build"


def test_few_clusters_and_floats_are_compared(
    tables: colour_table.ColourTables, calls: Calls, emulation: Implementation
) -> None:
    few = palette(0, colour_table.MIN_CLUSTERS - 1)
    assert [calls(few, 8 * PIXELS) for _ in range(3)] == ["compare"] * 3
    clusters = palette(1)
    for _ in range(3):
        ops.quantize(torch.zeros(2 * PIXELS, 3), clusters)
    assert len(tables) == 0


def test_a_change_in_place_is_seen(tables: colour_table.ColourTables, calls: Calls) -> None:
    clusters = palette(0)
    assert [calls(clusters) for _ in range(3)] == ["compare", "build", "look up"]
    clusters.add_(0.01)
    assert [calls(clusters) for _ in range(3)] == ["compare", "build", "look up"]
    clusters[3:5, 1].copy_(torch.tensor([-1.0, -0.99]))  # through a view
    assert [calls(clusters) for _ in range(3)] == ["compare", "build", "look up"]
    clusters.data = palette(1)  # other memory
    assert [calls(clusters) for _ in range(3)] == ["compare", "build", "look up"]
    assert len(tables) == 1


def test_a_change_of_the_base_is_seen(tables: colour_table.ColourTables, calls: Calls) -> None:
    base = torch.cat([palette(0), palette(1)])
    view = base[K:]
    assert calls(view, 2 * PIXELS) == "build"
    base.mul_(0.99)
    assert calls(view, 1) == "compare"


def test_a_table_goes_with_its_clusters(tables: colour_table.ColourTables, calls: Calls) -> None:
    clusters, other = palette(0), palette(1)
    for each in (clusters, other):
        assert calls(each, 2 * PIXELS) == "build"
    assert len(tables) == 2
    del clusters, each
    gc.collect()
    assert len(tables) == 1
    assert calls(other) == "look up"
    del other
    gc.collect()
    assert len(tables._entries) == 0


def test_an_id_that_is_used_again_is_another_set(tables: colour_table.ColourTables, calls: Calls) -> None:
    for seed in range(20):  # each is collected before the next, which often gets its memory
        assert calls(palette(seed), 2 * PIXELS) == "build"
    assert len(tables) == 0


def test_sets_do_not_mix(tables: colour_table.ColourTables, calls: Calls) -> None:
    first, second = palette(0), palette(1)
    copy = first.clone()
    expected = ["compare", "build", "look up"]
    found = [[calls(clusters) for clusters in (first, second, copy)] for _ in range(3)]
    assert found == [[name] * 3 for name in expected]
    assert len(tables) == 3


def test_there_are_few_tables(tables: colour_table.ColourTables, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour_table, "MAX_TABLES", 2)
    first, second, third = palette(0), palette(1), palette(2)
    for clusters in (first, second):
        assert calls(clusters, 2 * PIXELS) == "build"
    assert calls(first) == "look up"
    assert calls(third, 2 * PIXELS) == "build"
    assert len(tables) == 2
    assert [calls(clusters, 1) for clusters in (first, third)] == ["look up"] * 2
    assert [calls(second) for _ in range(2)] == ["compare", "build"]  # the least recently used one went


def test_inference_tensors_are_compared(tables: colour_table.ColourTables, calls: Calls) -> None:
    """They do not count their changes."""
    with torch.inference_mode():
        clusters = palette(0)
        assert [calls(clusters, 4 * PIXELS) for _ in range(3)] == ["compare"] * 3
    ordinary = palette(1)
    with torch.inference_mode():
        assert [calls(ordinary) for _ in range(3)] == ["compare", "build", "look up"]


def test_parameters_and_the_registered_op(tables: colour_table.ColourTables, emulation: Implementation) -> None:
    """The dispatcher hands the same tensor on."""
    clusters, x = torch.nn.Parameter(palette(0)), pixels(2 * PIXELS)
    for _ in range(2):
        assert torch.equal(torch.ops.igpt_fast.quantize(x, clusters), reference.quantize(x, clusters))
    assert len(tables) == 1


def test_many_threads(tables: colour_table.ColourTables, emulation: Implementation) -> None:
    sets, failures = [palette(seed) for seed in range(6)], []
    x = pixels()
    expected = [reference.quantize(x, clusters) for clusters in sets]

    def work(offset: int) -> None:
        for i in range(30):
            which = (offset + i) % 6
            if not torch.equal(ops.quantize(x, sets[which]), expected[which]):
                failures.append(which)
            short = palette(100 + offset)  # comes and goes
            if not torch.equal(ops.quantize(x[:5], short), reference.quantize(x[:5], short)):
                failures.append(-1)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 1 <= len(tables) <= colour_table.MAX_TABLES


def test_compiles_and_keeps_its_tables(tables: colour_table.ColourTables, emulation: Implementation) -> None:
    clusters, x = palette(0), pixels(2 * PIXELS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: ops.quantize(a, b) + 1, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(x, clusters), reference.quantize(x, clusters) + 1)


@pytest.mark.gpu
def test_on_a_gpu_all_ways_agree() -> None:
    """A table is built at its real price; in a captured graph, and on another stream, the tokens are the same."""
    colour_table.tables.clear()
    clusters = (torch.rand(512, 3) * 2 - 1).cuda()
    x = torch.randint(0, 256, (2_000_003, 3), dtype=torch.uint8).cuda()
    small = x[: 1 << 16].contiguous()
    compared = ops.quantize(small, clusters)
    assert len(colour_table.tables) == 0
    looked_up = ops.quantize(x, clusters)
    assert len(colour_table.tables) == 1
    assert torch.equal(looked_up[: 1 << 16], compared)
    assert torch.equal(looked_up[:5000].cpu(), reference.quantize(x[:5000].cpu(), clusters.cpu()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = ops.quantize(x, clusters)
    stream.synchronize()
    assert torch.equal(elsewhere, looked_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize(small, clusters)
    clusters.neg_()
    graph.replay()
    assert torch.equal(captured[:5000].cpu(), reference.quantize(small[:5000].cpu(), clusters.cpu()))
    del clusters
    gc.collect()
    assert len(colour_table.tables) == 0

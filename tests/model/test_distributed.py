"""FSDP, DDP, recomputed activations and tensor parallelism, in two processes: see run_distributed.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import run_distributed
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils import _pytree

from igpt_fast import DynamicCache, ImageGPTConfig, ImageGPTModel
from igpt_fast.model.layers import ImageGPTBlock

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    meeting = tmp_path_factory.mktemp("distributed") / "meeting"
    program = run_distributed.__file__
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(rank), meeting],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("way", run_distributed.WAYS)
def test_as_one_process(results: list[dict[str, Any]], way: str) -> None:
    assert [result[way] for result in results] == [True, True]


def test_the_cache_is_no_dataclass_and_a_pytree() -> None:
    """FSDP copies dataclasses on their way into a module."""
    cache = DynamicCache([torch.ones(1)], [torch.zeros(1)])
    assert not hasattr(cache, "__dataclass_fields__")
    paths, tree = _pytree.tree_flatten_with_path(cache)
    assert [_pytree.keystr(path) for path, _ in paths] == [".keys[0]", ".values[0]"]
    twin = _pytree.tree_unflatten([leaf for _, leaf in paths], _pytree.treespec_loads(_pytree.treespec_dumps(tree)))
    assert isinstance(twin, DynamicCache)
    assert (twin.keys, twin.values) == (cache.keys, cache.values)


def test_recomputed_blocks_and_a_cache_that_was_given() -> None:
    """In the backward a block would take its own positions for those before it."""
    model = ImageGPTModel(ImageGPTConfig(n_layer=1, n_positions=8, vocab_size=5, n_embd=8, n_head=1))
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, ImageGPTBlock))
    ids = torch.tensor([[4, 1, 2]])
    out = model(ids, past_key_values=model(ids).past_key_values)[0].sum()
    with pytest.raises(ValueError, match="past_key_values cannot be combined with blocks that are recomputed"):
        out.backward()

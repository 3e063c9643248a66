"""Two processes on one machine (gloo), each this program: ways of torch to share a model, against one process.

Prints a line of JSON: for each way ``true``, or what differs or fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling
from igpt_fast.model.layers import ImageGPTBlock

BF16 = torch.bfloat16
SIZES = {"n_layer": 2, "n_positions": 12, "vocab_size": 10, "n_embd": 32, "n_head": 2}  # 9 logits: 5 and 4
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make() -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(ImageGPTConfig(**SIZES, **NO_DROPOUT))


def sharded(model: Any, dtype: torch.dtype | None = None) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in model.transformer.h:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def fully_sharded(model: Any, **options: Any) -> Any:
    wrap = ModuleWrapPolicy({ImageGPTBlock})
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=cpu, use_orig_params=True, **options)


def checkpointed(model: Any, how: CheckpointImpl) -> Any:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=how),
        check_fn=lambda module: isinstance(module, ImageGPTBlock),
    )
    return model


def parallel_head(**options: Any) -> Any:
    model = make()
    parallelize_module(model.lm_head, init_device_mesh("cpu", (2,)), ColwiseParallel(**options))
    return model


IDS = torch.randint(9, (2, 8), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, steps: int = 1) -> tuple[Tensor, float]:
    """A loss and the gradients' norm, of the last of several steps that change nothing."""
    for _ in range(steps):
        model.zero_grad()
        out = model(IDS, labels=IDS)
        assert out.past_key_values is None or len(out.past_key_values) == 2, "the cache lost a layer"
        out.loss.backward()
    return out.loss.detach(), norm(model)


def norm(model: nn.Module) -> float:
    """Of all gradients, of which FSDP1 leaves each process a part and others a whole."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        total = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
        dist.all_reduce(total)
        return float(total.sqrt())
    each = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.grad is not None]
    return float(sum(gradient.double().square().sum() for gradient in each).sqrt())


def agrees(model: nn.Module, low: bool = False, steps: int = 1) -> bool:
    want, found = step(make()), step(model, steps)
    torch.testing.assert_close(found[0].float(), want[0], **({"atol": 0.02, "rtol": 0.02} if low else {}))
    assert abs(found[1] - want[1]) <= (0.05 if low else 1e-4) * want[1], (found[1], want[1])
    return True


def draws_the_same(model: Any) -> bool:
    want = make().eval().generate(IDS[:, :3], do_sample=True, seed=3)
    found = model.eval().generate(IDS[:, :3], do_sample=True, seed=3)
    assert torch.equal(found, want), "other tokens"
    return True


def has_the_same_features() -> bool:
    """And gradients, the norm's among them that stands in a block which does not run."""
    one, model = make(), sharded(make())
    register_fsdp_forward_method(model, "forward_intermediates")
    (want,), (found,) = (m.forward_intermediates(IDS, [0]) for m in (one, model))
    torch.testing.assert_close(found, want)
    norms = []
    for features, m in ((want, one), (found, model)):
        features.square().sum().backward()
        norms.append(norm(m))
    assert abs(norms[1] - norms[0]) <= 1e-4 * norms[0], norms
    return model.transformer.h[1].ln_1.weight.grad is not None


def drawn_whole() -> bool:
    model = fully_sharded(make()).eval()
    with pytest.raises(RuntimeError, match="summon_full_params"):
        model.generate(IDS[:, :3])
    with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
        return draws_the_same(model)


def autocast() -> bool:
    model = DistributedDataParallel(make(), static_graph=True)
    with torch.autocast("cpu", BF16):
        return agrees(model, low=True, steps=2)


WAYS: dict[str, Callable[[], bool]] = {
    "fsdp1": lambda: agrees(fully_sharded(make())),
    "fsdp1_bf16": lambda: agrees(fully_sharded(make(), mixed_precision=MixedPrecision(param_dtype=BF16)), low=True),
    "fsdp2": lambda: agrees(sharded(make())),
    "fsdp2_bf16": lambda: agrees(sharded(make(), BF16), low=True),
    "ddp_static_graph": lambda: agrees(DistributedDataParallel(make(), static_graph=True), steps=2),
    "ddp_static_graph_autocast": autocast,
    "fsdp1_checkpointed": lambda: agrees(checkpointed(fully_sharded(make()), CheckpointImpl.NO_REENTRANT)),
    "fsdp1_checkpointed_reentrant": lambda: agrees(checkpointed(fully_sharded(make()), CheckpointImpl.REENTRANT)),
    "fsdp2_checkpointed": lambda: agrees(sharded(checkpointed(make(), CheckpointImpl.NO_REENTRANT))),
    "fsdp1_generate": drawn_whole,
    "fsdp2_generate": lambda: draws_the_same(sharded(make())),
    "fsdp2_generate_blocks_alone": lambda: draws_the_same([m := make(), [fully_shard(b) for b in m.transformer.h]][0]),
    "fsdp2_features": has_the_same_features,
    "ddp_generate": lambda: draws_the_same(DistributedDataParallel(make()).module),
    "head_local": lambda: agrees(parallel_head()),
    "head_replicated": lambda: agrees(parallel_head(output_layouts=Replicate())),
    "head_dtensor": lambda: agrees(parallel_head(use_local_output=False)),
    "head_local_generate": lambda: draws_the_same(parallel_head()),
    "head_replicated_generate": lambda: draws_the_same(parallel_head(output_layouts=Replicate())),
    "head_dtensor_generate": lambda: draws_the_same(parallel_head(use_local_output=False)),
}


def main(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            results[name] = way()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

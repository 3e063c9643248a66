"""The peers' code: what somebody who knows PyTorch writes for speed, for torch.compile, OpenVINO and torchao as well.

One module, ``Expert``, serves all of them: fused projection of queries, keys and values, ``F.rms_norm``, SDPA, a static
cache. A peer reads tokens as ``igpt_fast.engines.choice.Decoder`` does: ``prefill`` and ``step``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from igpt_fast import ImageGPTForCausalImageModeling

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def compile_frozen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile at its fastest without gradients: weights as packed constants, and calls from C++."""
    import torch._inductor.config

    torch._inductor.config.freezing = True  # an option of the call does not reach the part that keeps the weights fixed
    return torch.compile(function, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})


def forced(backend: SDPBackend, function: Callable[..., Any]) -> Callable[..., Any]:
    """With one of scaled_dot_product_attention's backends alone; on the CPU, whichever there is."""

    def run(*inputs: Any) -> Any:
        with sdpa_kernel(backend if inputs[0].is_cuda else SDPBackend.MATH):
            return function(*inputs)

    return run


SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flash(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``causal`` by FlashAttention alone; on the CPU, whichever there is."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else SDPBackend.MATH):
        return causal(layer, q, k, v)


class Block(nn.Module):
    """One layer with the weights of one of ours."""

    def __init__(self, block: Any, number: int, heads: int, eps: float) -> None:
        super().__init__()
        self.number, self.heads, self.eps = number, heads, eps
        self.norm_1, self.norm_2 = (nn.Parameter(norm.weight.detach().clone()) for norm in (block.ln_1, block.ln_2))
        self.qkv, self.proj = linear(block.attn.c_attn), linear(block.attn.c_proj)
        self.fc, self.fc_proj = linear(block.mlp.c_fc), linear(block.mlp.c_proj)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(F.rms_norm(x, (width,), self.norm_1, self.eps))
        q, k, v = parts.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        x = x + self.proj(attend(self.number, q, k, v).transpose(1, 2).reshape(batch, length, width))
        inner = self.fc(F.rms_norm(x, (width,), self.norm_2, self.eps))
        return x + self.fc_proj(inner * torch.sigmoid(1.702 * inner))


def linear(layer: Any) -> nn.Linear:
    """``nn.Linear`` of a ``Conv1D``."""
    made = nn.Linear(*layer.weight.shape, device="meta")  # draws no weights that nobody reads
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    made.bias = nn.Parameter(layer.bias.detach().clone())
    return made


class Expert(nn.Module):
    """The network with the weights of ``model``: (B, T) tokens to (B, T, vocab_size - 1) logits."""

    def __init__(self, model: ImageGPTForCausalImageModeling) -> None:
        super().__init__()
        config, body = model.config, model.transformer
        self.heads, self.eps = config.n_head, config.layer_norm_epsilon
        self.wte, self.wpe, self.norm = (
            nn.Parameter(tensor.detach().clone()) for tensor in (body.wte.weight, body.wpe.weight, body.ln_f.weight)
        )
        self.head = nn.Linear(config.n_embd, config.vocab_size - 1, bias=False, device="meta")
        self.head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        self.blocks = nn.ModuleList(Block(block, i, config.n_head, self.eps) for i, block in enumerate(body.h))

    def forward(self, tokens: Tensor, where: Tensor | None = None, attend: Attend = causal) -> Tensor:
        x = F.embedding(tokens, self.wte) + (self.wpe[: tokens.shape[1]] if where is None else self.wpe[where])
        for block in self.blocks:
            x = block(x, attend)
        return self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps))


class Transformers:
    """``forward`` with a growing cache, as its ``generate`` calls it."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self.model, self.cache = model, DynamicCache()

    def prefill(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens[:, None])


def transformers_model(model: ImageGPTForCausalImageModeling) -> Any:
    """transformers' own with our weights, in their dtype."""
    import transformers

    with model.device:
        theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**model.config.to_dict()))
    theirs.load_state_dict(model.state_dict())
    if model.config.n_classes:  # as the checkpoint's generation_config.json has it: no class is drawn as a pixel
        theirs.generation_config.suppress_tokens = list(range(model.config.n_colours, model.config.vocab_size - 1))
    return theirs.to(model.dtype).train(model.training)


def transformers_nats(model: Any, tokens: Tensor) -> Tensor:
    """(B, T) nats of (B, T) tokens, as a user of transformers gets them: SOS in front, all logits, torch's loss over
    those of the colours."""
    sos = torch.full_like(tokens[:, :1], model.config.vocab_size - 1)
    logits = model(torch.cat([sos, tokens[:, :-1]], dim=1), use_cache=False).logits
    colours = model.config.vocab_size - 1 - getattr(model.config, "n_classes", 0)
    return F.cross_entropy(logits[..., :colours].float().flatten(0, 1), tokens.flatten(), reduction="none").view_as(
        tokens
    )


class ExpertDecoder:
    """``Expert`` on a static cache.

    Args:
        expert: The network.
        batch: Sequences.
        capacity: Positions of the cache.
        compiled: Steps under torch.compile, with the weights frozen into the code. It wants fixed shapes: attention
            runs over the whole cache with a mask.
    """

    def __init__(self, expert: Expert, batch: int, capacity: int, compiled: bool) -> None:
        self.expert, self.position, self.compiled = expert, 0, compiled
        shape, like = (batch, expert.heads, capacity, expert.wte.shape[1] // expert.heads), expert.wte
        self.caches = [[like.new_zeros(shape) for _ in range(2)] for _ in expert.blocks]
        self.at = torch.arange(capacity, device=like.device)
        self._step: Callable[..., Tensor] = compile_frozen(self._run) if compiled else self._run

    def _run(self, tokens: Tensor, where: Tensor, mask: Tensor | None, seen: int) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.caches[layer]
            keys.index_copy_(2, where, k)
            values.index_copy_(2, where, v)
            if mask is None:
                keys, values = keys[:, :, :seen], values[:, :, :seen]
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        return self.expert(tokens, where, attend)[:, -1]

    def restart(self) -> None:
        self.position = 0

    def prefill(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] == 1:
            return self.step(tokens[:, 0])
        where = self.at[self.position : self.position + tokens.shape[1]]
        self.position += tokens.shape[1]
        return self._run(tokens, where, self.at <= where[:, None], 0)

    def step(self, tokens: Tensor) -> Tensor:
        where = self.at[self.position : self.position + 1].clone()  # of no changing offset, which a guard would see
        self.position += 1
        if self.compiled:
            return self._step(tokens[:, None], where, self.at <= where[:, None], 0)
        return self._step(tokens[:, None], where, None, self.position)


class GptFast(ExpertDecoder):
    """``Expert`` in the form of gpt-fast: a static cache read under a mask; one compiled call a token, draw included.

    On a GPU the call is a CUDA graph (``mode="reduce-overhead"``), whose caches must lie at static addresses; elsewhere
    torch.compile traces it, in one graph, and compiles nothing.

    Args:
        expert, batch, capacity: As ``ExpertDecoder``'s.

    Source: "Accelerating Generative AI with PyTorch II: GPT, Fast", pytorch.org, 2023.
    """

    def __init__(self, expert: Expert, batch: int, capacity: int) -> None:
        from torch._dynamo import mark_static_address

        super().__init__(expert, batch, capacity, compiled=False)
        for cache in (cache for layer in self.caches for cache in layer):
            mark_static_address(cache)
        self._token = compiled(self._run_token, expert.wte.device, mode="reduce-overhead")
        self._skips = graphs_skipped()

    @property
    def path(self) -> str:
        """What a token is, now that some have been drawn."""
        if not self.expert.wte.is_cuda:
            return "one traced call a token"
        return f"one compiled call a token, {'no' if graphs_skipped() > self._skips else 'in a'} CUDA graph"

    def _run_token(self, tokens: Tensor, where: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._run(tokens, where, mask, 0)
        chances = logits.float().softmax(dim=-1)
        return (chances / torch.empty_like(chances).exponential_(1.0)).argmax(dim=-1), logits

    def token(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Reads (B,) tokens: (B,) tokens drawn, (B, K) logits, in memory that the next call writes to."""
        torch.compiler.cudagraph_mark_step_begin()
        where = self.at[self.position : self.position + 1].clone()
        self.position += 1
        return self._token(tokens[:, None].clone(), where, self.at <= where[:, None])

    def step(self, tokens: Tensor) -> Tensor:
        return self.token(tokens)[1].clone()


def compiled(function: Callable[..., Any], device: torch.device, mode: str = "default") -> Callable[..., Any]:
    """Under torch.compile, in one graph and for fixed shapes; where the device is no GPU it is traced alone."""
    how: dict[str, Any] = {"mode": mode} if device.type == "cuda" else {"backend": "eager"}
    return torch.compile(function, fullgraph=True, dynamic=False, **how)


def graphs_skipped() -> int:
    """How often Inductor has compiled something without the CUDA graph that was asked for."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


class _Stateless(nn.Module):
    """A step that is given keys and values and returns them one longer, which OpenVINO then makes a state of."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, tokens: Tensor, where: Tensor, beams: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        present: list[Tensor] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for old, new in ((past[2 * layer], k), (past[2 * layer + 1], v)):
                # OpenVINO knows a cache by this choice of beams before the new position.
                present.append(torch.cat([old.index_select(0, beams), new], 2))
            return F.scaled_dot_product_attention(q, present[-2], present[-1])

        return self.expert(tokens, where, attend)[:, -1], *present


class OpenVino:
    """OpenVINO's step with its fused attention on a cache of its own, 8 bits wide by its default below float32.

    Args:
        expert: The network, in float32.
        batch: Sequences.
        dtype: "float32", "bfloat16" (its ``INFERENCE_PRECISION_HINT``), or "int8": weights compressed by nncf.
    """

    def __init__(self, expert: Expert, batch: int, dtype: str) -> None:
        import openvino as ov

        self.expert, self.dtype, self.beams = expert, dtype, torch.arange(batch, dtype=torch.int32)
        self.position = 0
        model = _stateful(expert, batch)
        if dtype == "int8":
            import nncf

            nncf.set_log_level("ERROR")
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        self.request = compile_openvino(model, dtype).create_infer_request()
        self.tensor = ov.Tensor

    def restart(self) -> None:
        self.request.reset_state()
        self.position = 0

    def prefill(self, tokens: Tensor) -> Tensor:
        """More than one token are read by ``Expert``, whose keys and values become the state."""
        if tokens.shape[1] == 1:
            return self.step(tokens[:, 0])
        kept: dict[str, Tensor] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept[f"past_{2 * layer}"], kept[f"past_{2 * layer + 1}"] = k.detach().contiguous(), v.detach().contiguous()
            return causal(layer, q, k, v)

        logits = self.expert(tokens, None, attend)[:, -1]
        for state in self.request.query_state():
            state.state = self.tensor(kept[state.name.partition("present")[0]].numpy())
        self.position = tokens.shape[1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        where = torch.tensor([self.position])
        self.position += 1
        inputs = {"tokens": tokens[:, None].numpy(), "where": where.numpy(), "beams": self.beams.numpy()}
        return torch.from_numpy(self.request.infer(inputs)["logits"].copy())


def compile_openvino(model: Any, dtype: str) -> Any:
    """A model for this processor, as many threads as torch has."""
    import openvino as ov

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if dtype == "float32":
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    else:
        settings |= {"INFERENCE_PRECISION_HINT": "bf16"}
    return ov.Core().compile_model(model, "CPU", settings)


def _stateful(expert: Expert, batch: int) -> Any:
    """An OpenVINO model of a step whose keys and values are states, named past_i, empty at first."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    heads, count = expert.heads, 2 * len(expert.blocks)
    size = expert.wte.shape[1] // heads
    past = [torch.zeros(batch, heads, 3, size) for _ in range(count)]
    example = torch.zeros(batch, 1, dtype=torch.int64), torch.tensor([3]), torch.arange(batch, dtype=torch.int32)
    shapes = [[batch, 1], [1], [-1], *[[-1, heads, -1, size]] * count]
    model = ov.convert_model(
        _Stateless(expert), example_input=(*example, *past), input=[ov.PartialShape(shape) for shape in shapes]
    )
    names = ["tokens", "where", "beams", *(f"past_{i}" for i in range(count))]
    for name, port in zip(names, model.inputs, strict=True):
        port.get_tensor().set_names({name})
    for name, port in zip(["logits", *(f"present_{i}" for i in range(count))], model.outputs, strict=True):
        port.get_tensor().set_names({name})
    apply_make_stateful_transformation(model, {f"past_{i}": f"present_{i}" for i in range(count)})
    rows = ops.gather(ops.shape_of(model.input("tokens"), output_type="i64"), ops.constant([0]), ops.constant(0))
    shape = ops.concat([rows, ops.constant(np.array([heads, 0, size], np.int64))], axis=0)
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            op.set_arguments([ops.broadcast(ops.constant(0.0, dtype=op.get_output_element_type(0)), shape)])
    model.validate_nodes_and_infer_types()
    return model


def quantized(expert: Expert, dynamic: bool) -> Expert:
    """``expert`` itself with torchao's int8 weights: multiplied as bfloat16, or by activations quantized as well."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    quantize_(expert, Int8DynamicActivationInt8WeightConfig() if dynamic else Int8WeightOnlyConfig())
    return expert

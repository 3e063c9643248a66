"""The compiled module, as csrc/bind/ makes it; nothing but ``backend`` imports it.

It knows nothing of torch: tensors are addresses, sizes and strides. Whoever calls it has checked every argument. What
launches a kernel takes all of its fields by name (``Launch``); which they are stands in csrc/bind/cpu.cpp and cuda.cpp.
"""

from typing import Protocol

# (address, whether bf16, stride along inputs, stride along outputs)
Source = tuple[int, bool, int, int]

class Launch(Protocol):
    def __call__(self, **fields: float | bool | str | tuple[int, ...]) -> None: ...

version: str
interface: int
compiler: str
openmp: str
cuda_status: str
has_cuda: bool
activations: dict[str, int]
by_amd: bool
most_draft_rows: int

# ---- What runs ---------------------------------------------------------------------------------------------------

def cpu_limits(root: str = "") -> tuple[int, float]: ...
def cpu_given_way() -> int: ...
def cpu_isas() -> list[tuple[str, bool]]: ...
def cpu_isa() -> str: ...
def cpu_bf16_products() -> bool: ...
def select_cpu_isa(name: str, /) -> bool: ...
def checksums(blocks: list[tuple[int, int]], threads: int, /) -> list[int]: ...
def crc32c(address: int, size: int, before: int, /) -> int: ...

class GivingWay:
    def __init__(self) -> None: ...
    @property
    def halvings(self) -> int: ...
    @property
    def next(self) -> int: ...
    def begin(self, time: int) -> None: ...
    def look(self, time: int, contended: bool) -> None: ...

# ---- The decoder and the forward pass of the CPU -----------------------------------------------------------------

class DecoderWeights:
    def __init__(
        self,
        *,
        layers: int,
        embd: int,
        heads: int,
        inner: int,
        positions: int,
        vocab: int,
        eps: float,
        activation: int,
        format: int,
    ) -> None: ...
    def set_tables(self, *, wte: int, wpe: int, norm: int, head: Source, threads: int) -> None: ...
    def set_layer(
        self,
        *,
        layer: int,
        ln_1: int,
        ln_2: int,
        qkv_weight: Source,
        qkv_bias: int,
        out_weight: Source,
        out_bias: int,
        fc_weight: Source,
        fc_bias: int,
        proj_weight: Source,
        proj_bias: int,
        scale: float,
        threads: int,
    ) -> None: ...

class Decoder:
    def __init__(self, weights: DecoderWeights, batch: int, capacity: int, /) -> None: ...
    def step(self, tokens: int, logits: int, threads: int, /) -> None: ...
    def step_rows(self, tokens: int, count: int, logits: int, threads: int, /) -> None: ...
    def load(self, layer: int, keys: int, values: int, count: int, threads: int, /) -> None: ...
    def advance(self, count: int, /) -> None: ...
    def fork(self, copies: int, threads: int, /) -> None: ...
    def rewind(self, position: int, /) -> None: ...
    @property
    def rows_are_steps(self) -> bool: ...
    @property
    def position(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int]: ...
    @property
    def bytes(self) -> int: ...

class Drafts:
    def __init__(
        self,
        *,
        pixels: int,
        count: int,
        uniform: int,
        known: int,
        length: int,
        width: int,
        k: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_score: float,
    ) -> None: ...
    def learn(self, logits: int, stride: int, rows: int, tokens: int, logprobs: int, /) -> int: ...
    def following(self, tokens: int, /) -> int: ...

class Forward:
    def __init__(self, weights: DecoderWeights, /) -> None: ...
    def run(
        self,
        *,
        tokens: int,
        batch: int,
        length: int,
        last: int,
        keys: int,
        values: int,
        layers: int,
        taken: list[int],
        normed: bool,
        states: int,
        bands: int,
        means: int,
        threads: int,
    ) -> None: ...

# ---- Ops of the CPU ----------------------------------------------------------------------------------------------

activation_bwd_cpu: Launch
activation_fwd_cpu: Launch
causal_attention_bwd_cpu: Launch
causal_attention_fwd_cpu: Launch
cross_entropy_bwd_cpu: Launch
cross_entropy_fwd_cpu: Launch
dequantize_cpu: Launch
matmul_cpu: Launch
norm_bwd_cpu: Launch
norm_fwd_cpu: Launch
quantize_cpu: Launch
sample_cpu: Launch

# ---- Ops of CUDA, where has_cuda ---------------------------------------------------------------------------------

activation_bwd_cuda: Launch
activation_fwd_cuda: Launch
attention_decode_cuda: Launch
causal_attention_bwd_cuda: Launch
causal_attention_fwd_cuda: Launch
cross_entropy_bwd_cuda: Launch
cross_entropy_fwd_cuda: Launch
dequantize_cuda: Launch
gemv_cuda: Launch
norm_bwd_cuda: Launch
norm_fwd_cuda: Launch
quantize_cuda: Launch
quantize_lookup_cuda: Launch
quantize_table_cuda: Launch
sample_cuda: Launch

def make_stream(device: int, /) -> int: ...
def norm_bwd_parts(rows: int, /) -> int: ...
def activation_bwd_parts(rows: int, n: int, /) -> int: ...
def cross_entropy_parts(rows: int, /) -> int: ...
def attention_decode_splits(
    blocks: int, keys: int, device: int = 0, ring: bool = False, cluster: bool = False
) -> int: ...

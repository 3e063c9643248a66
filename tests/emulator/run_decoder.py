"""A small model draws with the CUDA decoder, kernel by kernel, without graphs: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python tests/emulator/run_decoder.py
"""

import sys
from typing import Any

import torch

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.draws import Sampling
from igpt_fast.engines.cuda.decoder import CudaDecoder
from igpt_fast.engines.cuda.options import CudaOptions

# Images, dtype, what the cache is rounded to, continuations of each, options: the fused kernels, of up to 8, 16 and 64
# rows, torch's products, in float32 too, two halves, values, and keys, of 8 bits, a primer that is shared.
CASES = (
    (3, torch.bfloat16, None, 1, {}),
    (9, torch.float16, None, 1, {}),
    (33, torch.bfloat16, None, 1, {}),
    (9, torch.float16, None, 1, {"gemv_rows": 0}),
    (9, torch.bfloat16, None, 1, {"halves": True}),
    (9, torch.bfloat16, None, 1, {"halves": True, "gemv_rows": 0}),
    (2, torch.float32, None, 1, {}),
    (3, torch.bfloat16, "fp8_values", 1, {}),
    (3, torch.bfloat16, "fp8_cache", 1, {}),
    (2, torch.bfloat16, None, 5, {}),
)
POSITIONS, PRIMER = 12, 5


@torch.no_grad()
def draw(
    device: str, rows: int, dtype: torch.dtype, rounded: str | None, copies: int, options: dict[str, Any]
) -> torch.Tensor:
    """(rows copies, POSITIONS - PRIMER) tokens."""
    torch.manual_seed(0)
    config = ImageGPTConfig(n_layer=2, n_embd=64, n_head=2, n_positions=POSITIONS, vocab_size=41)
    model = ImageGPTForCausalImageModeling(config).eval().requires_grad_(False).to(device, dtype)
    decoder = CudaDecoder(model, rows, POSITIONS, rounded, options=CudaOptions(graphs=False, **options))
    primer = torch.randint(config.n_colours, (rows, PRIMER), generator=torch.Generator().manual_seed(1))
    logits = decoder.prefill(primer.to(device)).repeat_interleave(copies, dim=0)
    decoder.fork(copies)
    streams, drawn = torch.arange(rows * copies, device=device), []
    unused = torch.zeros(rows * copies, device=device)  # numbers, which the decoder makes by itself
    for position in range(PRIMER, POSITIONS):
        token, _ = decoder.draw(logits, unused, (0, streams), Sampling(top_k=20), as_they_came=True)
        drawn.append(token)
        if position + 1 < POSITIONS:
            logits = decoder.step_drawn()
    return torch.stack(drawn, dim=1)


def main() -> int:
    reason = backend.unavailable("cuda")
    if reason is not None:
        print(f"nothing was drawn: {reason}", file=sys.stderr)
        return 3
    with backend.use_backend("auto"):
        for case in CASES:
            draw("cuda", *case)
            torch.cuda.synchronize()  # an error belongs to the case that made it
            print(*case)
    print(f"{len(CASES)} decoders drew")
    return 0


if __name__ == "__main__":
    sys.exit(main())

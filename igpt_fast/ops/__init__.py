"""The public ops: checks, choice of the implementation, and their registration with torch.

``reference.py`` defines each of them; ``backend.py`` says which implementation runs; one file here for each kernel
file of ``csrc/cuda``.
"""

from igpt_fast.ops.activation import ACTIVATIONS, activation, check_activation
from igpt_fast.ops.causal_attention import causal_attention, causal_attention_packed
from igpt_fast.ops.norm import rms_norm
from igpt_fast.ops.quantize import dequantize, quantize
from igpt_fast.ops.sample import check_sampling, sample

__all__ = [
    "ACTIVATIONS",
    "activation",
    "causal_attention",
    "causal_attention_packed",
    "check_activation",
    "check_sampling",
    "dequantize",
    "quantize",
    "rms_norm",
    "sample",
]

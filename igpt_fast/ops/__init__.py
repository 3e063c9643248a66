"""The public ops: checks, choice of the implementation, and their registration with torch.

``reference.py`` defines each of them; ``backend.py`` says which implementation runs; one file here for each kernel
file of ``csrc/cuda``.
"""

from igpt_fast.ops.activation import ACTIVATIONS, activation, check_activation
from igpt_fast.ops.attention_decode import attention_decode
from igpt_fast.ops.causal_attention import causal_attention
from igpt_fast.ops.gemv import gemv
from igpt_fast.ops.norm import rms_norm
from igpt_fast.ops.quantize import dequantize, quantize
from igpt_fast.ops.sample import check_sampling, sample

__all__ = [
    "ACTIVATIONS",
    "activation",
    "attention_decode",
    "causal_attention",
    "check_activation",
    "check_sampling",
    "dequantize",
    "gemv",
    "quantize",
    "rms_norm",
    "sample",
]

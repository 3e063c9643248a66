"""The public ops: checks, choice of the implementation, and their registration with torch.

``reference.py`` defines each of them; ``backend.py`` says which implementation runs. One file here for each kernel file
of ``csrc/cuda``: ``norm``, ``activation``, ``cross_entropy``, ``causal_attention``, ``attention_decode``, ``gemv``,
``sample`` (with ``sample_step``, which draws in place), ``quantize`` (with ``colour_table``, which it asks); and
``linear``, whose kernel is one of the CPU's alone; ``dispatch`` is what they share.
May use: reference, backend, draws.
"""

from igpt_fast.ops.activation import ACTIVATIONS, activation, check_activation, gelu_erf, gelu_tanh, quick_gelu
from igpt_fast.ops.attention_decode import attention_decode
from igpt_fast.ops.causal_attention import causal_attention, causal_attention_packed, full_attention
from igpt_fast.ops.cross_entropy import cross_entropy
from igpt_fast.ops.gemv import gemv
from igpt_fast.ops.linear import linear
from igpt_fast.ops.norm import layer_norm, rms_norm
from igpt_fast.ops.quantize import dequantize, quantize
from igpt_fast.ops.sample import check_sampling, sample, sample_next
from igpt_fast.ops.sample import draw as draw
from igpt_fast.ops.sample import draw_scored as draw_scored
from igpt_fast.ops.sample import sampling_numbers as sampling_numbers
from igpt_fast.ops.sample_step import sample_settings as sample_settings
from igpt_fast.ops.sample_step import sample_step

__all__ = [
    "ACTIVATIONS",
    "activation",
    "attention_decode",
    "causal_attention",
    "causal_attention_packed",
    "check_activation",
    "check_sampling",
    "cross_entropy",
    "dequantize",
    "full_attention",
    "gelu_erf",
    "gelu_tanh",
    "gemv",
    "layer_norm",
    "linear",
    "quantize",
    "quick_gelu",
    "rms_norm",
    "sample",
    "sample_next",
    "sample_step",
]

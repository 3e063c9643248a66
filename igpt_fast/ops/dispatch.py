"""What the ops share: torch's registry, the choice between a kernel and the reference, checks.

An op with a kernel is a public function and one or more registered ops, ``torch.ops.igpt_fast.<name>``. The public
function checks its arguments and asks ``use_kernel``; the registered op is the kernel and nothing else, with its own
backward, so that a gradient takes the way that its forward took. Where no kernel runs, the public function evaluates
``reference.py`` in the open, and torch differentiates, compiles and transforms that as any other expression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import _C, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext

from igpt_fast import backend
from igpt_fast.reference import WITHOUT_FLOAT64 as WITHOUT_FLOAT64

# FRAGMENT: other modules and packages may add to the namespace; the library lives as long as this module.
library = torch.library.Library("igpt_fast", "FRAGMENT")

# As csrc/cuda/ops.h numbers them, and csrc/cpu/format.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CPU_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_NARROW = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
ACTIVATION_NUMBERS = {None: -1, "quick_gelu": 0, "gelu_tanh": 1, "gelu_erf": 2}
HEAD_DIMS = (32, 64, 96, 128)  # that attention's kernels take
# Of scores: a normal float32, for smaller ones are flushed to zero. Hidden scores are minus infinity, of which 0 times
# makes NaN, and a negative number the largest.
LEAST_SCALE = 2.0**-126


Function = Callable[..., Any]


def register(
    schema: str,
    implementation: Function,
    fake: Function,
    backward: tuple[Function, Function] | None = None,
    *,
    check: Function,
) -> None:
    """Registers an op whose implementation launches a kernel.

    Args:
        schema: ``"name(Tensor x, ...) -> ..."``.
        implementation: Called with tensors that have memory; it asks ``native_kernels`` whose.
        fake: Gives shapes, strides, dtypes and devices alone.
        backward: (setup_context, backward) as ``torch.library.register_autograd`` takes them.
        check: Raises for arguments of ``implementation`` that no kernel takes, and that would have it read or write
            where it may not: whoever calls ``torch.ops.igpt_fast.<name>`` comes past the public function's checks.
    """

    name = schema[: schema.index("(")]
    library.define(schema)
    parameters = getattr(torch.ops.igpt_fast, name).default._schema.arguments
    wanted = [(i, p.name) for i, p in enumerate(parameters) if isinstance(p.type, _C.TensorType)]

    def checked(*arguments: Any) -> Any:
        for i, parameter in wanted:
            if arguments[i] is None:  # torch lets an undefined tensor pass for one
                raise TypeError(f"{name}: {parameter} is None; want a tensor")
        check(*arguments)
        return implementation(*arguments)

    for key in ("CPU", "CUDA"):
        library.impl(name, checked, key)
    torch.library.register_fake(f"igpt_fast::{name}", fake, lib=library)
    if backward is not None:
        setup_context, formula = backward
        torch.library.register_autograd(f"igpt_fast::{name}", formula, setup_context=setup_context, lib=library)


def _transforming() -> bool:
    """Whether torch.func or a forward-mode derivative looks at what runs now."""
    return _C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _derivatives() -> int | None:
    """Levels of derivatives by torch.func that look at what runs now, forward-mode as two; ``None``: no transform."""
    if not _transforming():
        return None
    levels = _C._functorch.get_interpreter_stack() or ()
    grads = sum(level.key() == _C._functorch.TransformType.Grad for level in levels)
    return grads + 2 * (torch.autograd.forward_ad._current_level >= 0)


def derivatives_of_transforms(*tensors: Tensor) -> bool:
    """Whether transforms may ask for more than a first backward of tensors, which is all that fused attention has.

    What a transform has differentiated is differentiated again where another one, or autograd, looks at the result.
    """
    levels = _derivatives()
    if levels is None or torch.compiler.is_compiling():
        return bool(levels)
    return levels > 1 or any(_unwrapped(tensor).requires_grad for tensor in tensors)


def _unwrapped(tensor: Tensor) -> Tensor:
    while _C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _C._functorch.get_unwrapped(tensor)
    return tensor


def decomposes(op: str) -> bool:
    """Whether torch.compile sees the definition of an op that has a kernel.

    Norms, activations and the loss are bound by bytes: in one kernel with the residual additions, biases and casts
    beside them, which Inductor makes of their definitions, they move fewer. On a CPU as well. Attention stays a call.
    """
    return backend.OPS[op].fuses and backend.get_compiled_ops() == "plain"


def _choice_when_traced(op: str, device: torch.device) -> str | None:
    """A compiled function keeps the choice that held when it was traced.

    The transforms inside it are on torch's own stack while it is traced.
    """
    chosen = backend.kernels(op, device)
    return None if chosen is None or _transforming() or decomposes(op) else chosen.kind


# What torch.compiler.assume_constant_result does, which would load the compiler: 80 MB and seconds.
_choice_when_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
_derivatives._dynamo_marked_constant = True  # type: ignore[attr-defined]
backend.no_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def surely(little: bool) -> bool:
    """Whether a size is below what a kernel serves.

    A size that a traced graph leaves open may be any: the kernel serves it, and no guard asks for another graph.
    """
    if not torch.compiler.is_compiling():
        return little
    from torch.fx.experimental import symbolic_shapes  # a compiler has loaded it

    # Up to torch 2.7 compilers do not know the function, nor is its neighbour there: a guard.
    known = hasattr(symbolic_shapes, "has_static_value")
    return symbolic_shapes.statically_known_true(little) if known else little


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace writes down what runs, for where this package is not.

    They get the definitions: ops of torch's own, for every size.
    """
    # Not is_exporting(), which torch 2.8's Dynamo takes for true wherever it compiles. Torch 2.6 has neither.
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag or _C._get_tracing_state() is not None


def eager() -> bool:
    """Whether nothing compiles, exports or transforms what runs now."""
    return not (torch.compiler.is_compiling() or exporting() or _transforming())


def kernel_kind(op: str, *tensors: Tensor) -> str | None:
    """Whose kernel of ``op`` shall serve the tensors, if it covers them: ``"cuda"``, ``"cpu"`` or ``None``.

    None for transforms of torch.func, forward-mode derivatives, exports, subclasses of Tensor and other layouts, and on
    the CPU for little work: the reference serves those.

    Raises:
        BackendUnavailableError: The chosen backend does not serve the device.
    """
    device = tensors[0].device
    if torch.compiler.is_compiling():
        kind = _choice_when_traced(op, device)
        if kind is None or exporting():
            return None
        return None if kind == "cpu" and surely(tensors[0].numel() < backend.OPS[op].least_cpu) else kind
    chosen = backend.kernels(op, device)
    if chosen is None or _transforming() or _C._get_tracing_state() is not None:
        return None
    if chosen.kind == "cpu" and tensors[0].numel() < backend.OPS[op].least_cpu:
        return None
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
            return None
    return chosen.kind


def use_kernel(op: str, *tensors: Tensor) -> bool:
    """``kernel_kind`` of an op that has a CUDA kernel alone: whether it shall serve tensors that it covers."""
    return kernel_kind(op, *tensors) == "cuda"


def native_kernels(op: str, tensor: Tensor) -> backend.Kernels:
    """The kernels for a registered op's implementation, which has come here because ``kernel_kind`` said so.

    A graph that was compiled where they were may run where they are not.

    Raises:
        BackendUnavailableError: They are not there.
    """
    chosen = backend.kernels(op, tensor.device, forced=True)
    assert chosen is not None
    return chosen


def differentiate(function: Function, inputs: tuple[Any, ...], *upstream: Tensor) -> list[Tensor | None]:
    """The gradient by each input, or ``None``, by torch from the definition, as a graph of its own.

    For a backward that is to be differentiated again (``create_graph=True``): torch runs it with gradients enabled. A
    kernel's backward has no derivative, and torch would give zeros in its place with no more than a warning.
    """
    wanted = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
    # Views, so that a tensor which is there twice, as queries and as keys, has a gradient for each place.
    places = [value.view_as(value) if i in wanted else value for i, value in enumerate(inputs)]
    found = torch.autograd.grad(
        function(*places), [places[i] for i in wanted], upstream, create_graph=True, allow_unused=True
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def native_kind(tensor: Tensor) -> str:
    """Of the kernels that ``native_kernels`` gives, at a tenth of its time."""
    return "cpu" if tensor.is_cpu and backend._emulated is None else "cuda"


def check_covered(op: str, covered: bool, x: Tensor) -> None:
    """Raises ValueError unless a registered op's kernel takes a tensor."""
    if not covered:
        raise ValueError(f"{op}: no kernel takes {x.dtype} of shape {tuple(x.shape)} as given; see igpt_fast.ops.{op}")


def check_operand(
    op: str, name: str, tensor: Tensor | None, x: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> None:
    """Raises unless a registered op's further tensor, if it is there, is what a kernel takes it for, beside ``x``."""
    if tensor is None:
        return
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}; want {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; want {tuple(shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, others on {x.device}; want one device")


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of numbers of a dtype are made in it on a device; else in float32: ``backend.no_products``."""
    return backend.no_products(dtype, device) is None


def widened(x: Tensor) -> torch.dtype | None:
    """What products of ``x`` are rounded to, which are computed in float32 here; ``None`` where they are as they are.
    Not where a graph is written down that runs elsewhere.
    """
    narrow = autocast_dtype(x)
    left = narrow not in _NARROW or multiplies(narrow, x.device) or exporting()
    return None if left else narrow


def product(function: Function, *operands: Tensor | None, **keywords: Any) -> Any:
    """``function(*operands, **keywords)``, a tensor or a tuple of some, computed in float32 and rounded once where the
    first operand is ``widened``. Not for operands that are no plain tensors or of several dtypes without autocast,
    which is ``function``'s to refuse.
    """
    first = operands[0]
    assert first is not None
    narrow = widened(first)
    if narrow is None:
        return function(*operands, **keywords)
    given = [tensor for tensor in operands if tensor is not None]
    if any(type(tensor) not in _PLAIN for tensor in given):
        return function(*operands, **keywords)
    casting = torch.is_autocast_enabled(first.device.type)
    if not casting and any(tensor.dtype != first.dtype for tensor in given):
        return function(*operands, **keywords)
    with torch.autocast(first.device.type, enabled=False):
        wide = (None if tensor is None else tensor.float() for tensor in operands)
        result = function(*wide, **keywords)
    if not isinstance(result, tuple):
        return result.to(narrow)
    # The softmax is no product: of the operands' dtype, whatever autocast makes of these.
    return result[0].to(narrow), *(part.to(first.dtype) for part in result[1:])


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def dense(tensor: MaybeTensor) -> MaybeTensor:
    """The tensor as a kernel takes it: contiguous, 16-byte aligned; itself where it is that already, or none."""
    if tensor is None:
        return tensor
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def observed() -> bool:
    """Whether a mode of torch's looks at every operation; that of a default device, ``with torch.device(...)``, looks
    at those alone that make a tensor and name none."""
    if _C._len_torch_dispatch_stack():
        return True
    functions = torch.overrides._get_current_function_mode_stack() if _C._len_torch_function_stack() else ()
    return any(type(mode) is not DeviceContext for mode in functions)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing of torch's machinery has to see a call: eager, no mode, no transform, no subclass, no grad.

    Skipping the dispatcher saves about 4 microseconds of 6. A meta or fake tensor is not plain.
    """
    if torch.compiler.is_compiling() or observed():
        return False
    if _C._functorch.peek_interpreter_stack() is not None or _C._get_tracing_state() is not None:
        return False
    needs_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if (needs_grad and tensor.requires_grad) or tensor.is_nested or tensor.layout != torch.strided:
            return False
        if tensor.is_neg():  # its memory holds the negated values, which only the dispatcher resolves
            return False
    return True


def check_floating(op: str, **tensors: Tensor) -> None:
    """All are floating-point tensors on one device."""
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} is {got}; want a floating-point tensor")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, others on {first.device}; want one device")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What autocast, where it is on, makes of the input of a product; fp64 it leaves alone."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)

"""What the benchmarks of whole networks on a GPU share: their cases, and how their candidates are checked and timed.

A candidate is a call. Its result is checked against what is right before it is timed; then those of a case take turns,
while the memory has room for all of them, else one is measured after the other. ``Case.path`` says whose kernels ran.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import common
import peers
import torch
from bench_model import NO_DROPOUT, flops, weights
from torch import Tensor

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.config import PRESETS

NAMES = ("part", "work", "model", "batch", "name")  # by which a row is known
COLUMNS = (
    "part",
    "work",
    "model",
    "batch",
    "name",
    "path",
    "ms",
    "ms_spread",
    "img_s",
    "tflop_s",
    "of_ceiling",
    "memory_gib",
)
COLUMNS += ("times_hf", "times_peer", "interleaved", "off", "prepared_s", "error")
OURS, SUFFIX = "igpt_fast", ", compiled"
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 36, "vocab_size": 41}
MODELS: dict[str, dict[str, Any]] = {name: PRESETS[name.lower()] for name in ("S", "M", "L")}
MODELS["bundled"] = {"n_layer": 8, "n_embd": 192, "n_head": 3, "n_positions": 256, "vocab_size": 513}
DTYPE = torch.bfloat16
BYTES = {"training": 16, "loop": 16}  # of a parameter: its value, gradient and moments in float32; else of DTYPE
ROOM = 0.65  # of the memory, for all candidates' parameters; the rest is for one's activations


@dataclass(frozen=True)
class Work:
    """What candidates do.

    Attributes:
        make: (case, candidate's name) -> the call.
        right: case -> what is right.
        check: (call, what is right) -> errors; raises Refused.
        passes: Forward passes that its multiplications are worth.
        learns: Whether candidates compute gradients.
    """

    make: Callable[..., Any]
    right: Callable[..., Any]
    check: Callable[..., dict[str, float]]
    passes: float = 1.0
    learns: bool = False


@dataclass(frozen=True)
class Case:
    """A work at one size, on a device, in one part of a program: what everybody's result is compared with, and how."""

    part: str
    work: str
    model: str
    batch: int
    config: ImageGPTConfig
    device: torch.device

    @property
    def row(self) -> dict[str, Any]:
        return {"part": self.part, "work": self.work, "model": self.model, "batch": self.batch}

    @functools.cached_property
    def tokens(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        shape = self.batch, self.config.n_positions
        return torch.randint(self.config.n_colours, shape, generator=generator, device=self.device)

    @property
    def some(self) -> Tensor:
        """An eighth of the images, which what is right in float32 is computed of."""
        return self.tokens[: max(1, self.batch // 8)]

    def make(self, dtype: torch.dtype) -> ImageGPTForCausalImageModeling:
        """In bfloat16 the weights of float32, rounded."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return ImageGPTForCausalImageModeling(self.config).eval().requires_grad_(False).to(dtype)

    def backend(self, name: str) -> str:
        """The backend under which a candidate runs: of ours on a GPU the one that raises where the kernels are not."""
        return "cuda" if name.startswith(OURS) and self.device.type == "cuda" else "auto"

    def path(self, name: str) -> str:
        """Whose kernels a candidate runs."""
        with backend.use_backend(self.backend(name)):
            kernels = backend.kernels("rms_norm", self.device) if name.startswith(OURS) else None
        return "PyTorch" if kernels is None else f"{kernels.kind} kernels"

    def compiled(self, function: Callable[..., Any], name: str, mode: str = "default") -> Callable[..., Any]:
        return peers.compiled(function, self.device, mode) if SUFFIX in name else function

    def fit(self, count: int) -> bool:
        """Whether so many candidates have room together."""
        if self.device.type != "cuda":
            return True
        bytes_each = BYTES.get(self.work, DTYPE.itemsize) * weights(self.config)
        return count * bytes_each <= ROOM * torch.cuda.get_device_properties(self.device).total_memory


def transformers_model(model: ImageGPTForCausalImageModeling) -> Any:
    if not common.installed("transformers"):
        raise ModuleNotFoundError("transformers is not installed")
    return peers.transformers_model(model)


def close(got: Tensor, right: tuple[Tensor, float], what: str) -> dict[str, float]:
    """``off``: the relative error of the first images; raises Refused where it is above the limit."""
    want, limit = right
    off = common.relative_error(got[: len(want)], want)
    if not off <= limit:
        raise common.Refused(f"its {what} are off by {off:.2e}; want {limit:.2e} at most")
    return {"off": off}


def limit_of(plain: Tensor, want: Tensor) -> float:
    """How far a result may be: twice as far as the plain expression in DTYPE, and one unit of rounding."""
    return 2 * common.relative_error(plain, want) + torch.finfo(DTYPE).eps


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def tidy(device: torch.device) -> None:
    """Gives back the memory of the one before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Bench:
    """The rows of a run.

    Args:
        works: Name -> what is done.
        rows: Where they go.
        turns: Of each candidate.
        seconds: That a turn lasts about.
        ceiling: TFLOP/s of a large product in bfloat16, measured; ``None``: not.
    """

    def __init__(
        self, works: Mapping[str, Work], rows: common.Rows, turns: int, seconds: float, ceiling: float | None
    ) -> None:
        self.works, self.rows, self.turns, self.seconds, self.ceiling = works, rows, turns, seconds, ceiling

    def run(self, case: Case, names: tuple[str, ...]) -> None:
        """The rows of some of the candidates."""
        shared = case.row | {"name": f"{OURS} and others"}  # where what is right cannot be computed
        makers = [name for name in names if not self.rows.has(case.row | {"name": name})]
        if not makers or self.rows.has(shared):
            return
        work = self.works[case.work]
        torch.compiler.reset()  # the case before; the next one would count as one more recompilation
        with torch.enable_grad() if work.learns else torch.no_grad():
            common.say(f"{case.work}: {case.model}, batch {case.batch}; what is right")
            right = self.rows.attempt(shared, lambda: work.right(case))
            together = case.fit(len(makers))
            ready: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {}
            for name in makers if right is not None else ():
                tidy(case.device)
                common.say(f"{case.work}: {case.model}, batch {case.batch}; {name}")
                found = self._attempt(case, name, functools.partial(self._prepare, case, name, right))
                if found is not None:
                    ready[name] = found[0], found[1] | {"interleaved": together}
                if not together:
                    self._measure(case, ready)
                    ready.clear()
                del found
            self._measure(case, ready)
        tidy(case.device)

    def _attempt(self, case: Case, name: str, run: Callable[[], Any]) -> Any:
        with backend.use_backend(case.backend(name)):
            return self.rows.attempt(case.row | {"name": name}, run)

    def _prepare(self, case: Case, name: str, right: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The call, warm, and what is known of it."""
        work, before = self.works[case.work], allocated(case.device)
        start, call = time.perf_counter(), work.make(case, name)
        found = {"path": case.path(name)} | work.check(call, right)
        found["prepared_s"] = round(time.perf_counter() - start, 2)
        if case.device.type == "cuda":  # that of making and checking it is none of the pass's
            torch.cuda.reset_peak_memory_stats(case.device)
        _seconds(case, call, 2)  # allocates, and makes the optimizer's state
        if case.device.type == "cuda":
            found["memory_gib"] = (torch.cuda.max_memory_allocated(case.device) - before) / 2**30
        return call, found | {"calls": max(1, min(100, round(self.seconds / _seconds(case, call, 1))))}

    def _measure(self, case: Case, ready: dict[str, tuple[Callable[[], Any], dict[str, Any]]]) -> None:
        failed: set[str] = set()

        def turn(name: str) -> None:
            call, known = ready[name]
            if name not in failed and self._attempt(case, name, lambda: _seconds(case, call, known["calls"])) is None:
                failed.add(name)

        times = common.interleave({name: functools.partial(turn, name) for name in ready}, self.turns, warm=True)
        for name in (name for name in ready if name not in failed):
            _, known = ready[name]
            calls = known.pop("calls")
            spent = {key: times[name][key] / calls for key in ("ms", "ms_spread")}
            self.rows.add(case.row | {"name": name} | known | spent | self._rates(case, name, spent["ms"]))

    def _rates(self, case: Case, name: str, ms: float) -> dict[str, float]:
        """Images and multiplications a second, and how many times faster than the others."""
        tflop_s = self.works[case.work].passes * flops(case.config, case.batch) / ms / 1e9
        found = {"img_s": 1e3 * case.batch / ms, "tflop_s": tflop_s}
        if self.ceiling:
            found["of_ceiling"] = tflop_s / self.ceiling
        others = {r["name"]: r["ms"] for r in self.rows.rows if case.row.items() <= r.items() and "ms" in r}
        if "transformers" in others:
            found["times_hf"] = others.pop("transformers") / ms
        rivals = [other for rival, other in others.items() if not rival.startswith(OURS)]
        if rivals and name.startswith(OURS):
            found["times_peer"] = min(rivals) / ms
        return found


def _seconds(case: Case, call: Callable[[], Any], count: int) -> float:
    """Of some calls, the device's work included."""

    def wait() -> None:
        if case.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - begun


def program(
    description: str | None,
    works: Mapping[str, Work],
    parts: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]],
    batches: Mapping[str, Mapping[str, int]],
) -> int:
    """The program of a script.

    Args:
        description: For ``--help``.
        works: Name -> what is done.
        parts: Part of ``--only`` -> (works, candidates), the strongest rivals before ours.
        batches: Work -> model -> images of a batch.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = common.device_options(parser, tuple(parts))
    device = torch.device(options.device)
    ceiling = tensor_ceiling(device) if device.type == "cuda" else None
    rows = common.Rows(options.json, NAMES, options.resume, tensor_tflop_s=ceiling)
    models = {name: ImageGPTConfig(**sizes, **NO_DROPOUT) for name, sizes in MODELS.items()}
    bench = Bench(works, rows, 5, 0.3, ceiling)
    if options.quick:
        models, bench = {"tiny": ImageGPTConfig(**TINY, **NO_DROPOUT)}, Bench(works, rows, 2, 0.0, ceiling)
        batches = {work: {"tiny": 2} for work in works}
    for part in options.only:
        some, names = parts[part]
        for work in some:
            for name, batch in batches[work].items():
                bench.run(Case(part, work, name, batch, models[name], device), names)
    print(common.table(rows.rows, COLUMNS))
    return rows.status(OURS)


def tensor_ceiling(device: torch.device) -> float:
    """TFLOP/s of an 8192-cubed product in bfloat16, the best of ten."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(8192, 8192, generator=generator, device=device, dtype=DTYPE) for _ in range(2))
    best = 0.0
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.matmul(a, b)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * 8192**3 / start.elapsed_time(end) / 1e9)
    return best

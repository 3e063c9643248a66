"""A step of training that waits for nothing: the same numbers, batches that stay on the device, steps that are skipped
there, and the graph of a step."""

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igpt_fast import backend
from igpt_fast.cli import main as cli
from igpt_fast.learning import graphs, resident, stepping
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.distributed import Team
from igpt_fast.learning.finetune import Part
from igpt_fast.learning.graphs import WARM, StepGraph
from igpt_fast.learning.objectives.masked import Masked
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.objectives.protocol import Objective
from igpt_fast.learning.resident import Resident
from igpt_fast.learning.schedule import learning_rate, mix
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.learning.state import TrainState, same_run
from igpt_fast.learning.stepping import Stepper, captures, inputs_at, optimizer_for, seed
from igpt_fast.learning.train import new_model, train
from igpt_fast.learning.watch import DivergedError, Watch
from igpt_fast.likelihood.nats import image_nats
from igpt_fast.world import World

CPU = torch.device("cpu")
TINY = TrainConfig(n_layer=1, n_embd=32, n_head=2, steps=20, batch_size=4, lr=1e-3, warmup_steps=3, dropout=0.2)
KINDS = ["pixels", "classes", "masked"]


def images(vocabulary: int = 6, classes: bool = True) -> TokenData:
    tokens = torch.randint(0, vocabulary, (30, 16), generator=torch.Generator().manual_seed(1))
    clusters = np.linspace(-1, 1, 3 * vocabulary, dtype=np.float32).reshape(vocabulary, 3)
    labels = torch.arange(30) % 3 if classes else None
    return TokenData(tokens, clusters, torch.arange(30) % 5 == 0, labels=labels)


def case(kind: str) -> tuple[TokenData, Objective]:
    return images(classes=kind == "classes"), Masked() if kind == "masked" else NextPixel()


def stepper(late: bool, kind: str = "pixels", captured: bool = False) -> Stepper:
    config = TINY
    data, objective = case(kind)
    model = new_model(data, config, objective).train()
    team = Team(model, CPU, objective, config, Execution(), World())
    state = TrainState(model, optimizer_for(model, config, captured), 0, same_run(config, data, objective), "")
    made = Stepper(state, data, config, objective, team)
    made.watch.prompt = not late
    return made


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs find out about their steps as they do on a GPU: when they look, which is noted."""
    init, read, looks = Watch.__init__, Watch.read, []

    def made(watch: Watch, *arguments: Any) -> None:
        init(watch, *arguments)
        watch.prompt = False

    def noted(watch: Watch, step: int) -> tuple[float, float]:
        looks.append(step)
        return read(watch, step)

    monkeypatch.setattr(Watch, "__init__", made)
    monkeypatch.setattr(Watch, "read", noted)
    return looks


def tensors(state: TrainState) -> dict[str, Tensor]:
    counts = {f"step.{i}": moments["step"] for i, moments in enumerate(state.optimizer.state.values())}
    return {name: value.clone() for name, value in (state.tensors() | counts).items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_what_it_says(kind: str, is_late: bool) -> None:
    """Bit for bit what it is when written down plainly, with a look at each."""
    data, objective = case(kind)
    model = new_model(data, TINY, objective).train()
    optimizer = optimizer_for(model, TINY)
    ours = stepper(is_late, kind)
    for step in range(6):
        seed(mix(TINY.seed, 3, step), CPU)
        inputs = inputs_at(step, data, TINY, objective)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective.losses(model, *inputs).sum() / 4
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TINY.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, TINY)
        optimizer.step()
        ours.step()
        record = {"step": step + 1, objective.figure: loss.item(), "grad_norm": norm.item()}
        assert ours.figures(step + 1) == record | {"lr": learning_rate(step, TINY)}
    assert_same(tensors(ours.state), tensors(TrainState(model, optimizer, 6, {}, "")))


def test_a_device_has_two_steps_before_it_at_the_most() -> None:
    """So that Ctrl-C waits for no more."""
    ours, said = stepper(True), []

    def event() -> types.SimpleNamespace:
        number = ours.state.step
        note = {key: lambda key=key: said.append((key, number)) for key in ("record", "synchronize")}
        return types.SimpleNamespace(**note)

    ours._event = event  # type: ignore[assignment]
    for _ in range(5):
        ours.step()
    two = [("record", 0), ("record", 1)]
    assert said == two + [each for i in range(3) for each in (("synchronize", i), ("record", i + 2))]


class Waiting(TorchDispatchMode):
    """Fails where the host asks for a value of a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        assert not name.startswith(("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_for_no_value(kind: str) -> None:
    ours = stepper(True, kind)
    ours.step()
    with Waiting():
        ours.step()
        ours.step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Waiting():
        ours.figures(3)


@pytest.mark.parametrize("bad", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(bad: str, is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one after it; the first is named, and the state is that from before it."""
    ours = stepper(is_late)
    for _ in range(4):
        ours.step()
    before, rates = tensors(ours.state), [group["lr"] for group in ours.state.optimizer.param_groups]

    def diverging(model: Any, tokens: Tensor, *_: Any) -> Tensor:
        nats = image_nats(model, tokens)
        if bad == "gradient":
            nats.register_hook(lambda gradient: gradient * torch.nan)
            return nats
        return nats * float(bad)

    with monkeypatch.context() as patch:
        patch.setattr("igpt_fast.learning.objectives.next_pixel.image_nats", diverging)
        if is_late:
            ours.step()
    said = r"step 5: the loss is (\d\.\d+|nan|inf) and its gradient's norm (nan|inf); try a lower learning rate"
    if is_late:  # and on it goes, with steps that are finite
        ours.step()
        ours.step()
        with pytest.raises(DivergedError, match=said):
            ours.figures(7)
    else:
        monkeypatch.setattr("igpt_fast.learning.objectives.next_pixel.image_nats", diverging)
        with pytest.raises(DivergedError, match=said):
            ours.step()
    assert ours.state.step == 4
    assert [group["lr"] for group in ours.state.optimizer.param_groups] == rates
    assert_same(tensors(ours.state), before)


def test_a_run_looks_where_it_writes(late: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And has the same files as one that looks at each step."""
    config = dataclasses.replace(TINY, eval_every=9, save_every=7)
    train(images(classes=False), tmp_path / "late", config)
    assert late == [7, 9, 14, 18, 20, 20]
    monkeypatch.undo()
    train(images(classes=False), tmp_path / "prompt", config)
    states = [torch.load(tmp_path / name / "train.pt", weights_only=True) for name in ("late", "prompt")]
    assert states[0]["step"] == states[1]["step"] == 20
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    assert_same(*(state["model"] for state in states))
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("late", "prompt")]
    assert [line.split('"world_size"')[0] for line in logs[0]] == [line.split('"world_size"')[0] for line in logs[1]]


def test_a_run_ends_where_it_looks(late: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def diverging(model: Any, tokens: Tensor, *_: Any) -> Tensor:
        calls.append(model.training)
        return image_nats(model, tokens) * (torch.nan if calls.count(True) == 8 else 1.0)

    monkeypatch.setattr("igpt_fast.learning.objectives.next_pixel.image_nats", diverging)
    with pytest.raises(DivergedError, match="step 8: the loss is nan"):
        train(images(classes=False), tmp_path, dataclasses.replace(TINY, eval_every=10, save_every=6))
    assert late == [6, 10]
    assert torch.load(tmp_path / "train.pt", weights_only=True)["step"] == 6


# ---- Images on the device -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(256, torch.uint8), (257, torch.int16), (1 << 15, torch.int16), (1 << 16, torch.int32)]
)
def test_images_that_stay_on_the_device(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are as narrow as they can be, and give the same batches."""
    data = images(vocabulary)
    data.tokens[1, 0] = vocabulary - 1
    monkeypatch.setattr(resident, "_AT_ONCE", 5)
    ours = Resident(data, CPU)
    assert ours.tokens.dtype == dtype
    for objective in (NextPixel(0.5), Masked()):
        for step in range(8):
            expected = inputs_at(step, data, TINY, objective)
            for one, other in zip(inputs_at(step, ours, TINY, objective), expected, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)


def test_which_images_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bytes, of which 100 are wanted, and a quarter of others may be taken: 24 images of a byte a pixel, with labels.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * (16 + 8) * 4 + 100, 1 << 40))
    monkeypatch.setattr(resident, "Resident", lambda data, device: (data, device))
    data, gpu = images(), torch.device("cuda")
    for each in (data, Part(data, None, 0.0, 0)):
        assert resident.nearby(each, CPU, 24, 100) is each
        assert resident.nearby(each, gpu, 24, 100) == (each, gpu)
        assert resident.nearby(each, gpu, 23, 100) is each  # the run takes fewer
        assert resident.nearby(each, gpu, 24, 101) is each
    data.ready = False  # pictures have to be read first
    assert resident.nearby(data, gpu, 24, 100) is data


def test_what_a_run_says_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it will take so many from where it is, and its gradients and moments so much memory."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(stepping, "nearby", lambda data, device, *rest: (seen.append(rest), data)[1])
    ours = stepper(False)
    ours.state.step = 5
    Stepper(ours.state, ours._data, TINY, ours.objective, ours.team)
    bytes_ = 12 * sum(p.numel() for p in ours.state.model.parameters())
    assert seen == [(80, bytes_), (60, bytes_)]


# ---- The graph of a step ------------------------------------------------------------------------------------


class Graphs:
    """In place of CUDA's: a capture notes what was computed in it, and a replay computes that again. It cannot end
    where something has failed in it, but for a mistake, of which CUDA knows nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: BaseException | None = None) -> None:
        self.fails, self.inside, self.stream = fails, False, "here"
        self.ran: list[tuple[str, list[float], bool]] = []
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True)
        self.compute: Callable[[], None] = lambda: None
        self.renewed: list[torch.device] = []
        self.said: list[str] = []

        def stream(name: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(name=name, wait_stream=lambda other: None)

        fakes = {"Stream": lambda _: stream("aside"), "stream": self.entered, "graph": self.capturing}
        fakes |= {"current_stream": lambda _: stream("here"), "device": lambda _: contextlib.nullcontext()}
        fakes |= {"CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: self.compute())}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        fakes = {"graph_pool_handle": lambda: (0, 7), "empty_cache": lambda: self.said.append("empty")}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(graphs, "_renew_generator", self.renewed.append)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        for name in ("end", "release"):
            true = {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}[name]
            note = lambda _, pool, name=name: self.said.append(f"{name} {pool}")  # noqa: E731
            monkeypatch.setattr(torch._C, true, note, raising=False)
        self.step = StepGraph(self.run, self.optimizer, CPU)

    @contextlib.contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capturing(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.inside, self.stream = True, stream.name
        try:
            yield
        finally:
            self.inside, self.stream = False, "here"
            if self.fails is not None and not isinstance(self.fails, ValueError):
                raise RuntimeError("capture_end")

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        if self.inside and self.fails is not None:
            raise self.fails

        def note(how: str) -> None:
            capturable = self.optimizer.param_groups[0]["capturable"]
            self.ran.append((how, [float(tensor.sum()) for tensor in inputs], capturable))

        if self.inside:
            self.compute = lambda: note("replayed")
            assert self.optimizer.param_groups[0]["capturable"]
        else:
            note(self.stream)


@pytest.mark.parametrize("fails", [False, True])
def test_the_bookkeeping_of_a_graph(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The first steps on a stream of their own, then one capture and replays of each step's inputs; or one warning, and
    its memory is given back."""
    why = "operation not permitted when stream is capturing"
    made = Graphs(monkeypatch, RuntimeError(f"{why}\nand more") if fails else None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(WARM + 3):
            made.step((torch.full((2,), i), torch.ones(3)))
    after = ["aside" if fails else "replayed"] * 3
    assert made.ran == [(how, [2 * i, 3], False) for i, how in enumerate(["aside"] * WARM + after)]
    assert [str(warning.message).split(": ") for warning in said] == (
        [["the step could not be captured in a CUDA graph, it is launched kernel by kernel", why]] if fails else []
    )
    assert made.renewed == [CPU] * fails
    assert made.said == ["end (0, 7)", "release (0, 7)", "empty"] * fails


@pytest.mark.parametrize("fails", [ValueError("no gradient"), KeyboardInterrupt()])
def test_what_is_no_failure_of_a_capture(monkeypatch: pytest.MonkeyPatch, fails: BaseException) -> None:
    """Goes on its way, Ctrl-C also where the capture cannot end; and the generator draws."""
    made = Graphs(monkeypatch, fails)
    for _ in range(WARM):
        made.step((torch.ones(2),))
    with pytest.raises(type(fails)):
        made.step((torch.ones(2),))
    assert made.renewed == [CPU]
    assert not made.optimizer.param_groups[0]["capturable"]


class Recorded(TorchDispatchMode):
    """What a graph is to a GPU: the calls of a step with the tensors and numbers that they were given; computed again,
    each writes where it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_the_step_changes_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step is in a graph as a number that the next step has otherwise."""
    graph: list[Recorded] = []

    @contextlib.contextmanager
    def capturing(*_: Any, **__: Any) -> Iterator[None]:
        before, drawn = [value.clone() for value in whole(graphed)], torch.get_rng_state()
        with Recorded() as recorded:
            yield
        graph.append(recorded)
        torch.set_rng_state(drawn)
        with torch.no_grad():
            for value, old in zip(whole(graphed), before, strict=True):  # a capture computes nothing
                value.copy_(old)

    def whole(made: Stepper) -> list[Tensor]:
        watched = [made.watch.skip, made.watch._figures, made.watch._counted]
        counts = [moments["step"] for moments in made.state.optimizer.state.values()]
        return [*made.state.tensors().values(), *watched, *counts]

    Graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: graph[0].replay()))
    with backend.use_backend("reference"):
        plain, graphed = (stepper(True, kind, captured=True) for _ in range(2))
        plain._run = plain._compute
        for _ in range(WARM + 4):
            plain.step()
            graphed.step()
    assert len(graph) == 1
    assert plain.figures(WARM + 4) == graphed.figures(WARM + 4)
    assert_same(tensors(plain.state), tensors(graphed.state))


def test_the_learning_rate_of_a_graph_is_in_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a number in what is saved, so that any run goes on with it."""
    seen: list[tuple[int, int]] = []

    def double(compute: Callable[[Any], None], optimizer: torch.optim.Optimizer, _: object) -> Callable[[Any], None]:
        rates = [group["lr"] for group in optimizer.param_groups]

        def run(inputs: tuple[Tensor, ...]) -> None:
            seen.append((rates[0].data_ptr(), rates[1].data_ptr()))
            compute(inputs)

        return run

    data = images(classes=False)
    monkeypatch.setattr(stepping, "StepGraph", double)
    monkeypatch.setattr("igpt_fast.learning.train.captures", lambda *_: True)
    train(data, tmp_path, TINY, stop_after=7)
    assert len(seen) == 7
    assert len({pointer for both in seen for pointer in both}) == 1
    groups = torch.load(tmp_path / "train.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [type(group["lr"]) for group in groups] == [float, float]
    assert groups[0]["lr"] == pytest.approx(learning_rate(6, TINY), rel=1e-6)
    monkeypatch.undo()
    train(data, tmp_path, TINY, resume=True)


@pytest.mark.parametrize("captured", [False, True])
def test_the_learning_rate_is_the_same_number_with_a_graph_and_without(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: that of the graph is in float32. Each group's, also where they do not share it."""
    monkeypatch.setattr(stepping, "StepGraph", lambda *_: None)
    ours = stepper(True, captured=captured)
    groups = ours.state.optimizer.param_groups
    if captured:
        groups[1]["lr"] = groups[1]["lr"].clone()
        ours = Stepper(ours.state, ours._data, TINY, ours.objective, ours.team)
    ours.team.device = torch.device("cuda")
    ours._set_rate(0.1)
    assert [float(group["lr"]) for group in groups] == [float(np.float32(0.1))] * 2


def test_reduce_overhead_wants_a_gpu_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(TINY, compile=REDUCE_OVERHEAD)
    with pytest.raises(ValueError, match="compile is 'reduce-overhead', a CUDA graph of each step, and the device cpu"):
        train(images(), tmp_path / "a", config)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="compile is 'fast'; want True, False or reduce-overhead"):
        dataclasses.replace(TINY, compile="fast")
    arguments = ["train", "--compile", REDUCE_OVERHEAD, "--device", "cpu", "--out", str(tmp_path / "a")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == (
        "igpt train: --compile reduce-overhead: CUDA graphs of the steps, and --device is cpu\n"
    )
    gpu, several = torch.device("cuda"), types.SimpleNamespace(size=2)
    one, again = Execution(), Execution(checkpointing=True)
    assert captures(config, gpu, World(), one)
    assert captures(dataclasses.replace(config, dropout=0.0), gpu, World(), again)
    with pytest.raises(ValueError, match=r"reduce-overhead', with checkpointing and dropout, .*want compile True"):
        captures(config, gpu, World(), again)
    assert not captures(dataclasses.replace(TINY, compile=True), gpu, World(), again)
    with pytest.warns(RuntimeWarning, match="only for one process; goes on with torch.compile"):
        assert not captures(config, gpu, several, one)  # type: ignore[arg-type]
    assert not captures(dataclasses.replace(TINY, compile=True), gpu, several, one)  # type: ignore[arg-type]


def test_a_gpu_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch's own calls ask for; of one without, it is the current one's."""
    monkeypatch.setattr(Team, "_wrapped", lambda _: torch.nn.Module())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for name, number in (("cuda", 3), ("cuda:1", 1)):
        team = Team(torch.nn.Module(), torch.device(name), NextPixel(), TINY, Execution(), World())
        assert team.device == torch.device("cuda", number)


def test_a_run_may_go_on_by_a_graph() -> None:
    """What a run is says whether it is compiled, as it always has, and nothing of graphs."""
    how = [False, True, REDUCE_OVERHEAD]
    found = [same_run(dataclasses.replace(TINY, compile=each), images(), NextPixel())["config"]["compile"]
             for each in how]  # fmt: skip
    assert found == [False, True, True]

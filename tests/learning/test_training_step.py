"""What learns on the device, and reads off it, waits for nothing; a graph of a step changes no bit, and a step that is
not finite is skipped there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_fast.image import ImageGPTImageProcessor
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.distributed import Team
from igpt_fast.learning.extraction import collect
from igpt_fast.learning.graphs import WARM
from igpt_fast.learning.objectives.masked import Masked
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.resident import Resident
from igpt_fast.learning.settings import REDUCE_OVERHEAD, Execution, TrainConfig
from igpt_fast.learning.state import TrainState
from igpt_fast.learning.stepping import Stepper, optimizer_for
from igpt_fast.learning.train import new_model, train
from igpt_fast.learning.watch import DivergedError
from igpt_fast.likelihood import scoring
from igpt_fast.likelihood.nats import evaluating, image_nats
from igpt_fast.world import World

pytestmark = pytest.mark.gpu
CONFIG = TrainConfig(2, 64, 2, steps=100, batch_size=8, lr=1e-3, warmup_steps=3, dropout=0.2)
KINDS = ["classes", "masked", "host"]


def images(classes: bool = True) -> TokenData:
    tokens = torch.randint(0, 6, (64, 64), generator=torch.Generator().manual_seed(1))
    clusters = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
    return TokenData(tokens, clusters, torch.arange(64) % 5 == 0, labels=torch.arange(64) % 3 if classes else None)


def made(graph: bool, kind: str = "classes") -> Stepper:
    """``host``: with batches that come from there; ``compiled``: by torch.compile."""
    config = dataclasses.replace(CONFIG, compile=kind == "compiled")
    data, objective = images(kind != "masked"), Masked() if kind == "masked" else NextPixel(0.5)
    data.ready = kind != "host"
    model = new_model(data, config, objective).train()
    team = Team(model, torch.device("cuda"), objective, config, Execution(accumulate=2), World())
    stepper = Stepper(TrainState(model, optimizer_for(model, config, graph), 0, {}, ""), data, config, objective, team)
    assert isinstance(stepper._data, Resident) == data.ready
    return stepper


def tensors(stepper: Stepper) -> dict[str, torch.Tensor]:
    state = stepper.state
    counts = {f"step.{i}": moments["step"] for i, moments in enumerate(state.optimizer.state.values())}
    return {name: value.clone() for name, value in (state.tensors() | counts).items()}


def pools() -> set[tuple[int, int]]:
    """Whose memory torch's allocator holds: (0, 0) is everybody's, others are those of graphs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_does_not_wait(graph: bool, kind: str) -> None:
    """torch raises where the host would."""
    stepper = made(graph, kind)
    for _ in range(6):  # kernels, workspaces, pinned memory, and the capture
        stepper.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            stepper.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stepper.figures(16)[stepper.objective.figure] > 0.0


def test_scoring_and_features_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what they bring back, a batch behind."""
    data = images()
    model = new_model(data, CONFIG, NextPixel()).cuda()
    monkeypatch.setattr(scoring, "model_hash", lambda _: "")
    processor = ImageGPTImageProcessor(clusters=data.clusters, size={"height": 8, "width": 8})
    tokens, names = data.tokens, [str(i) for i in range(64)]
    found = []
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            scores = scoring.score_tokens(model, processor, tokens, names, data.labels, 16)
            found.append((scores.nats, torch.from_numpy(collect(model, tokens, [1, 2], batch_size=16))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    with evaluating(model), torch.inference_mode():
        parts = zip(tokens.cuda().split(16), data.labels.cuda().split(16), strict=True)
        assert torch.equal(found[0][0], torch.cat([image_nats(model, *part) for part in parts]).cpu())


@pytest.mark.parametrize("kind", [*KINDS, "compiled"])
def test_a_graph_of_the_step_changes_no_bit(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    """With dropout, whose numbers a replay draws anew."""
    records, states = [], []
    for graph in (False, True):
        stepper = made(graph, kind)
        for _ in range(12):
            stepper.step()
        records.append(stepper.figures(12))
        states.append(tensors(stepper))
    assert not [warning for warning in recwarn if "could not be captured" in str(warning.message)]
    assert records[0] == records[1]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_is_not_finite_is_skipped(graph: bool) -> None:
    stepper = made(graph)
    for _ in range(6):
        stepper.step()
    stepper.figures(6)
    weight = stepper.state.model.lm_head.weight.data
    kept = weight[0, 0].clone()
    weight[0, 0] = torch.nan
    before = tensors(stepper)
    stepper.step()
    weight[0, 0] = kept
    stepper.step()
    weight[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="step 7: the loss is nan"):
        stepper.figures(8)
    assert stepper.state.step == 6
    after = tensors(stepper)
    assert [name for name in before if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num())] == []


def test_a_capture_that_fails_leaves_a_run_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = made(True)
    see = stepper.watch.see

    def waiting(loss: torch.Tensor, norm: torch.Tensor) -> None:
        if torch.cuda.is_current_stream_capturing():
            norm.item()
        see(loss, norm)

    monkeypatch.setattr(stepper.watch, "see", waiting)
    plain = made(False)
    for _ in range(WARM):
        stepper.step()
    before = pools()
    with pytest.warns(RuntimeWarning, match="could not be captured in a CUDA graph"):
        stepper.step()
    assert pools() <= before, "what the capture allocated is given back"
    for _ in range(4):
        stepper.step()
    for _ in range(8):
        plain.step()
    assert stepper.figures(8) == plain.figures(8)


def test_a_run_on_the_device(tmp_path: Path) -> None:
    """Compiled, and as a graph of what is compiled; another run goes on without the graph."""
    found: list[dict] = []
    how = {"device": "cuda", "progress": found.append}
    config = dataclasses.replace(CONFIG, steps=12, compile=REDUCE_OVERHEAD, eval_every=6)
    train(images(), tmp_path, config, stop_after=8, **how)
    train(images(), tmp_path, dataclasses.replace(config, compile=True), resume=True, **how)
    assert [record["step"] for record in found] == [6, 12]
    assert found[-1]["nats"] < 2.0

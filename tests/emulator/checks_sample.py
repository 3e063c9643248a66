"""What sample.cu has to stand up to, through the public ops; see checks.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from checks import SCHEDULES, Counted, schedule
from drawing import assert_draws
from kernels import Kernels
from tolerance import assert_parity

from igpt_fast import backend, ops, reference
from igpt_fast.draws import Sampling

ALL = -torch.inf  # the least score that is kept, where all are
# temperature, top_k, top_p, min_p
SETTINGS: list[tuple[float, int | None, float | None, float | None]] = [
    (1.0, None, None, None),
    (0.7, None, 1.0, 0.0),
    (1.3, 5, None, None),
    (1.0, 1, None, None),
    (0.9, None, 0.8, None),
    (1.0, None, 1e-9, None),
    (1.1, 40, 0.95, None),
    (1.2, None, None, 0.05),
    (1.0, 12, 0.9, 0.3),
    (0.0, 3, 0.5, 0.5),
]


@contextmanager
def serving(kernels: Kernels) -> Iterator[None]:
    """The kernels serve the ops; that they did is made sure of by their launches."""
    if kernels.device != "cpu":
        with backend.use_backend("cuda"):
            yield
        return
    kernels.module.reset_counters()
    with backend.use_backend("auto"), backend.emulate(kernels.module):
        yield
    assert kernels.module.counters()["launches"] > 0, "no kernel ran"


def rows(n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a trained model's spread, some equal, some impossible; uniform numbers."""
    logits = torch.randn(n, k) * 2.5
    logits[:, k // 3 : k // 2] = logits[:, :1]
    logits[:, k // 2 : k // 2 + k // 16] = -torch.inf
    return logits.to(dtype), torch.rand(n)


def check_draws(kernels: Kernels, dtype: torch.dtype, n: int, k: int) -> None:
    logits, uniform = rows(n, k, dtype)
    on_device, numbers = logits.to(kernels.device), uniform.to(kernels.device)
    for settings in SETTINGS:
        with serving(kernels):
            ours = ops.sample(on_device, numbers, *settings).cpu()
        assert_draws(ours, logits, uniform, *settings)


def check_ties(kernels: Kernels) -> None:
    """Equal logits are kept by top-k together, and by top-p from the lowest id on; -0 equals 0."""
    logits = torch.zeros(64, 100)
    logits[:, 30:] = -1.0
    logits[:, ::3] = -0.0
    uniform = (torch.arange(64) + 0.5) / 64
    for settings in (
        (1.0, 7, None),
        (1.0, None, 0.103),
        (0.5, 20, 0.71),
        (1.0, None, None, 0.4),
        (0.0, None, None),
        (1e-30, None, None),
    ):
        with serving(kernels):
            ours = ops.sample(logits.to(kernels.device), uniform.to(kernels.device), *settings).cpu()
        assert torch.equal(ours, reference.sample(logits, uniform, *settings)), settings


def check_edges(kernels: Kernels) -> None:
    """Ends of the distribution and of the numbers; rows without a distribution."""
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(12, 9)
    logits[0, :] = -inf
    logits[1, 4], logits[1, 6] = -nan, nan
    logits[2, 5] = inf
    logits[3, 0], logits[3, 8] = inf, nan
    logits[4, :8] = -inf
    logits[5, 1:] = -inf
    logits[6, 7:] = -inf
    logits[7] = torch.finfo(torch.float32).min
    logits[8, 2] = torch.finfo(torch.float32).max
    almost = 1.0 - 2.0**-24
    for number in (0.0, 0.5, almost):
        uniform = torch.full((12,), number)
        for settings in (*SETTINGS, (1e-40, None, None), (1e-50, None, None), (1e30, 3, 0.5), (1.0, 8, 0.999, 1e-6)):
            with serving(kernels):
                ours = ops.sample(logits.to(kernels.device), uniform.to(kernels.device), *settings).cpu()
            assert torch.equal(ours, reference.sample(logits, uniform, *settings)), (number, settings)


def check_min_p(kernels: Kernels) -> None:
    """A probability of exactly min_p times the largest stays, the next smaller one goes; 1 keeps the largest alone."""
    for min_p in (0.5, 0.1, 1e-3):
        least = torch.tensor(reference.least_score(min_p))
        logits = torch.tensor([[float(least.nextafter(torch.tensor(-9.0))), float(least), 0.0]]).expand(3, -1)
        uniform = torch.tensor([0.0, 0.999 * min_p / (1 + min_p), 1.001 * min_p / (1 + min_p)])
        with serving(kernels):
            ours = ops.sample(logits.to(kernels.device), uniform.to(kernels.device), min_p=min_p).cpu()
        assert ours.tolist() == [1, 1, 2], min_p
    logits, uniform = torch.tensor([[2.0, 3.0, -0.0, 3.0, 2.9999]]).expand(4, -1), torch.tensor([0.0, 0.49, 0.5, 0.99])
    with serving(kernels):
        ours = ops.sample(logits.to(kernels.device), uniform.to(kernels.device), 1.0, None, None, 1.0).cpu()
    assert ours.tolist() == [1, 1, 3, 3]


def check_boundaries(kernels: Kernels) -> None:
    """Equal weights: the numbers on a boundary belong to the next token, and a K that fills no vector has an end."""
    for k in (4, 64, 512, 1024):
        uniform = torch.arange(k) / k
        with serving(kernels):
            ours = ops.sample(torch.zeros(k, k, device=kernels.device), uniform.to(kernels.device)).cpu()
        assert torch.equal(ours, torch.arange(k)), k
    for top_p, last in ((0.5, 1), (0.75, 2), (0.25, 0)):  # what stands before the third is half, which is enough
        with serving(kernels):
            ours = ops.sample(
                torch.zeros(1, 4, device=kernels.device), torch.ones(1).to(kernels.device) * 0.99, 1.0, None, top_p
            )
        assert ours.tolist() == [last], top_p
    for k in (5, 513, 1023):
        uniform = torch.full((2,), 1.0 - 2.0**-24)
        with serving(kernels):
            ours = ops.sample(torch.zeros(2, k, device=kernels.device), uniform.to(kernels.device)).cpu()
        assert ours.tolist() == [k - 1] * 2


def check_next(kernels: Kernels, dtype: torch.dtype, n_embd: int, shared_position: bool) -> None:
    """Numbers of the rows' own streams, and the next input bit for bit, zeros behind the last position."""
    n, k, n_positions, seed = 5, 77, 12, (1 << 64) - 12345
    logits, _ = rows(n, k)
    streams = torch.tensor([0, 1, (1 << 32) + 1, (1 << 62) + 77, 5])
    wte, wpe = torch.randn(k + 1, n_embd).to(dtype), torch.randn(n_positions, n_embd).to(dtype)
    position = torch.tensor(10 if shared_position else [0, 10, 11, 3, 12], dtype=torch.int32)
    uniform = reference.uniform_at(seed, streams, position)
    on_device = [t.to(kernels.device) for t in (logits, streams, position, wte, wpe)]
    for settings in ((1.0, None, None), (0.9, 20, 0.9, 0.1), (0.0, None, None)):
        with serving(kernels):
            tables = {"wte": on_device[3], "wpe": on_device[4]}
            tokens, hidden = ops.sample_next(on_device[0], seed, *on_device[1:3], *settings, **tables)
            alone, nothing = ops.sample_next(on_device[0], seed, *on_device[1:3], *settings)
        assert nothing is None
        assert_draws(tokens.cpu(), logits, uniform, *settings)
        assert torch.equal(alone, tokens)
        following = position.expand(n).long() + 1
        expected = wte[tokens.cpu()] + wpe[following.clamp(max=n_positions - 1)]
        expected[following >= n_positions] = 0.0
        assert torch.equal(hidden.cpu(), expected), settings


def check_step(kernels: Kernels, dtype: torch.dtype) -> None:
    """In place: the draws of ``sample_next``, log-probabilities under the logits as they are, each row at its column
    of the histories, where it has one, and its position advanced; seed and settings from the device.
    """
    k, n_embd, n_positions, offset, first = 77, 24, 12, 5, 7
    logits, _ = rows(6, k, dtype)
    streams, at = torch.arange(6) + (1 << 33), torch.tensor([2, 6, 5, -5, 8, 1], dtype=torch.int32)
    wte, wpe = torch.randn(k + 1, n_embd).to(dtype), torch.randn(n_positions, n_embd).to(dtype)
    device = [t.to(kernels.device) for t in (logits, streams, wte, wpe)]
    exact = torch.log_softmax(logits.double(), dim=-1)
    plain = torch.log_softmax(logits.float(), dim=-1)
    for seed, settings in (((1 << 64) - 3, (1.0, None, None)), (9, (0.8, 20, 0.9, 0.01)), (9, (0.0, None, None))):
        position = at.to(kernels.device, copy=True)
        tokens = torch.full((6, 6), -1, device=kernels.device)
        logprobs, hidden = tokens.float(), device[2].new_full((6, n_embd), torch.nan)
        buffer = ops.sample_settings(seed, Sampling(*settings), offset, first).to(kernels.device)
        tables = {"wte": device[2], "wpe": device[3]}
        with serving(kernels):
            ops.sample_step(device[0], buffer, device[1], position, tokens, logprobs, hidden, **tables)
            index = (at + offset).to(kernels.device)
            drawn, expected = ops.sample_next(device[0], seed, device[1], index, *settings, **tables)
        assert torch.equal(position.cpu(), at + 1)
        assert torch.equal(hidden, expected)
        written = tokens.cpu() >= 0
        assert written.nonzero().tolist() == [[0, 0], [1, 4], [2, 3]], settings  # 5 + 2 - 7 and so on; 6 is behind
        assert torch.equal(tokens.cpu()[written], drawn.cpu()[:3])
        assert torch.equal(logprobs.cpu() != -1.0, written)
        of_drawn = [every[torch.arange(3), drawn.cpu()[:3]] for every in (plain, exact)]
        assert_parity(logprobs.cpu()[written], *of_drawn)


def check_dependent(kernels: Kernels) -> None:
    """It may begin before the launch has ended that makes its logits, and reads its settings before that has."""
    x, weight = torch.randn(2, 64).bfloat16().to(kernels.device), torch.randn(64, 72).bfloat16().to(kernels.device)
    drawn = []
    kernels.module.set_capability(90)
    for dependent in ("none", "late", "early"):
        tokens, position = torch.full((2, 1), -1), torch.zeros(2, dtype=torch.int32)
        state = [t.to(kernels.device) for t in (torch.arange(2), position, tokens, tokens.float())]
        buffer = ops.sample_settings(7, Sampling(0.9, 20, 0.95)).to(kernels.device)
        with serving(kernels), backend.launching(backend.Launching(dependent)):
            ops.sample_step(ops.gemv(x, weight), buffer, *state)
        drawn.append(torch.stack([state[2], state[3].double()]))
    kernels.module.set_capability()
    assert torch.equal(drawn[1], drawn[0])
    assert torch.equal(drawn[2], drawn[0])


def check_step_edges(kernels: Kernels) -> None:
    """A row whose logits are no distribution has a log-probability that is NaN, whatever is drawn by."""
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(7, 9)
    logits[0] = -inf
    logits[1, 4], logits[6, 7], logits[2, 5], logits[3, 8] = nan, 1e4, inf, -nan
    logits[4, :8], logits[5, 1:] = -inf, -1e30
    for settings in ((1.0,), (1.0, 3, 0.5), (0.0,)):
        tokens, position = torch.full((7, 1), -1), torch.zeros(7, dtype=torch.int32)
        state = [t.to(kernels.device) for t in (torch.arange(7), position, tokens, tokens.float())]
        with serving(kernels):
            buffer = ops.sample_settings(0, Sampling(*settings)).to(kernels.device)
            ops.sample_step(logits.to(kernels.device), buffer, *state)
        drawn, logprobs = state[2].cpu(), state[3].cpu()
        assert drawn[4:, 0].tolist() == [8, 0, 7], settings
        assert logprobs[:4].isnan().all(), settings
        assert logprobs[4:].tolist() == [[0.0]] * 3, settings


def check_numbers(kernels: Kernels) -> None:
    """All 1024 tokens equally likely: the token is the top ten bits of the number, for any key and counter."""
    n = 40
    streams, position = torch.randint(0, 1 << 62, (n,)), torch.randint(0, 1 << 30, (n,)).int()
    logits = torch.zeros(1, 1024, device=kernels.device).expand(n, -1)
    for seed in (0, 1, 1 << 32, (1 << 64) - 1, 0x0123456789ABCDEF):
        with serving(kernels):
            ours, _ = ops.sample_next(logits, seed, streams.to(kernels.device), position.to(kernels.device))
        assert torch.equal(ours.cpu(), (reference.uniform_at(seed, streams, position) * 1024).long())


def check_schedules(kernels: Kernels) -> None:
    for k in (512, 900):
        logits, uniform = rows(3, k)
        results = []
        for order, seed in SCHEDULES:
            schedule(kernels, order, seed)
            with serving(kernels):
                found = [ops.sample(logits, uniform, *settings) for settings in SETTINGS]
            results.append(torch.stack(found))
        assert all(torch.equal(result, results[0]) for result in results)
        for tokens, settings in zip(results[0], SETTINGS, strict=True):
            assert_draws(tokens, logits, uniform, *settings)


def check_batches(kernels: Kernels) -> None:
    """A row's token is the same in any batch, at any place, and from rows that stand apart."""
    logits, uniform = rows(9, 512)
    wide = torch.full((9, 3, 512), torch.nan, device=kernels.device)
    wide[:, 1] = logits.to(kernels.device)
    apart, numbers = wide[:, 1], uniform.to(kernels.device)
    likely_end = apart.clone()
    likely_end[:, 509:] = 50.0  # behind the rows of 509
    for settings in SETTINGS:
        with serving(kernels):
            whole = ops.sample(logits.to(kernels.device), numbers, *settings)
            single = torch.cat([ops.sample(apart[i : i + 1], numbers[i : i + 1], *settings) for i in range(9)])
            turned = ops.sample(apart.flip(0), numbers.flip(0), *settings).flip(0)
            strided = ops.sample(apart, numbers, *settings)
            off = ops.sample(wide[:, 1, 1:509], numbers, *settings)
            expected_off = ops.sample(logits[:, 1:509].to(kernels.device).contiguous(), numbers, *settings)
            ragged = ops.sample(likely_end[:, :509], numbers, *settings)
            expected_ragged = ops.sample(likely_end[:, :509].contiguous(), numbers, *settings)
        assert torch.equal(single, whole)
        assert torch.equal(turned, whole)
        assert torch.equal(strided, whole)
        assert torch.equal(off, expected_off)
        assert torch.equal(ragged, expected_ragged)


def check_accesses(kernels: Kernels) -> None:
    """Each logit is read once, in whole sectors; so are the embeddings; no conflict without top-k and top-p."""
    n, k, n_embd = 2, 512, 256
    logits, wte, wpe = torch.randn(n, k), torch.randn(k, n_embd), torch.randn(8, n_embd)
    position = torch.tensor(3, dtype=torch.int32)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        tables = wte.to(dtype), wpe.to(dtype)
        with Counted(kernels) as counted, serving(kernels):
            ops.sample_next(logits.to(dtype), 0, torch.arange(n), position, wte=tables[0], wpe=tables[1])
        # Every warp reads the position and the stream.
        assert counted["load_bytes"] == n * (k + 2 * n_embd) * size + n * 128 * (4 + 8), dict(counted)
        assert counted["load_sectors"] * 32 == n * (k + 2 * n_embd) * size + n * 4 * 2 * 32, dict(counted)
        assert counted["store_bytes"] == counted["store_sectors"] * 32 == n * n_embd * size, dict(counted)
        assert counted["shared_conflicts"] == 0, dict(counted)
        assert counted["barriers"] == 3 * n, dict(counted)
    # Log-probabilities go through the barriers of the draw.
    with Counted(kernels) as counted, serving(kernels):
        state = torch.arange(n), position.repeat(n), torch.zeros(n, 8, dtype=torch.int64), torch.zeros(n, 8)
        ops.sample_step(logits, ops.sample_settings(0, Sampling()), *state)
    assert counted["barriers"] == 3 * n, dict(counted)
    assert counted["shared_conflicts"] == 0, dict(counted)
    with Counted(kernels) as counted, serving(kernels):
        ops.sample(logits, torch.rand(n), 1.0, 9, None)
    assert counted["shared_conflicts"] == 0, dict(counted)


def check_far_rows(kernels: Kernels) -> None:
    """Rows, and embeddings, that begin behind the first 2^32 elements: offsets of 64 bits."""
    logits, uniform = rows(1, 100)
    tokens, last, stride = torch.full((4,), -1), 3, 1 << 31
    from_logits = logits.data_ptr() - 4 * last * stride
    settings = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_score": ALL, "k": 100, "dtype": 0}
    settings |= {"settings": 0, "dependent": 0}
    settings["place"] = kernels._place()
    kernels.module.set_blocks(last, 1)
    try:
        kernels.module.sample_cuda(
            logits=(from_logits, stride),
            uniform=uniform.data_ptr() - 4 * last,
            streams=0,
            position=(0, 0, False),
            tokens=(tokens.data_ptr(), 0, 1),
            embedding=(0, 0, 0, 0, 0, 0),
            rows=4,
            **settings,
        )
    finally:
        kernels.module.set_blocks()
    assert_draws(tokens[last:], logits, uniform)
    n_embd, position = 1 << 12, torch.tensor([1 << 21], dtype=torch.int32)
    wte, wpe, hidden = torch.randn(100, n_embd), torch.randn(1, n_embd), torch.zeros(1, n_embd)
    from_wpe = wpe.data_ptr() - 4 * n_embd * (int(position) + 1)
    streams, token = torch.zeros(1).long(), tokens[:1]
    kernels.module.sample_cuda(
        logits=(logits.data_ptr(), 100),
        uniform=0,
        streams=streams.data_ptr(),
        position=(position.data_ptr(), 0, False),
        tokens=(token.data_ptr(), 0, 1),
        embedding=(hidden.data_ptr(), wte.data_ptr(), from_wpe, 0, n_embd, 1 << 30),
        rows=1,
        **settings,
    )
    assert torch.equal(hidden, wte[token] + wpe)

"""What the kernels of cross_entropy.cu have to stand up to; see checks.py."""

import torch
from checks import SCHEDULES, Counted, normal, schedule
from kernels import DTYPES, Kernels, addresses
from tolerance import assert_parity
from torch import Tensor

from igpt_fast import reference

IGNORED = -100
# In registers, whole and ragged; streamed by vectors; streamed one by one. Rows that do not fill a block, many turns.
SHAPES = [(5, 512), (3, 8), (2, 520), (3, 1024), (7, 1032), (2, 4100), (6, 1), (5, 13), (3, 513), (70, 40)]


def labels_for(rows: int, k: int, device: str) -> Tensor:
    """Some ignored, the first and the last class among the others."""
    labels = torch.randint(0, k, (rows,))
    labels[::3] = IGNORED
    labels[1:2], labels[-1:] = 0, k - 1
    return labels.to(device)


def run(
    kernels: Kernels, logits: Tensor, labels: Tensor, reduction: str, dloss: Tensor, parts: int, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of logits, into logits themselves ``in_place``."""
    (rows, k), device, each = logits.shape, kernels.device, reduction == "none"
    losses, statistics, partial = (
        torch.full(shape, torch.nan, device=device) for shape in ((rows,), (rows, 2), (parts, 2))
    )
    loss, count = (torch.full((), torch.nan, device=device) for _ in range(2))
    ends = dict(zip(("losses", "loss", "count"), (losses, None, None) if each else (None, loss, count), strict=True))
    settings = {"rows": rows, "k": k, "ignore_index": IGNORED, "dtype": DTYPES[logits.dtype], "place": kernels._place()}
    given = addresses(logits=logits, labels=labels, **ends, statistics=statistics, partial=partial)
    kernels.module.cross_entropy_fwd_cuda(**given, parts=parts, mean=reduction == "mean", **settings)
    logits = logits.clone()
    dlogits = logits if in_place else torch.full_like(logits, torch.nan)
    divisor = count if reduction == "mean" else None
    given = addresses(dloss=dloss, logits=logits, labels=labels, statistics=statistics, count=divisor, dlogits=dlogits)
    kernels.module.cross_entropy_bwd_cuda(**given, for_each=each, **settings)
    return losses if each else loss, dlogits


def by_definition(logits: Tensor, labels: Tensor, reduction: str, dloss: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = reference.cross_entropy(leaf, labels, IGNORED, reduction)
    return loss.detach(), torch.autograd.grad(loss, leaf, dloss.to(loss.dtype))[0]


def check_cross_entropy(
    kernels: Kernels,
    dtype: torch.dtype,
    rows: int,
    k: int,
    parts: int = 2,
    reductions: tuple[str, ...] = ("mean", "sum", "none"),
    offset: float = 0.0,
    in_place: bool = False,
) -> None:
    """Loss and gradient against the definition in float64, by the tolerance rule."""
    logits = (normal(rows, k, dtype=torch.float32, device=kernels.device, scale=3.0) + offset).to(dtype)
    labels = labels_for(rows, k, kernels.device)
    for reduction in reductions:
        dloss = normal(*((rows,) if reduction == "none" else ()), dtype=torch.float32, device=kernels.device)
        ours = run(kernels, logits, labels, reduction, dloss, parts, in_place)
        plain = by_definition(logits, labels, reduction, dloss)
        exact = by_definition(logits.double(), labels, reduction, dloss)
        for name, mine, theirs, wanted in zip(("loss", "dlogits"), ours, plain, exact, strict=True):
            assert_parity(mine, theirs, wanted, f"{reduction} {name}")
        assert not ours[1][labels == IGNORED].any()


def check_cross_entropy_far_from_zero(kernels: Kernels) -> None:
    """Logits around 200 and -200: nothing may overflow, and a log-sum-exp in float32 has errors of 1e-5."""
    for offset in (200.0, -200.0):
        for k in (512, 1032, 13):
            check_cross_entropy(kernels, torch.float32, 5, k, offset=offset)


def check_cross_entropy_infinite(kernels: Kernels) -> None:
    """Logits of -inf have no share; a NaN, +inf or nothing but -inf makes a NaN of the row's loss, as torch has it."""
    for dtype in (torch.float32, torch.bfloat16):
        for k in (512, 1032, 131):
            logits = normal(8, k, dtype=dtype, device=kernels.device)
            labels = torch.full((8,), 5, device=kernels.device)
            logits[0, :5] = logits[1, 6:] = logits[2, 3::2] = -torch.inf
            logits[2, 5] = 1.0
            logits[3] = -torch.inf
            logits[4, -1] = torch.nan
            logits[5, 7] = torch.inf
            logits[6, 5] = -torch.inf
            one = torch.ones(8, device=kernels.device)
            loss, dlogits = run(kernels, logits, labels, "none", one, 2)
            wanted, dwanted = by_definition(logits.double(), labels, "none", one)
            assert torch.allclose(loss.double(), wanted, equal_nan=True, rtol=1e-5), (dtype, k)
            assert loss[6] == torch.inf
            assert loss[3:6].isnan().all()
            good = [0, 1, 2, 6, 7]
            assert torch.allclose(dlogits[good].double(), dwanted[good], rtol=1e-2, atol=1e-6), (dtype, k)


def check_cross_entropy_bad_labels(kernels: Kernels) -> None:
    """A label outside the classes: NaN for its row and for the mean, no gradient, and the other rows as they are."""
    for k in (512, 13):
        logits = normal(5, k, dtype=torch.float32, device=kernels.device)
        labels = torch.tensor([0, k, -1, 2**40, k - 1], device=kernels.device)
        loss, dlogits = run(kernels, logits, labels, "none", torch.ones(5, device=kernels.device), 2)
        assert loss.isnan().tolist() == [False, True, True, True, False]
        assert not dlogits[1:4].any()
        good, bad = torch.tensor([0, 4]), torch.ones((), device=kernels.device)
        wanted, dwanted = by_definition(logits[good], labels[good], "none", torch.ones(2, device=kernels.device))
        assert torch.allclose(loss[good], wanted)
        assert torch.allclose(dlogits[good], dwanted, atol=1e-6)
        assert run(kernels, logits, labels, "mean", bad, 2)[0].isnan()


def check_cross_entropy_nothing_counts(kernels: Kernels) -> None:
    """0 / 0 for the mean, 0 for the sum; no gradient."""
    for rows in (0, 3):
        logits = normal(rows, 16, dtype=torch.bfloat16, device=kernels.device)
        labels = torch.full((rows,), IGNORED, device=kernels.device)
        one = torch.ones((), device=kernels.device)
        for reduction in ("mean", "sum"):
            loss, dlogits = run(kernels, logits, labels, reduction, one, min(rows, 2))
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert not dlogits.any()


def check_cross_entropy_determinism(kernels: Kernels) -> None:
    """The same bits under every schedule."""
    logits, labels = normal(37, 512, dtype=torch.bfloat16, device=kernels.device), labels_for(37, 512, kernels.device)
    one, results = torch.ones((), device=kernels.device), []
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        loss, dlogits = run(kernels, logits, labels, "mean", one, 3)
        results.append(torch.cat([loss.view(1), dlogits.float().flatten()]))
    assert all(torch.equal(result, results[0]) for result in results)


def check_cross_entropy_schedules(kernels: Kernels) -> None:
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        check_cross_entropy(kernels, torch.bfloat16, 19, 520, 3)


def check_cross_entropy_coalescing(kernels: Kernels) -> None:
    """The logits are read once forward, 16 bytes a lane; read once and written once backward."""
    rows, k = 64, 512
    for dtype in (torch.bfloat16, torch.float32):
        logits, labels = normal(rows, k, dtype=dtype, device="cpu"), torch.arange(rows)
        size, one = logits.numel() * logits.element_size(), torch.ones(())
        with Counted(kernels) as counted:
            run(kernels, logits, labels, "mean", one, 4)
        # What all lanes of a warp read at one address, labels, statistics, scale, is one sector a row and request.
        few = 8 * rows
        assert 2 * size // 32 <= counted["load_sectors"] <= 2 * size // 32 + few, dict(counted)
        assert counted["load_requests"] <= 2 * size // 512 + few, dict(counted)
        assert size // 32 <= counted["store_sectors"] <= size // 32 + 2 * rows, dict(counted)
        assert counted["store_requests"] <= size // 512 + 2 * rows, dict(counted)
        assert counted["shared_conflicts"] == 0, dict(counted)

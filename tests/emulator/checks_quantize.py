"""What the kernels of quantize_table.cu and dequantize.cu have to stand up to; see checks.py."""

import torch
from checks import SCHEDULES, Counted, schedule
from kernels import Kernels, addresses

from igpt_fast import reference

ENTRIES = 1 << 24
CELLS = 32**3
TOKEN_TYPES = {torch.int64: 0, torch.int32: 1, torch.int16: 2, torch.uint8: 3}
# Corners, edges and the middle of the cube of cells.
SOME_CELLS = (0, 31, 32 * 31 + 7, 32**2 * 15 + 32 * 16 + 15, CELLS - 1)


def entry(x: torch.Tensor) -> torch.Tensor:
    """Where (n, 3) colours stand in a table; the layout is in quantize_table.cu."""
    r, g, b = x.long().unbind(-1)
    return r // 4 << 18 | g // 4 << 12 | b // 4 << 6 | r % 4 << 4 | g % 4 << 2 | b % 4


def colours_of(cell: int) -> torch.Tensor:
    """The 512 colours of a cell of 8x8x8."""
    offset = torch.cartesian_prod(*[torch.arange(8)] * 3)
    return (offset + 8 * torch.tensor([cell // 1024, cell // 32 % 32, cell % 32])).to(torch.uint8)


def on_the_grid(k: int) -> torch.Tensor:
    """Clusters between the colours and on them, many of them twice: true ties."""
    colours = torch.randint(0, 511, (k, 3)) / 2.0
    colours[k // 2 : k // 2 + k // 4] = colours[: k // 4].clone()
    return (colours / 127.5 - 1.0).float()


def random_palette(k: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.rand(k, 3) * 2 - 1) * scale


def build(kernels: Kernels, clusters: torch.Tensor, cells: tuple[int, ...] | None = None) -> torch.Tensor:
    """A table on the CPU; on the emulator of some cells alone, in which case the rest is 65535."""
    table = torch.full((ENTRIES,), 65535, dtype=torch.uint16, device=kernels.device)
    on_device = clusters.to(kernels.device)
    arguments = addresses(clusters=on_device, table=table) | {"k": len(clusters), "place": kernels._place()}
    if cells is None or kernels.device != "cpu":
        kernels.module.quantize_table_cuda(**arguments)
        return table.cpu()
    try:
        for cell in cells:
            kernels.module.set_blocks(cell, 1)
            kernels.module.quantize_table_cuda(**arguments)
    finally:
        kernels.module.set_blocks()
    return table


def check_table(kernels: Kernels, clusters: torch.Tensor, cells: tuple[int, ...] = SOME_CELLS) -> None:
    """Bit for bit, every colour of the cells."""
    table = build(kernels, clusters, cells)
    for cell in cells:
        x = colours_of(cell)
        assert torch.equal(table[entry(x)].long(), reference.quantize(x, clusters)), cell


def check_table_palettes(kernels: Kernels) -> None:
    """Random ones, ties, clusters far outside, none that is finite."""
    for clusters in (
        random_palette(512),
        on_the_grid(700),
        on_the_grid(16),
        random_palette(1),
        random_palette(129, 1e3),
    ):
        check_table(kernels, clusters)
    for scale in (1e9, 1e18, 3e38):
        check_table(kernels, torch.cat([random_palette(97, scale), random_palette(60)]), SOME_CELLS[:2])
        check_table(kernels, random_palette(97, scale) + scale / 2, SOME_CELLS[:2])
    clusters = random_palette(200)
    clusters[::3] = torch.nan
    clusters[5] = torch.inf
    check_table(kernels, clusters)
    check_table(kernels, torch.full((130, 3), torch.nan), SOME_CELLS[:1])


def check_table_full_lists(kernels: Kernels) -> None:
    """Every cluster is a candidate of every cell, more than shared memory holds at a time; a late one wins."""
    clusters = torch.zeros(1500, 3)
    clusters[1200] = -0.001
    clusters[1499] = -0.001
    check_table(kernels, clusters, SOME_CELLS)
    # Each a little nearer to black than the one before, by less than a careless bound would tell.
    nearing = -1.0 + 0.1 * (1.0 - 1e-5 * torch.arange(2000.0))[:, None].expand(2000, 3).contiguous()
    check_table(kernels, nearing, SOME_CELLS[:1])


def check_table_last_index(kernels: Kernels) -> None:
    """65,536 clusters: the indices fill their 16 bits."""
    clusters = random_palette(65536)
    clusters[-1] = colours_of(0)[100] / 127.5 - 1.0
    check_table(kernels, clusters, (0,))


def check_table_schedules(kernels: Kernels) -> None:
    clusters = on_the_grid(600)
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        check_table(kernels, clusters, SOME_CELLS[:2])


def check_table_stores(kernels: Kernels) -> None:
    """Two bytes a colour, once, in whole sectors."""
    with Counted(kernels) as counted:
        build(kernels, random_palette(300), (77,))
    assert counted["store_sectors"] * 32 == counted["store_bytes"] == 512 * 2, dict(counted)
    assert counted["store_requests"] == 4, dict(counted)


def look_up(kernels: Kernels, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    out = torch.full(x.shape[:-1], -1, device=kernels.device)
    on_device, table = x.to(kernels.device), table.to(kernels.device)
    given = addresses(x=on_device, table=table, out=out)
    kernels.module.quantize_lookup_cuda(**given, n=out.numel(), place=kernels._place())
    return out.cpu()


def any_table() -> torch.Tensor:
    return torch.randint(-(1 << 15), 1 << 15, (ENTRIES,), dtype=torch.int16).view(torch.uint16)


def check_lookup(kernels: Kernels) -> None:
    """Any table gives its entries: whole warps, whole blocks, and a rest."""
    table = any_table()
    for n in (0, 1, 31, 511, 512, 513, 2048, 4096 + 700):
        x = torch.randint(0, 256, (n, 3), dtype=torch.uint8)
        assert torch.equal(look_up(kernels, x, table), table[entry(x)].long()), n


def check_lookup_schedules(kernels: Kernels) -> None:
    table, x = any_table(), torch.randint(0, 256, (2048 + 600, 3), dtype=torch.uint8)
    for order, seed in SCHEDULES:
        schedule(kernels, order, seed)
        assert torch.equal(look_up(kernels, x, table), table[entry(x)].long()), order


def check_lookup_coalescing(kernels: Kernels) -> None:
    """Every byte moves once, 16 at a time, in whole sectors; no shared-memory conflict."""
    n, table = 4096, any_table()
    with Counted(kernels) as counted:
        look_up(kernels, torch.randint(0, 256, (n, 3), dtype=torch.uint8), table)
    assert counted["load_sectors"] * 32 == counted["load_bytes"] == 3 * n, dict(counted)
    assert counted["store_sectors"] * 32 == counted["store_bytes"] == 8 * n, dict(counted)
    assert counted["load_requests"] == 3 * n // 512, dict(counted)
    assert counted["store_requests"] == 8 * n // 512, dict(counted)
    assert counted["shared_conflicts"] == 0, dict(counted)


def check_far_pixels(kernels: Kernels) -> None:
    """The block of 2048 pixels behind the first 2^32: offsets of 64 bits. The memory before them is not there."""
    first, n = 1 << 32, 700
    table, clusters = any_table(), random_palette(20)
    x = torch.randint(0, 256, (n, 3), dtype=torch.uint8)
    try:
        for block, expected in ((2048, table[entry(x)].long()), (512, reference.quantize(x, clusters))):
            out = torch.full((n,), -1)
            far = {"x": x.data_ptr() - 3 * first, "out": out.data_ptr() - 8 * first, "n": first + n}
            far["place"] = kernels._place()
            kernels.module.set_blocks(first // block, (n + block - 1) // block)
            if block == 2048:
                kernels.module.quantize_lookup_cuda(**far, table=table.data_ptr())
            else:
                kernels.module.quantize_cuda(**far, is_u8=True, clusters=clusters.data_ptr(), k=len(clusters))
            assert torch.equal(out, expected), block
    finally:
        kernels.module.set_blocks()


def check_many_pixels(kernels: Kernels) -> None:
    """From 2^17 pixels on, a thread of the brute force has four."""
    for dtype, k in ((torch.uint8, 9), (torch.float32, 523)):
        n = (1 << 17) + 3
        clusters = random_palette(k)
        clusters[k // 2 :] = clusters[: k - k // 2].clone()
        x = torch.randint(0, 256, (n, 3), dtype=torch.uint8) if dtype == torch.uint8 else random_palette(n)
        x[-1] = x[0]
        # The first blocks and the last, ragged one.
        parts = [slice(0, 1024), slice(n - 3, n)]
        out = torch.full((n,), -1, device=kernels.device)
        on_device, palette = x.to(kernels.device), clusters.to(kernels.device)
        arguments = addresses(x=on_device, clusters=palette, out=out) | {"is_u8": dtype == torch.uint8, "n": n, "k": k}
        try:
            for block, count in ((0, 2), (256, 1)):
                if kernels.device == "cpu":
                    kernels.module.set_blocks(block, count)
                kernels.module.quantize_cuda(**arguments, place=kernels._place())
        finally:
            if kernels.device == "cpu":
                kernels.module.set_blocks()
        for part in parts:
            assert torch.equal(out[part].cpu(), reference.quantize(x[part], clusters)), (dtype, part)


def check_not_numbers(kernels: Kernels) -> None:
    """What is not a number wins nothing, and overflowing distances lose."""
    clusters = random_palette(300)
    clusters[::2] = torch.nan
    clusters[7] = torch.inf
    clusters[9] = 3e38
    x = torch.randn(200, 3)
    x[3], x[4, 1], x[5], x[6] = torch.nan, torch.nan, torch.inf, 3e38
    for pixels in (x, torch.randint(0, 256, (200, 3), dtype=torch.uint8)):
        far = torch.tensor([3e38, 2e38])[:, None].expand(-1, 3).contiguous()  # beyond float32 when squared
        for palette in (clusters, far, torch.full((5, 3), torch.nan)):
            ours = kernels.quantize(pixels.to(kernels.device), palette.to(kernels.device)).cpu()
            assert torch.equal(ours, reference.quantize(pixels, palette))


def dequantize(kernels: Kernels, tokens: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
    out = torch.full((*tokens.shape, 3), 77, dtype=torch.uint8, device=kernels.device)
    on_device, palette = tokens.to(kernels.device), clusters.to(kernels.device)
    given = addresses(tokens=on_device, clusters=palette, out=out)
    sizes = {"token": TOKEN_TYPES[tokens.dtype], "n": tokens.numel(), "k": len(clusters)}
    kernels.module.dequantize_cuda(**given, **sizes, place=kernels._place())
    return out.cpu()


def check_dequantize(kernels: Kernels) -> None:
    """Bit for bit; clusters at and beyond the ends of the range, and half-way between two values."""
    clusters = torch.cat([random_palette(200), random_palette(40, 3.0), on_the_grid(60)])
    for dtype in TOKEN_TYPES:
        low = 0 if dtype == torch.uint8 else -len(clusters)
        for n in (0, 1, 31, 511, 512, 2048, 2048 + 515):
            tokens = torch.randint(low, min(256, len(clusters)), (n,)).to(dtype)
            tokens[-1:] = 255 if dtype == torch.uint8 else len(clusters) - 1
            assert torch.equal(dequantize(kernels, tokens, clusters), reference.dequantize(tokens, clusters)), (
                dtype,
                n,
            )


def check_dequantize_turns(kernels: Kernels) -> None:
    """More tokens than the blocks have in one turn, under schedules that let a warp run ahead."""
    n, first = 1024 * 2048 + 1700, 3 * 2048
    clusters = random_palette(100)
    tokens = torch.randint(0, 100, (n,), dtype=torch.uint8)
    out = torch.full((n, 3), 77, dtype=torch.uint8, device=kernels.device)
    on_device, palette = tokens.to(kernels.device), clusters.to(kernels.device)
    arguments = addresses(tokens=on_device, clusters=palette, out=out) | {"token": 3, "n": n, "k": 100}
    for order, seed in SCHEDULES if kernels.device == "cpu" else [("fifo", 0)]:
        schedule(kernels, order, seed)
        try:
            if kernels.device == "cpu":
                kernels.module.set_blocks(0, 3)
            out.fill_(77)
            kernels.module.dequantize_cuda(**arguments, place=kernels._place())
        finally:
            if kernels.device == "cpu":
                kernels.module.set_blocks()
        for part in (slice(0, first), slice(1024 * 2048, n)):
            assert torch.equal(out[part].cpu(), reference.dequantize(tokens[part], clusters)), order


def check_dequantize_coalescing(kernels: Kernels) -> None:
    """Whole sectors, 16 bytes at a time; no conflict, where all tokens are one and so the palette has none."""
    n = 4096
    for dtype, size in ((torch.int64, 8), (torch.int32, 4)):
        with Counted(kernels) as counted:
            dequantize(kernels, torch.full((n,), 3, dtype=dtype), random_palette(64))
        assert counted["load_sectors"] * 32 == counted["load_bytes"] == size * n, dict(counted)
        assert counted["store_sectors"] * 32 == counted["store_bytes"] == 3 * n, dict(counted)
        assert counted["load_requests"] == size * n // 512, dict(counted)
        assert counted["store_requests"] == 3 * n // 512, dict(counted)
        assert counted["shared_conflicts"] == 0, dict(counted)


def check_far_tokens(kernels: Kernels) -> None:
    """Tokens behind the first 2^31, in memory that nobody touches but the block that has them at its last turn."""
    n = (1 << 31) + 700
    tokens, clusters = torch.empty(n, dtype=torch.uint8), random_palette(256)
    out = torch.empty(n, 3, dtype=torch.uint8)
    tokens[1 << 31 :] = torch.randint(0, 256, (700,))
    kernels.module.set_blocks(0, 1)
    try:
        arguments = addresses(tokens=tokens, clusters=clusters, out=out) | {"token": 3, "n": n, "k": 256}
        kernels.module.dequantize_cuda(**arguments, place=kernels._place())
    finally:
        kernels.module.set_blocks()
    assert torch.equal(out[1 << 31 :], reference.dequantize(tokens[1 << 31 :], clusters))

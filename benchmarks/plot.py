"""The picture of the CPU's results for README.md: how many times as fast as transformers everybody is.

    python benchmarks/plot.py

Reads results/generate.json, model.json, train.json and ops.json, as far as they are there, and writes docs/cpu.png.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

GAP = 1.1  # between groups, in bars
INK, SOFT, GRID = "#24292f", "#6e7781", "#e6e8eb"
# Series -> label and colour: the peers in greys and blues, ours in one warm colour.
SERIES = {
    "PyTorch": ("expert's PyTorch", "#d0d7de"),
    "PyTorch, compiled": ("... under torch.compile", "#a3adb8"),
    "torchao, int8": ("... and torchao int8", "#77828e"),
    "OpenVINO": ("OpenVINO", "#a9c7e8"),
    "OpenVINO, int8": ("OpenVINO int8", "#5b8fc7"),
    "scipy cKDTree": ("scipy cKDTree", "#5fa595"),
    "igpt_fast": ("igpt_fast", "#f5a35c"),
    "igpt_fast, int8": ("igpt_fast int8", "#d9480f"),
    "igpt_fast, pixels": ("igpt_fast, colours as bytes", "#b58900"),  # exact, as float32 is
}


@dataclass(frozen=True)
class Group:
    """A work: its title, how many times as fast as transformers each series is, and words beside the numbers."""

    title: str
    bars: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)


def series(row: dict[str, Any]) -> str | None:
    """The series of a row of generate.json or model.json."""
    name = "torchao" if row["name"].startswith("torchao") else row["name"]
    found = f"{name}, int8" if row["dtype"] == "int8" else name
    return found if found in SERIES else None


def best(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each series the fastest row, in whatever dtype, 8 bits aside; in the order of the series."""
    found: dict[str, float] = {}
    for row in rows:
        if (name := series(row)) and "times_hf" in row:
            found[name] = max(found.get(name, 0.0), row["times_hf"])
    return {name: found[name] for name in SERIES if name in found}


def network(results: dict[str, dict[str, Any]]) -> list[Group]:
    """Decoding, the forward pass, training."""
    rows = [row for name in ("generate", "model", "train") if name in results for row in results[name]["rows"]]
    titles = {
        ("step", 1): "next pixel,\nbatch 1",
        ("step", 8): "next pixel,\nbatch 8",
        ("image", 1): "sampled image,\nbatch 1",
        ("image", 8): "sampled image,\nbatch 8",
        ("forward", 1): "likelihood,\nbatch 1",
        ("forward", 8): "likelihood,\nbatch 8",
        ("train", 4): "training step,\nbatch 4",
    }
    groups = []
    for (work, batch), title in titles.items():
        if bars := best([row for row in rows if (row["work"], row["batch"]) == (work, batch)]):
            groups.append(Group(title, bars))
    return groups


def quantize(results: dict[str, dict[str, Any]]) -> list[Group]:
    """Colours to tokens, 256 small photographs, all threads."""
    if "ops" not in results:
        return []
    rows = [row for row in results["ops"]["rows"] if row["op"] == "quantize" and row.get("content") == "photograph"]
    rows = [row for row in rows if row["pixels"] == 256 * 32 * 32]
    threads = max((row["threads"] for row in rows), default=0)
    names = {
        "torch cdist": "PyTorch",
        "scipy cKDTree": "scipy cKDTree",
        "igpt_fast float32": "igpt_fast",
        "igpt_fast uint8": "igpt_fast, pixels",
    }
    bars = {names[r["name"]]: r["times_hf"] for r in rows if r["threads"] == threads and r["name"] in names}
    notes = {"PyTorch": "cdist", "igpt_fast": "float32", "igpt_fast, pixels": "uint8"}
    return [Group("colours to\ntokens", {name: bars[name] for name in SERIES if name in bars}, notes)] if bars else []


def caption(results: dict[str, dict[str, Any]]) -> str:
    """Where and with what it was measured."""
    machine = next(iter(results.values()))["machine"]
    versions = machine["versions"]
    peers = [
        f"{name} {versions[name]}" for name in ("torch", "transformers", "openvino", "torchao") if name in versions
    ]
    commits = dict.fromkeys(result["machine"]["commit"] for result in results.values())
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}"
    return (
        f"Each in its best dtype, int8 aside. iGPT-S, seeded weights; {where}.\n"
        f"{', '.join(peers)}; commit {', '.join(commits)}."
    )


def draw(panels: Sequence[Sequence[Group]], text: str, path: Path) -> None:
    """Writes the picture: a panel with an axis of its own for each list of groups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    heights = [sum(len(group.bars) + GAP for group in groups) for groups in panels]
    size = 8, 1.5 + 0.15 * sum(heights)
    figure, axes = plt.subplots(len(panels), figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    for axis, groups in zip(axes[:, 0], panels, strict=True):
        draw_bars(axis, groups)
    axes[0, 0].text(1, -1.1, "transformers", fontsize=7.5, ha="center", va="bottom", color=SOFT)
    used = {name for groups in panels for group in groups for name in group.bars}
    labels = {
        label: plt.Rectangle((0, 0), 1, 1, color=colour) for name, (label, colour) in SERIES.items() if name in used
    }
    title = "ImageGPT on a CPU: how many times as fast as transformers"
    look = {"frameon": False, "fontsize": 8.5, "title_fontproperties": {"size": 12, "weight": "bold"}}
    figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4, title=title, **look)
    figure.supxlabel(text, fontsize=7.5, color=SOFT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def draw_bars(axis: Any, groups: Sequence[Group]) -> None:
    """One group under the other, each bar with its number."""
    place, ticks = 0.0, []
    longest = max(max(group.bars.values()) for group in groups)
    for group in groups:
        ticks.append(place + (len(group.bars) - 1) / 2)
        for name, value in group.bars.items():
            ours = name.startswith("igpt_fast")
            axis.barh(place, value, height=0.86, color=SERIES[name][1], zorder=2)
            number = f"{value:.0f}x" if value >= 20 else f"{value:.1f}x"
            weight, colour = ("bold", INK) if ours else ("normal", SOFT)
            look = {"va": "center", "fontsize": 7.5, "weight": weight, "color": colour}
            axis.text(value + longest / 150, place, f"{number} {group.notes.get(name, '')}", **look)
            place += 1
        place += GAP
    axis.set_yticks(ticks, [group.title for group in groups])
    axis.set_ylim(place - GAP - 0.3, -0.8)
    axis.set_xlim(0, 1.13 * longest)
    axis.axvline(1, color=INK, linewidth=0.8, zorder=3)
    axis.grid(axis="x", color=GRID, zorder=0)
    axis.tick_params(length=0, colors=INK)
    axis.tick_params(axis="x", labelcolor=SOFT, labelsize=8)
    axis.xaxis.set_major_formatter("{x:g}x")
    for side in axis.spines.values():
        side.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--out", type=Path, default=common.ROOT / "docs" / "cpu.png")
    options = parser.parse_args()
    files = {name: options.results / f"{name}.json" for name in ("generate", "model", "train", "ops")}
    results = {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.is_file()}
    panels = [groups for groups in (network(results), quantize(results)) if groups]
    if not panels:
        raise SystemExit(f"{options.results} has no results to draw")
    draw(panels, caption(results), options.out)


if __name__ == "__main__":
    main()

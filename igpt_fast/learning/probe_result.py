"""What a probe has found: rows, a table, a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igpt_fast import files

KINDS = {"model": "the model", "random": "random weights", "raw": "raw pixels"}
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class ProbeRow:
    """One kind of features, read by one method.

    Args:
        kind: ``"model"``, ``"random"`` (the same architecture, initial weights) or ``"raw"`` (pixels).
        layer: The paper's number; several that were concatenated; ``None`` of raw pixels.
        method: ``"logistic"``, ``"knn"`` or ``"attentive"``.
        shots: Images of each class that were learned from; ``None``: all.
        accuracy: Of test, 0..1; the mean of the tries.
        std: Standard deviation of the tries; ``None`` where there was one.
        C: Of a logistic regression, as it was chosen; the median of the tries. At the end of ``classifiers.GRID``
            another one might do better.
        k: Nearest neighbours, as they were chosen.
        validation: Accuracy on the part of train that C, k, or the steps of an attentive probe, were chosen on, if
            there was one.
        converged: Whether all of its fits did; ``None`` of other methods than logistic.
        n_train, n_test: Images.
    """

    kind: str
    layer: int | tuple[int, ...] | None
    method: str
    shots: int | None
    accuracy: float
    std: float | None
    C: float | None
    k: int | None
    validation: float | None
    converged: bool | None
    n_train: int
    n_test: int

    @property
    def layer_text(self) -> str:
        """``4``, or ``3-5`` of concatenated layers; empty of raw pixels."""
        if isinstance(self.layer, tuple):
            steps = {after - before for before, after in zip(self.layer, self.layer[1:], strict=False)}
            return f"{self.layer[0]}-{self.layer[-1]}" if steps == {1} else "+".join(map(str, self.layer))
        return "" if self.layer is None else str(self.layer)


@dataclass(frozen=True)
class ProbeResult:
    """All rows of a probe, raw pixels first, then the model's, then those of random weights."""

    rows: tuple[ProbeRow, ...]
    classes: tuple[str, ...]
    n_layer: int
    sos: bool
    bands: int
    tries: int
    seed: int
    masks: int = 0  # that images were seen under by a bidirectional model
    known: int = 0  # images of test that, token by token, are images of train

    def best(
        self, kind: str = "model", *, method: str = "logistic", shots: int | None = None, concat: bool = False
    ) -> ProbeRow:
        """The row of the highest accuracy, the lowest layer of equal ones.

        It is the best layer by test, as papers name it; ``validation`` tells which one train alone would have chosen.

        Raises:
            ValueError: There is no such row.
        """
        found = [row for row in self._of(kind, method, shots) if isinstance(row.layer, tuple) == concat]
        if not found:
            wanted = f"kind {kind!r}, method {method!r}, shots {shots}" + (", concatenated" if concat else "")
            raise ValueError(f"best: no row of {wanted}")
        return max(found, key=lambda row: row.accuracy)

    def _of(self, kind: str, method: str, shots: int | None) -> list[ProbeRow]:
        return [row for row in self.rows if (row.kind, row.method, row.shots) == (kind, method, shots)]

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """``to_dict`` as indented JSON with a final newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> str:
        """A line for each kind of features, a column for each method; ``*``: it has not converged."""
        columns = list(dict.fromkeys((row.method, row.shots) for row in self.rows))
        columns.sort(key=lambda column: (column[1] is not None, column[1] or 0))
        heads = ["", "layer", *(method if shots is None else f"{shots} a class" for method, shots in columns)]
        lines = [heads]
        for kind, layer in dict.fromkeys((row.kind, row.layer) for row in self.rows):
            own = {(row.method, row.shots): row for row in self.rows if (row.kind, row.layer) == (kind, layer)}
            name = next(iter(own.values())).layer_text
            lines.append([KINDS[kind], name, *(_cell(own.get(column)) for column in columns)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        told = [_line(line, widths) for line in lines]
        all_ = next(row for row in self.rows if row.shots is None)
        told.append(f"{len(self.classes)} classes, {all_.n_train} images of train, {all_.n_test} of test")
        if self.masks:
            told.append(f"features are the mean over {self.masks} masks of each image")
        if self.known:
            told.append(f"{self.known} of the images of test are images of train, too")
        if any(row.converged is False for row in self.rows):
            told.append("* a logistic regression that has not converged")
        return "\n".join(told)

    def plot(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Draws accuracy by layer, a panel for all labels and one for each number of shots.

        Args:
            path: A name that ends in .png, .svg or .pdf.
            overwrite: Whether it may exist.

        Raises:
            FileExistsError: It exists and may not.
            ImportError: matplotlib is not installed.
            ValueError: Another suffix.
        """
        path = Path(path)
        if path.suffix.lower() not in PLOTS:
            raise ValueError(f"{path}: the name must end in {', '.join(PLOTS)}")
        need_matplotlib()
        from matplotlib.figure import Figure

        shots = list(dict.fromkeys(row.shots for row in self.rows if row.method == "logistic"))
        figure = Figure(figsize=(1.0 + 3.4 * len(shots), 3.6), layout="constrained")
        panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
        for panel, number in zip(panels, shots, strict=True):
            self._panel(panel, number)
        panels[0].set_ylabel("accuracy on test")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        with files.replacing(path, overwrite=overwrite) as partial:
            figure.savefig(partial, format=path.suffix.lower()[1:], dpi=150)

    def _panel(self, axes: Any, shots: int | None) -> None:
        for kind, colour in (("model", "C0"), ("random", "C1")):
            single = [row for row in self._of(kind, "logistic", shots) if isinstance(row.layer, int)]
            layers, values = [row.layer for row in single], [row.accuracy for row in single]
            axes.plot(layers, values, "o-" if kind == "model" else "s--", color=colour, label=KINDS[kind])
            if all(row.std is not None for row in single):
                low, high = ([row.accuracy + sign * (row.std or 0.0) for row in single] for sign in (-1, 1))
                axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
        raw = self._of("raw", "logistic", shots)[0]
        axes.axhline(raw.accuracy, color="C2", linestyle=":", label=KINDS["raw"])
        axes.axhline(1 / len(self.classes), color="0.7", linewidth=0.8, label="chance")
        axes.set_title("all labels" if shots is None else f"{shots} a class")
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)


def need_matplotlib() -> None:
    """Raises ImportError, which names the extra, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "igpt_fast[train]"') from error


def _cell(row: ProbeRow | None) -> str:
    if row is None:
        return ""
    spread = "" if row.std is None else f" +- {row.std:.3f}"
    return f"{row.accuracy:.3f}{spread}{'*' if row.converged is False else ''}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

"""The parity table: our errors and transformers' to the float64 evaluation of the same weights.

    python benchmarks/parity.py [--json results.json] [--quick]

A line passes by the rule in tests/tolerance.py: our error is at most twice transformers' in the same dtype, plus one
unit of output rounding. Of all hidden states, and of all gradients, the line shows the one with the largest ratio of
errors. Exit code 4 when a line fails.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tolerance import Comparison, Trio, gradients, losses, make_trio, outputs, tokens

CAUSAL, CLASSIFIER = "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"
SMALL = {"n_layer": 3, "n_positions": 128, "vocab_size": 65, "num_labels": 10}
# Name, class, batch, length, backward pass too, configuration.
CASES: list[tuple[str, str, int, int, bool, dict[str, Any]]] = [
    *((f"head_dim {d}", CAUSAL, 3, 97, True, {**SMALL, "n_embd": 2 * d, "n_head": 2}) for d in (32, 64, 96, 128)),
    ("classifier", CLASSIFIER, 3, 97, True, {**SMALL, "n_embd": 128, "n_head": 2}),
    ("upcast", CAUSAL, 3, 97, True, {**SMALL, "n_embd": 128, "n_head": 2, "reorder_and_upcast_attn": True}),
    (
        "inverse layer",
        CAUSAL,
        3,
        97,
        True,
        {**SMALL, "n_embd": 128, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
    ),
]
S_CASE: tuple[str, str, int, int, bool, dict[str, Any]] = ("iGPT-S", CAUSAL, 1, 1024, False, {})


def measure(trio: Trio, batch: int, length: int, backward: bool) -> dict[str, Comparison]:
    """Outputs with the loss, and gradients, of one case."""
    config = trio.ours.config
    ids = tokens(config, batch, length)
    classes = (torch.arange(16)[:, None] + torch.arange(batch)) % config.num_labels
    of_input = None if hasattr(trio.ours, "lm_head") else classes.__getitem__
    # Attentions written out are another path than the one that models run: without them first.
    results = trio.compare(lambda m: outputs(m, input_ids=ids, output_attentions=False))
    results |= trio.compare(lambda m: losses(m, batch, min(length, 33), of_input))
    if backward:
        labels = ids if of_input is None else of_input(0)
        results |= trio.compare(lambda m: gradients(m, input_ids=ids, labels=labels))
        attentions = trio.compare(lambda m: outputs(m, input_ids=ids))
        results |= {name: result for name, result in attentions.items() if name.startswith("attentions")}
    return results


def grouped(results: dict[str, Comparison]) -> dict[str, tuple[Comparison, bool]]:
    """The worst of each kind of quantity, and whether all of the kind passed."""
    kinds: dict[str, list[Comparison]] = {}
    for name, result in results.items():
        kind = "gradients" if name.startswith("d ") else name.split("[")[0]
        kinds.setdefault(kind, []).append(result)
    return {kind: (max(group, key=lambda r: r.ratio), all(r.passed for r in group)) for kind, group in kinds.items()}


def rows(quick: bool) -> Iterator[dict[str, Any]]:
    """The lines of the table."""
    cases = CASES if quick else [*CASES, S_CASE]
    for name, head, batch, length, backward, config in cases:
        for dtype in (torch.float32, torch.bfloat16):
            trio = make_trio(head, dtype, **config)
            for quantity, (worst, passed) in grouped(measure(trio, batch, length, backward)).items():
                yield {
                    "config": name,
                    "shape": [batch, length],
                    "dtype": str(dtype).removeprefix("torch."),
                    "quantity": quantity,
                    "ours": worst.ours,
                    "transformers": worst.theirs,
                    "ratio": worst.ratio,
                    "passed": passed,
                }


def main() -> int:
    """Prints the table; returns the exit code."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--quick", action="store_true", help="leave the full S configuration out")
    arguments = parser.parse_args()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{'config':<14}{'dtype':<10}{'quantity':<19}{'ours':>10}{'transformers':>14}{'ratio':>7}")
    table = []
    for row in rows(arguments.quick):
        table.append(row)
        line = f"{row['config']:<14}{row['dtype']:<10}{row['quantity']:<19}{row['ours']:>10.2e}"
        print(
            f"{line}{row['transformers']:>14.2e}{row['ratio']:>7.2f}  {'pass' if row['passed'] else 'FAIL'}", flush=True
        )
    failed = sum(not row["passed"] for row in table)
    print(f"{len(table) - failed} of {len(table)} passed")
    if arguments.json is not None:
        common.write(arguments.json, table)
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

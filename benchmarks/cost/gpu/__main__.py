"""One session on a GPU: the tests there, then eigenproblems, samples, launches, training and memory.

    python -m benchmarks.cost.gpu --minutes 8      # prints tables, writes benchmarks/results/gpu.json
    python -m benchmarks.cost.gpu --smoke          # the same on a CPU with tiny sizes, to see that it runs

Needs torch, transformers, torchmetrics, pytest and hypothesis, and no network. The JSON is written after each part, so
a session that is cut off still counts.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.cost.gpu.correctness import correctness
from benchmarks.cost.gpu.eigenproblems import eigenproblems
from benchmarks.cost.gpu.samples import launches, layer_table, machine, memory, samples
from benchmarks.cost.gpu.session import Part, part_command, run_part, run_session
from benchmarks.cost.gpu.training import training

PARTS = (
    Part("machine", 0.02, machine),
    Part("correctness", 0.30, correctness),
    Part("samples", 0.22, samples),
    Part("eigenproblems", 0.14, eigenproblems),
    Part("training", 0.14, training),
    Part("launches", 0.04, launches),
    Part("memory", 0.06, memory),
    # cuSOLVER's batched Jacobi, where this torch reads the variable: newer ones do, and older ones ignore it.
    Part("eigenproblems by batched Jacobi", 0.04, eigenproblems, {"TORCH_LINALG_EIGH_BACKEND": "3"}),
    Part("one layer beside the usual ways", 0.04, layer_table),
)


def main() -> int:
    """Run the session, or one part of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, in one process")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--part", nargs=3, metavar=("NAME", "SECONDS", "ROWS"), help="run one part; the session does")
    arguments = parser.parse_args()
    if arguments.part:
        name, seconds, rows = arguments.part
        [part] = [part for part in PARTS if part.name == name]
        return int(run_part(part, "cuda", Path(rows), float(seconds)) != "complete")
    if not arguments.smoke and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured, nothing written; --smoke tries the session on the CPU")
        return 1
    run = partial(run_session, PARTS, minutes=arguments.minutes, path=arguments.json.absolute())
    run(smoke=arguments.smoke, command=part_command("benchmarks.cost.gpu", "--part"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

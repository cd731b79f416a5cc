"""Audit a checkpoint from Python: the numbers that ``attnmonitor scan MODEL`` prints.

python examples/audit.py MODEL    # a folder, a Hugging Face id or a .gguf file
"""

from __future__ import annotations

import argparse

from attnmonitor.scan import scan


def main(arguments: list[str] | None = None) -> None:
    """Print the heads with the fewest patterns, and those that use the least of what their weights allow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, Hugging Face id or .gguf file")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    options = parser.parse_args(arguments)

    found = scan(options.model, length=options.length, batch=2)
    print(
        f"{found.model}: {len(found.heads('energy_effective_rank'))} heads, {len(found.not_measured)} layers not seen"
    )
    heads = [
        (rank, gap, f"{layer} head {head}")
        for layer, ranks in found.values["energy_effective_rank"].items()
        for head, (rank, gap) in enumerate(
            zip(ranks.tolist(), found.values["spectral_gap"][layer].tolist(), strict=True)
        )
    ]
    print("fewest patterns:", *(f"  {name}: {rank:.0f}" for rank, _, name in sorted(heads)[:5]), sep="\n")
    widest = sorted(heads, key=lambda head: head[1], reverse=True)[:5]
    print("widest gap between learned and used:", *(f"  {name}: {gap:.1f}x" for _, gap, name in widest), sep="\n")


if __name__ == "__main__":
    main()

"""The table of `benchmarks.cost.spectra` on a CUDA device, timed with device events.

    python -m benchmarks.cost.gpu [--quick] [--json benchmarks/results/gpu.json]

Without a CUDA device it prints that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost.spectra import run


def device_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that one call takes on the device's stream, launches included."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, float32 only")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing measured, nothing written")
        return
    with torch.no_grad():
        found = run("cuda", device_seconds, quick=arguments.quick)
    found["name"] = torch.cuda.get_device_name()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()

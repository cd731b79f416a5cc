"""What the evidence of an alarm costs, in samples: of the alarm's own sample, and of samples without an alarm.

    python -m benchmarks.cost.evidence

A head of a GPT is broken and mended in turn, so that its alarm begins in every second sample; the same is done under a
monitor that has taken the evidence of 200 alarms before, and so keeps none any more. Reported are medians of ratios
within one round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable

import torch
from torch import nn

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.cli.demo import SmallGPT, english, windows
from attnmonitor.monitor.evidence import MOST_TAKEN
from benchmarks.cost.overhead import gpt_30m, interleaved, ratio

LARGE = Rule(
    "large",
    "logit_blowup",
    "query_head",
    Threshold("query_rms", "peers", fire_above=3.0, clear_below=3.0),
    patience=1,
    grace=0,
)


def costs(model: nn.Module, batch: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the cost of evidence as shares of a sample that has none."""
    watched = AttentionMonitor(model, batch, alerts=[LARGE], record=None, strict=True)
    plain = AttentionMonitor(model, batch, alerts=[LARGE], record=None, strict=True)
    plain.load_state_dict({**plain.state_dict(), "evidence": MOST_TAKEN})
    layer = list(watched.coverage)[-1]
    head_dim = watched.coverage[layer].head_dim
    projection = next(
        module for name, module in model.named_modules() if name.startswith(f"{layer}.") and hasattr(module, "weight")
    )
    rows = projection.weight[:head_dim]

    def scaled(factor: float, monitor: AttentionMonitor, expected: int) -> Callable[[], None]:
        def sample() -> None:
            with torch.no_grad():
                rows.mul_(factor)
            assert len(monitor.sample(len(monitor.history)).evidence) == expected

        return sample

    seconds = interleaved(
        {
            "alarm": scaled(1000.0, watched, 1),
            "none": scaled(1e-3, watched, 0),
            "alarm, nothing kept": scaled(1000.0, plain, 0),
            "nothing kept": scaled(1e-3, plain, 0),
            "inspect": lambda: watched.inspect(layer, 0),
        },
        repeats,
    )
    return {
        "sample_seconds": statistics.median(seconds["nothing kept"]),
        "the evidence of an alarm": ratio(seconds["alarm"], seconds["alarm, nothing kept"]) - 1,
        "a sample without an alarm": ratio(seconds["none"], seconds["nothing kept"]) - 1,
        "monitor.inspect": ratio(seconds["inspect"], seconds["nothing kept"]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    logging.getLogger("attnmonitor").setLevel(logging.CRITICAL)
    torch.manual_seed(0)
    text, vocabulary = english()
    models = {
        "GPT 32M, L = 512, batch 4": (gpt_30m(vocabulary), windows(text, 512)[:4]),
        "GPT 1M, L = 64, batch 4": (
            SmallGPT(vocabulary, width=128, num_layers=4, num_heads=4, max_length=64),
            windows(text, 64)[:4],
        ),
    }
    for name, (model, batch) in models.items():
        found = costs(model, batch, options.repeats)
        print(f"{name}: a sample takes {found.pop('sample_seconds'):.3g} s; of that")
        for what, share in found.items():
            print(f"  {what:30s}{share:8.1%}")


if __name__ == "__main__":
    main()

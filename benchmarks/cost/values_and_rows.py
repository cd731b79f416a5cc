"""Share of a sample that the numbers of values, outputs and checked rows cost.

    python -m benchmarks.cost.values_and_rows

Two monitors of one model measure in turn, one with all default metrics and one without these. Reported is how much more
processor time the first takes: the median over rounds, with the 25 % and 75 % quantiles.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from attnmonitor import DEFAULT_METRICS, METRICS, AttentionMonitor
from attnmonitor.cli.demo import english, windows
from benchmarks.cost.overhead import gpt_30m

WITHOUT = [name for name in DEFAULT_METRICS if METRICS[name].summary not in ("values", "checked_rows")]


def extra_shares(length: int, rounds: int) -> list[float]:
    """Return, for each round, the extra processor time of a sample with all default metrics, as a share of it."""
    torch.manual_seed(0)
    text, vocabulary = english()
    model, probe = gpt_30m(vocabulary), windows(text, length)[:4]
    both, monitors = (DEFAULT_METRICS, WITHOUT), []
    for number, metrics in enumerate(both):
        monitors.append(
            AttentionMonitor(model, probe, metrics=metrics, alerts=False, record=None, name=f"monitor_{number}")
        )
    shares = []
    for index in range(rounds + 1):
        seconds = []
        for monitor in monitors:
            started = time.process_time()
            monitor.sample(index)
            seconds.append(time.process_time() - started)
        shares.append(1 - seconds[1] / seconds[0])
    return shares[1:]  # without the first, which warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for length in (128, 512):
        low, median, high = np.quantile(extra_shares(length, options.rounds), (0.25, 0.5, 0.75))
        print(f"GPT 32M, batch 4 x {length}: {median:.1%} of a sample ({low:.1%} to {high:.1%})", flush=True)


if __name__ == "__main__":
    main()

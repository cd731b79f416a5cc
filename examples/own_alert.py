"""Your own rule and action, on a run in which one head is made faulty on purpose.

In the second half, the queries of head 2 in the second layer grow by 10 % with every step. The rule below reads one
metric, and the action stops the loop. Afterwards the record is replayed with another threshold, without a model or
training, and written as an HTML report.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from attnmonitor import AlertEvent, Sample
from attnmonitor.alerts import Rule, Threshold, replay, replay_text
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows
from attnmonitor.record import RunRecord
from attnmonitor.report import write_report

# Fires for a head whose queries grew e^0.4 = 1.5 times more than those of the other heads of the model.
OUTGROWN = Rule(
    name="outgrown",
    kind="logit_blowup",
    scope="query_head",
    when=Threshold("query_rms", "contrast", "log", fire_above=0.4, clear_below=0.2),
    patience=2,
)


def print_event(event: AlertEvent, sample: Sample) -> None:
    """Print the event."""
    # Any function of event and sample can be an action, for example one that lowers the learning rate.
    print(f"action: {event.layer} head {event.head} at step {event.global_step}: {event.message}")


def main(arguments: list[str] | None = None) -> None:
    """Train, make one head faulty, stop at the alarm, replay, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=Path("own_alert_output"), help="folder for record and report")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text, vocabulary = english()
    examples = windows(text, 64)
    model = SmallGPT(vocabulary, width=64, num_layers=2, num_heads=4, max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = attach(
        model,
        optimizer,
        probe=examples[:4],
        every_n_steps=2,
        record=options.out / "run.sqlite",
        alerts=[OUTGROWN],
        actions={"outgrown": [print_event, "stop"]},
    )
    queries_of_head_2 = model.blocks[1].attention.qkv.weight[32:48]
    for step, batch in enumerate(examples[4:].split(8)[: options.steps]):
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()
        if step >= options.steps // 2:
            with torch.no_grad():
                queries_of_head_2.mul_(1.1)
        if monitor.should_stop:
            break
    monitor.close()
    print(f"stopped after step {step}")

    assert monitor.record_path is not None
    record = RunRecord.open(monitor.record_path)
    sooner = replace(OUTGROWN, when=replace(OUTGROWN.when, fire_above=0.25))
    print("with fire_above=0.25 instead of 0.4:", replay_text(replay(record, [sooner])), sep="\n")
    print(f"report: {write_report(monitor.record_path, options.out / 'report.html')}")


if __name__ == "__main__":
    main()

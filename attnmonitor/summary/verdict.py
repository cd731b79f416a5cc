"""What a run comes to, in words: one line first, then a table of the layers.

People open a monitor to learn whether they must do something. The line says it; everything else (charts, table, report)
is there for whoever wants to know why. Only alarms decide the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attnmonitor.alerts.firing import most_severe_first, still_firing
from attnmonitor.record import RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, head_name
from attnmonitor.summary.names import short_layer_names

__all__ = ["verdict", "verdict_of_record"]

_MOST_NAMED = 3  # of heads in a line


def verdict(
    coverage: Mapping[str, LayerCoverage],
    *,
    num_samples: int,
    firing: Sequence[AlertEvent],
    num_cleared: int = 0,
    num_failed: int = 0,
    failure: str | None = None,
    watched: bool = True,
    grace: int = 0,
) -> str:
    """One line for people: whether there is anything to look at, and where.

    Args:
        coverage: How each layer was captured, or why it was not.
        num_samples: Samples taken, failed ones included.
        firing: Alarms that have begun and not cleared.
        num_cleared: Alarms that came and went.
        num_failed: Samples without values.
        failure: Why the last failed sample failed.
        watched: Whether any alert rule was on; without one nobody can say "healthy".
        grace: Samples that the slowest rule waits for before it may fire; before that nobody can say it either.

    Example:
        >>> coverage = {"h.0.attn": LayerCoverage("h.0.attn", how="sdpa", num_query_heads=12)}
        >>> verdict(coverage, num_samples=50, firing=[])
        '12 heads in 1 layer watched over 50 samples: healthy'
    """
    measured = [entry for entry in coverage.values() if entry.measured]
    missed = [entry for entry in coverage.values() if not entry.measured]
    if num_samples == 0:
        return "no sample taken yet"
    if num_failed == num_samples:
        return f"nothing measured: {_count(num_samples, 'sample')} failed ({failure})"
    if missed and not measured:
        return f"nothing measured in {_count(len(missed), 'attention layer')} ({missed[0].layer}: {missed[0].reason})"
    if firing:
        line = _complaint(most_severe_first(firing, coverage), short_layer_names(coverage))
    else:
        heads = _count(sum(entry.num_query_heads for entry in measured), "head")
        over = f"in {_count(len(measured), 'layer')} watched over {_count(num_samples, 'sample')}"
        line = f"{heads} {over}: {_nothing_firing(num_samples, watched, grace)}"
    notes = []
    if num_cleared:
        notes.append(f"{_count(num_cleared, 'alarm')} came and went")
    if num_failed:
        notes.append(f"{_count(num_failed, 'sample')} failed")
    if missed:
        notes.append(f"{_count(len(missed), 'layer')} not measured")
    return "; ".join([line, *notes])


def _nothing_firing(num_samples: int, watched: bool, grace: int) -> str:
    if not watched:
        return "no alert rule was on"
    return "healthy" if num_samples > grace else f"no alarm, but some rules first wait for {grace} samples"


def verdict_of_record(record: RunRecord) -> str:
    """The line for a run record."""
    firing = still_firing(record.events)
    failed = [sample for sample in record.samples if sample.failure is not None]
    return verdict(
        record.coverage,
        num_samples=len(record.samples),
        firing=firing,
        num_cleared=sum(event.state == "cleared" for event in record.events),
        num_failed=len(failed),
        failure=failed[-1].failure if failed else None,
        watched=bool(record.config.get("alerts", True)),
        grace=record.config.get("alerts_grace", 0),
    )


def _complaint(groups: Sequence[Sequence[AlertEvent]], short: Mapping[str, str]) -> str:
    of_run = [events for events in groups if events[0].layer is None]
    others = [events for events in groups if events[0].layer is not None]
    nouns = {"layer" if events[0].head is None else "head" for events in others}
    number = _count(len(others), nouns.pop() if len(nouns) == 1 else "place")
    named = ", ".join(f"{head_name(events[0], short)} ({_kinds_text(events)})" for events in others[:_MOST_NAMED])
    named += f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    if of_run:
        line = f"the run needs a look ({_kinds_text(of_run[0])})"
        return f"{line}, and so {'does' if len(others) == 1 else 'do'} {number}: {named}" if others else line
    return f"{number} {'needs' if len(others) == 1 else 'need'} a look: {named}"


def _kinds_text(events: Iterable[AlertEvent]) -> str:
    """Each kind of fault once, since its first alarm: several rules may see the same fault."""
    since: dict[str, int] = {}
    for event in events:
        step = event.began
        since[event.kind] = min(step, since.get(event.kind, step))
    return ", ".join(f"{kind.replace('_', ' ')} since step {step:,}" for kind, step in since.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

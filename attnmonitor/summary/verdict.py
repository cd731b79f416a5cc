"""One line for people: whether anything in a run needs a look, and where.

People open a monitor to learn whether they must act. The line says so; charts, table and report show why. It begins
with the head that is worst now, or says that nobody can know and what is missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from attnmonitor.alerts.firing import most_severe_first
from attnmonitor.messages import first_names, printable, tail_of
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.record.counts import Doubt, RunCounts
from attnmonitor.sample import AlertEvent, LayerCoverage, head_name
from attnmonitor.summary.names import count_text, fault_names, short_layer_names
from attnmonitor.summary.structure import structure_lines

__all__ = ["closing_lines", "idle_text", "verdict"]

_MOST_LAST = 5  # heads on lines of their own at the end of a run
_MAX_LAYER = 40  # characters of the name of a layer
_CAPTURE_IT = ": attnmonitor.capture.capture(...) in its forward gives its q and k"
_BESIDE_ALARMS = ("failed", "not_measured", "few_heads")  # what alarms do not tell


def verdict(counts: RunCounts) -> str:
    """Return one line: whether there is anything to look at, and where.

    Example:
        >>> from attnmonitor.sample import LayerCoverage
        >>> coverage = {"h.0.attn": LayerCoverage("h.0.attn", how="sdpa", num_query_heads=12)}
        >>> verdict(RunCounts(coverage, num_samples=50))
        '12 heads in 1 layer watched over 50 samples: healthy'
        >>> verdict(RunCounts(coverage, num_samples=5, grace=9))
        'unknown: 12 heads in 1 layer watched over 5 samples: no alarm, but some rules first wait for 9 samples'
    """
    doubts = [_DOUBTS[doubt](counts) for doubt in counts.doubts]
    is_watched = counts.measured and counts.num_samples > counts.num_failed
    watched = (
        f"{count_text(counts.num_heads['query_head'], 'head')} in {count_text(len(counts.measured), 'layer')} "
        f"watched over {count_text(counts.num_samples, 'sample')}"
    )
    if counts.state == "alarm":
        parts = [_alarms_text(most_severe_first(counts.firing, counts.coverage), counts.coverage)]
    elif counts.state == "healthy":
        parts = [f"{watched}: healthy"]
    else:
        parts = [f"unknown: {f'{watched}: no alarm, but ' if is_watched else ''}{doubts[0]}", *doubts[1:]]
    return printable("; ".join([*parts, *_notes(counts)]), one_line=True)


def _notes(counts: RunCounts) -> list[str]:
    """Return what is said after the verdict itself."""
    notes = []
    if counts.state == "alarm":
        notes += [_DOUBTS[doubt](counts) for doubt in counts.doubts if doubt in _BESIDE_ALARMS]
    if counts.num_cleared:
        notes.append(f"{count_text(counts.num_cleared, 'alarm')} came and went")
    if counts.num_failed and "failed" not in counts.doubts:
        notes.append(f"{count_text(counts.num_failed, 'sample')} failed")
    # A rule about a metric that is not measured by default is idle in most runs.
    turned_off = {rule: missing for rule, missing in counts.idle_rules.items() if set(missing) & set(DEFAULT_METRICS)}
    if turned_off:
        notes.append(f"{count_text(len(turned_off), 'rule')} cannot fire without {first_names(_missing(turned_off))}")
    return notes


def idle_text(idle_rules: Mapping[str, Sequence[str]]) -> str:
    """Return one line about the rules that cannot fire, given with the metrics they miss; "" where there is none.

    Example:
        >>> idle_text({"dead": ["energy_rms"], "key_sink": ["energy_rms", "key_incoherence"]})
        '2 rules cannot fire (dead, key_sink), as metrics= leaves out energy_rms, key_incoherence'
    """
    if not idle_rules:
        return ""
    number = count_text(len(idle_rules), "rule")
    return f"{number} cannot fire ({', '.join(idle_rules)}), as metrics= leaves out {', '.join(_missing(idle_rules))}"


def _missing(idle_rules: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted({metric for metrics in idle_rules.values() for metric in metrics})


def _failed_text(counts: RunCounts) -> str:
    if counts.num_failed < counts.num_samples:
        return f"the latest sample failed ({counts.failure}), and {counts.num_failed:,} in all"
    return f"nothing measured: {count_text(counts.num_samples, 'sample')} failed ({counts.failure})"


def _not_measured_text(counts: RunCounts) -> str:
    missed = counts.not_measured
    if not missed:
        return "nothing measured: no attention layer was seen"
    first = missed[0]
    way_out = "" if first.how or "attach again" in first.reason else _CAPTURE_IT
    if not counts.measured:
        name = tail_of(first.layer, _MAX_LAYER)
        return f"nothing measured in {count_text(len(missed), 'attention layer')} ({name}: {first.reason}){way_out}"
    named = first_names([tail_of(layer.layer, _MAX_LAYER) for layer in missed])
    return (
        f"{len(missed)} of {count_text(len(counts.coverage), 'layer')} not measured: {named} ({first.reason}){way_out}"
    )


def _few_heads_text(counts: RunCounts) -> str:
    number = counts.num_heads
    scope, least = next((scope, least) for scope, least in counts.least_heads.items() if number[scope] < least)
    noun = "KV head" if scope == "kv_head" and number["kv_head"] != number["query_head"] else "head"
    have = f"{count_text(number[scope], noun)} {'is' if number[scope] == 1 else 'are'} too few to compare"
    return f"{have}, which needs about {least} heads"


_DOUBTS: Mapping[Doubt, Callable[[RunCounts], str]] = {
    "no_sample": lambda counts: "no sample taken yet",
    "failed": _failed_text,
    "not_measured": _not_measured_text,
    "no_rules": lambda counts: "no alert rule was on (alerts=True turns on the default ones)",
    "waiting": lambda counts: f"some rules first wait for {count_text(counts.grace, 'sample')}",
    "few_heads": _few_heads_text,
}


def _alarms_text(places: Sequence[Sequence[AlertEvent]], coverage: Mapping[str, LayerCoverage]) -> str:
    heading, heads = _alarm_parts(places, coverage)
    return f"{heading}: {first_names(heads)}" if heads else heading


def _alarm_parts(
    places: Sequence[Sequence[AlertEvent]], coverage: Mapping[str, LayerCoverage]
) -> tuple[str, list[str]]:
    """Return how many places need a look, and each head or layer with its faults, worst first."""
    short = {layer: tail_of(name, _MAX_LAYER) for layer, name in short_layer_names(coverage).items()}
    of_run = [events for events in places if events[0].layer is None]
    others = [events for events in places if events[0].layer is not None]
    nouns = {"layer" if events[0].head is None else "head" for events in others}
    number = count_text(len(others), nouns.pop() if len(nouns) == 1 else "place")
    heads = [f"{head_name(events[0], short, coverage)} ({fault_names(events)})" for events in others]
    if of_run:
        line = f"the run needs a look ({fault_names(of_run[0], courses=False)})"
        return f"{line}, and so {'does' if len(others) == 1 else 'do'} {number}" if others else line, heads
    return f"{number} {'needs' if len(others) == 1 else 'need'} a look", heads


def closing_lines(counts: RunCounts, opening: str, width: int = 80) -> str:
    """Return the verdict in lines of at most ``width`` characters, with the five worst heads on lines of their own.

    After it stands what may be a mistake in the model, which no number of a head shows.

    Args:
        counts: The run.
        opening: Words before it on the first line.
        width: Characters of a line.
    """
    indented = textwrap.TextWrapper(width, initial_indent="  ", subsequent_indent="    ")
    seen = structure_lines(counts.coverage)
    structure = [indented.fill(f"seen at attach: {line}") for line in seen[:_MOST_LAST]]
    structure += [f"  and {len(seen) - _MOST_LAST:,} more in print(monitor)"] if len(seen) > _MOST_LAST else []
    if counts.state != "alarm":
        return "\n".join([textwrap.fill(f"{opening}{verdict(counts)}", width, subsequent_indent="  "), *structure])
    heading, heads = _alarm_parts(most_severe_first(counts.firing, counts.coverage), counts.coverage)
    lines = [textwrap.fill(f"{opening}{heading}{':' if heads else ''}", width, subsequent_indent="  ")]
    lines += [indented.fill(head) for head in heads[:_MOST_LAST]]
    lines += [f"  and {len(heads) - _MOST_LAST:,} more"] if len(heads) > _MOST_LAST else []
    notes = "; ".join(_notes(counts))
    return printable("\n".join([*lines, *([indented.fill(notes)] if notes else []), *structure]))

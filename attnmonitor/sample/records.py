"""The plain records of one sample: values, coverage and alert events."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import singledispatch
from typing import Literal, TypeVar

from torch import Tensor

from attnmonitor.messages import did_you_mean
from attnmonitor.sample.evidence import HeadEvidence
from attnmonitor.sample.scopes import AlarmScope, RunState

__all__ = [
    "AlarmKey",
    "AlertEvent",
    "ByLayer",
    "LayerCoverage",
    "Sample",
    "html_of",
]

_Value = TypeVar("_Value")

AlarmKey = tuple[str, str | None, str, int | None]
"""What makes two events those of one alarm: rule, layer, scope, head."""


class ByLayer(dict[str, _Value]):
    """A dict by layer name whose KeyError suggests similar layer names.

    Example:
        >>> ByLayer({"blocks.0": 1, "blocks.1": 2})["blocks.1.attn"]
        Traceback (most recent call last):
        KeyError: "no layer 'blocks.1.attn'; did you mean 'blocks.1' or 'blocks.0'?"
    """

    def __missing__(self, layer: str) -> _Value:
        raise KeyError(f"no layer {layer!r}; {did_you_mean(layer, self, otherwise='there are')}")


@singledispatch
def html_of(shown: object) -> str | None:
    """Return what a notebook shows of an object; `attnmonitor.summary.notebook` says how for those of a run."""
    return None


@dataclass(frozen=True)
class LayerCoverage:
    """How one attention layer was captured and how well that was verified, or why it was not measured.

    Attributes:
        layer: Name of the module; a module called again in one forward is ``name#2``, ``name#3``.
        how: How it was captured: ``"sdpa"``, ``"traced"``, ``"interface"``, ``"mha"``, ``"kernel"``, ``"explicit"``;
            ``""`` when it was not.
        kind: ``"self"`` or ``"cross"``; ``""`` when not captured.
        num_query_heads: Query heads of the layer.
        num_kv_heads: Key/value heads of the layer.
        head_dim: Size d of one head.
        scale: The softmax scale that the layer uses; NaN when not captured.
        error: Largest deviation between the attention rebuilt from q, k, scale and mask and the layer's own output,
            relative to the size of that output. None where there was no output to compare with.
        outside: What acts on the logits outside the energy field: ``"softcap"``, ``"sinks"``, ``"bias"``, ``"window"``.
        reason: Why the layer was not measured; ``""`` when it was.
        weights_reason: Why its projections were not found and its weight metrics are NaN; ``""`` when they were found
            or not needed.
        weights_note: What its weight metrics leave out beside rotary embedding and biases; ``""`` for nothing.
        values_reason: Why metrics of its values or of what its heads write are NaN; ``""`` when they are not.
        num_keys: Key positions of the probe in this layer, padding included; 0 when not captured.
        tiled: Whether query head h reads KV head h % num_kv_heads, as in code that repeats all keys as one block, and
            not h // (num_query_heads / num_kv_heads).
        sees: What a query sees: ``"causal"``, ``"both"`` sides, a ``"window"``, its own of several ``"documents"``,
            another sequence (``"cross"``), or features instead of positions (``"channels"``); ``""`` when not captured.
        future_mass: Mean attention probability on later positions; NaN where queries and keys differ in position.
        padding_mass: Mean attention probability on padding; NaN where there is none.
        documents: Documents that the probe's rows were cut into; 0 where they were left whole.
        reach_back: How many earlier positions a query sees at most; None for all, or where it does not apply.
        reach_ahead: The same of later positions: 0 for a causal layer.
        reaches_evenly: Whether every query sees ``reach_ahead`` later positions, as far as there are so many.
        remarks: What stood out at attach: heads whose queries or keys are zero, constant or equal to another's, whether
            they depend on position, dropout in evaluation mode.
    """

    layer: str
    how: str = ""
    kind: str = ""
    num_query_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    scale: float = float("nan")
    error: float | None = None
    outside: tuple[str, ...] = ()
    reason: str = ""
    weights_reason: str = ""
    weights_note: str = ""
    values_reason: str = ""
    num_keys: int = 0
    tiled: bool = False
    sees: str = ""
    future_mass: float = float("nan")
    padding_mass: float = float("nan")
    documents: int = 0
    reach_back: int | None = None
    reach_ahead: int | None = None
    reaches_evenly: bool = False
    remarks: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        """Return whether every field is the same; NaN is the same as NaN."""
        return isinstance(other, LayerCoverage) and repr(vars(self)) == repr(vars(other))

    def __hash__(self) -> int:
        return hash(repr(vars(self)))

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, KV heads and head size; zeros when not captured."""
        return (self.num_query_heads, self.num_kv_heads, self.head_dim)

    @property
    def relative_scale(self) -> float:
        """The scale as a multiple of the usual ``1/√head_dim``; NaN when not captured."""
        return self.scale * math.sqrt(self.head_dim)

    def kv_head_of(self, query_head: int) -> int:
        """Return the KV head that a query head reads."""
        return query_head % self.num_kv_heads if self.tiled else query_head * self.num_kv_heads // self.num_query_heads

    def query_heads_of(self, kv_head: int) -> tuple[int, ...]:
        """Return the query heads that read a KV head."""
        return tuple(head for head in range(self.num_query_heads) if self.kv_head_of(head) == kv_head)

    @property
    def measured(self) -> bool:
        """Whether the layer was measured: its numbers are verified and are logged."""
        return not self.reason


@dataclass(frozen=True)
class AlertEvent:
    """The beginning, the escalation or the end of an alarm about a head, a layer or the run.

    An alarm escalates when it becomes critical, and whenever it is twice as far out as at its latest event.

    Attributes:
        rule: Name of the rule, for example ``"energy_hot"``.
        kind: The kind of fault it points to, for example ``"logit_blowup"``.
        scope: ``"query_head"``, ``"kv_head"``, ``"layer"`` or ``"run"``: what ``head`` counts.
        layer: Name of the layer, or None for a run-level event.
        head: Index in that scope, or None for a layer or the run.
        value: The metric's value at this event; of an alarm that is firing, its value when it fired.
        baseline: The value it is compared with (the metric's own past), NaN where the rule has none.
        global_step: Optimizer steps done.
        state: ``"firing"`` or ``"cleared"``.
        severity: ``"warning"``; ``"critical"`` once an alarm has fired for the rule's ``hold`` samples.
        since_step: Step at which the alarm began.
        message: One line for a person.
        metric: What ``value``, ``now`` and ``worst`` are values of; ``""`` where that is unknown.
        now: The value at this event; of an alarm that is firing, at the latest sample.
        worst: The highest value so far; the lowest, of an alarm on values that are too low.
        distance: How far out the alarm is now: 1 at the limit, 2 at twice the limit; infinite where a value is not
            finite, NaN where it is unknown.
    """

    rule: str
    kind: str
    scope: AlarmScope
    layer: str | None
    head: int | None
    value: float
    baseline: float
    global_step: int
    state: Literal["firing", "cleared"]
    severity: Literal["warning", "critical"] = "warning"
    since_step: int | None = None
    message: str = ""
    metric: str = ""
    # What an alarm came to since it began does not make it another alarm.
    now: float = field(default=math.nan, compare=False)
    worst: float = field(default=math.nan, compare=False)
    distance: float = field(default=math.nan, compare=False)

    def __eq__(self, other: object) -> bool:
        """Return whether every field that is compared is the same; NaN is the same as NaN."""
        return isinstance(other, AlertEvent) and self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[object, ...]:
        values = (getattr(self, each.name) for each in fields(self) if each.compare)
        return tuple("NaN" if value != value else value for value in values)

    @property
    def key(self) -> AlarmKey:
        """Which alarm it is an event of."""
        return (self.rule, self.layer, self.scope, self.head)

    @property
    def began(self) -> int:
        """Step at which the alarm began; the step of the event where that is unknown."""
        return self.global_step if self.since_step is None else self.since_step


@dataclass(frozen=True)
class Sample:
    """Everything that one probe forward gave.

    Attributes:
        global_step: Optimizer steps done when it was taken.
        values: ``values[metric][layer]``: CPU float32 tensor ``(num_heads,)``, the mean over the probe's sequences; NaN
            where a head could not be measured. Weight metrics are there only in the samples that measured them.
        spread: The same shape: standard deviation over the probe's sequences (population; 0 for one sequence).
        coverage: How each layer was captured, or why it was not.
        events: Alerts that began or cleared with this sample.
        firing: Alerts that are firing now, the new ones among them.
        diagnostics: About the measurement itself: ``certified_fraction``, ``decided_fraction``,
            ``invariant_residual``, ``overhead``; and ``after_last_attention``: ``"skipped"``, or why the probe's
            forward was run in full.
        seconds: Cost of the sample, in seconds.
        failures: Number of failures in this run so far: of samples, layers, the record, loggers and actions.
        failure: Why this sample has no values; None when it has.
        requests: What alerts request of the training loop, by the monitor's ``actions``: ``"stop"``, ``"checkpoint"``.
        verdict: State of the run so far, in one line for people.
        name: Name of the monitor, the middle part of its keys ``attention/<name>/…``; None without one.
        evidence: What the heads did whose alarms began with this sample, the worst first.
        state: State of the run so far, ``"alarm"``, ``"healthy"`` or ``"unknown"``; the verdict says why.
    """

    global_step: int
    values: Mapping[str, Mapping[str, Tensor]]
    spread: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    coverage: Mapping[str, LayerCoverage] = field(default_factory=dict)
    events: list[AlertEvent] = field(default_factory=list)
    firing: list[AlertEvent] = field(default_factory=list)
    diagnostics: Mapping[str, float | str] = field(default_factory=dict)
    seconds: float = float("nan")
    failures: int = 0
    failure: str | None = None
    requests: tuple[str, ...] = ()
    verdict: str = ""
    name: str | None = None
    evidence: list[HeadEvidence] = field(default_factory=list)
    state: RunState = "unknown"

    def _repr_html_(self) -> str | None:
        return html_of(self)

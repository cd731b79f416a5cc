"""Which heads' evidence a sample takes: those whose alarms begin, and in turn the healthy ones.

What a sample computed of its layers is kept until it was judged (`attnmonitor.measurement.kept`). Then the heads whose
alarms have begun are looked at. To have something to compare with, the heads of one layer at a time are looked at in
healthy samples too, seldom enough to cost a small part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnmonitor.alerts import Alerts
from attnmonitor.measurement.evidence import evidence_of
from attnmonitor.measurement.kept import Keeper, KeptLayer
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.tokens import Keys, ProbeTokens
from attnmonitor.messages import did_you_mean, whole_argument
from attnmonitor.parallel.process_state import restored_random_state
from attnmonitor.sample import AlarmKey, AlertEvent, HeadEvidence, LayerCoverage, scope_noun, worst_first

__all__ = ["EvidenceTaker", "check_head"]

MOST_TAKEN = 200
"""Alarms of a run whose evidence is kept."""

_MOST_IN_SAMPLE = 8  # heads: where many alarm at once, the worst of them
_SAMPLES_OF_ROUND = 64  # in which each layer is looked at once in a healthy sample
_MOST_HEALTHY = 2000  # heads, about 8 KB each

_Head = tuple[str, str, int]
"""Layer, scope and index of a head; the scope of one that is a query head and a KV head is ``"query_head"``."""

Contained = Callable[[str], Any]


class EvidenceTaker:
    """Takes the evidence of the heads whose alarms begin.

    Args:
        probe: The probe, for its tokens.
        tokens: Decodes them.
        contained: Context that keeps an exception out of training, with what failed in words.

    Attributes:
        num_taken: Alarms of the run whose evidence was taken.
    """

    def __init__(self, probe: Probe, tokens: ProbeTokens, contained: Contained) -> None:
        self.num_taken = 0
        self._probe, self._tokens, self._contained = probe, tokens, contained
        self._healthy: dict[_Head, HeadEvidence] = {}
        self._late: dict[AlarmKey, AlertEvent] = {}  # alarms whose layer was not kept when they began
        self._num_samples = 0
        self._turn: str | None = None

    def without_decoder(self, probe: Probe) -> EvidenceTaker:
        """Return one for a copy of the monitor, which takes no samples: a decoder may not be picklable."""
        taker = EvidenceTaker(probe, ProbeTokens(None), self._contained)
        taker.num_taken = self.num_taken
        return taker

    def wanted(self, alerts: Alerts, layers: Mapping[str, LayerCoverage]) -> set[str] | None:
        """Return the layers to keep first in the next sample; None where nothing is to be kept.

        Those whose heads may alarm next, those whose alarms have no evidence yet, and the one whose turn it is.
        """
        if not alerts.rules or self.num_taken >= MOST_TAKEN:
            return None
        measured = [name for name, layer in layers.items() if layer.measured]
        stride = max(1, _SAMPLES_OF_ROUND // max(1, len(measured)))
        turn, rest = divmod(self._num_samples, stride)
        self._turn = measured[turn % len(measured)] if measured and not rest else None
        self._num_samples += 1
        wanted = {layer for scope, layer, _ in alerts.pending} | {event.layer for event in self._late.values()}
        return {layer for layer in (*wanted, self._turn) if layer is not None}

    def take(
        self,
        keeper: Keeper,
        alerts: Alerts,
        began: Sequence[AlertEvent],
        coverage: Mapping[str, LayerCoverage],
        global_step: int,
    ) -> list[HeadEvidence]:
        """Return the evidence of alarms, the worst first.

        Args:
            keeper: What was kept of the sample's forward.
            alerts: The alarms, this sample among them.
            began: Events of alarms that began with this sample.
            coverage: How each layer was captured in this sample.
            global_step: The sample's.
        """
        firing = {alarm.key: alarm for alarm in alerts.firing}
        late = [firing[key] for key in self._late if key in firing]
        asked = [event for event in worst_first([*began, *late]) if event.head is not None]
        tried, self._late = set(self._late), {}
        looked: dict[_Head, HeadEvidence] = {}
        taken = []
        for event in asked:
            head = _head_of(event, coverage)
            is_new = head not in looked
            if self.num_taken >= MOST_TAKEN or (is_new and len(looked) >= _MOST_IN_SAMPLE):
                continue
            if is_new:
                kept = _whole(keeper, head, coverage)
                if kept is None:
                    if event.key not in tried:
                        self._late[event.key] = event
                    continue
                with self._contained("the evidence of an alarm"):
                    [looked[head]] = self._look(kept, head[0], head[1], [head[2]], coverage, global_step)
            if head in looked:
                taken.append(_as_asked(looked[head], event, self._healthy.get(head)))
                self.num_taken += 1
        with self._contained("the evidence of healthy heads"):
            self._look_at_healthy(keeper, alerts, coverage, global_step)
        return taken

    def look(
        self, kept: KeptLayer, layer: str, scope: Any, head: int, coverage: Mapping[str, LayerCoverage], step: int
    ) -> HeadEvidence:
        """Return the evidence of one head that somebody asks for."""
        [evidence] = self._look(kept, layer, scope, [head], coverage, step)
        return evidence

    def _look(
        self,
        kept: KeptLayer,
        layer: str,
        scope: Any,
        heads: Sequence[int],
        coverage: Mapping[str, LayerCoverage],
        global_step: int,
    ) -> list[HeadEvidence]:
        keys = Keys(*kept.size, kept.kind, any(each.kind == "cross" for each in coverage.values()))
        token_at = self._tokens.of(self._probe.batch, layer, keys)
        with restored_random_state():  # of what the user's decoder may draw
            found = evidence_of(kept, layer, scope, heads, global_step=global_step, token_at=token_at)
        if failure := self._tokens.take_failure():
            with self._contained("decode"):
                raise ValueError(f"decode: {failure}; evidence has no such tokens")
        return found

    def _look_at_healthy(
        self, keeper: Keeper, alerts: Alerts, coverage: Mapping[str, LayerCoverage], global_step: int
    ) -> None:
        """Look at the heads of the layer whose turn it is, and keep those without an alarm."""
        layer = self._turn
        if layer is None or layer not in keeper.layers:
            return
        alarming = {_head_of(alarm, coverage) for alarm in alerts.firing if alarm.head is not None}
        alarming |= {_head(coverage, at, scope, head) for scope, at, head in alerts.pending if head is not None and at}
        for scope, number in _scopes(coverage[layer]):
            kept = _whole(keeper, (layer, scope, 0), coverage)
            if kept is None:
                return
            for evidence in self._look(kept, layer, scope, range(number), coverage, global_step):
                head = (layer, scope, evidence.head)
                if head not in alarming and (head in self._healthy or len(self._healthy) < _MOST_HEALTHY):
                    self._healthy[head] = evidence


def check_head(coverage: Mapping[str, LayerCoverage], layer: object, head: object, scope: object) -> None:
    """Raise ValueError unless there is such a head and its layer is measured; RuntimeError where nothing is."""
    if not coverage:
        raise RuntimeError(
            f"{layer}: this process measures nothing: ask the first of those that share the model, once its probe has "
            "a batch"
        )
    if scope not in ("query_head", "kv_head"):
        raise ValueError(f"scope={scope!r}; give 'query_head' or 'kv_head'")
    known = coverage.get(layer) if isinstance(layer, str) else None
    if known is None:
        near = did_you_mean(layer, list(coverage), otherwise="there are")
        raise ValueError(f"layer={layer!r} is not an attention layer of this model; {near}")
    if not known.measured:
        raise ValueError(f"layer={layer!r} is not measured: {known.reason}")
    number = known.num_query_heads if scope == "query_head" else known.num_kv_heads
    index = whole_argument(head, least=0)
    if index is None or index >= number:
        noun = scope_noun(str(scope), known)
        raise ValueError(f"head={head!r}: {layer} has the {noun}s 0 to {number - 1}; give one of these numbers")


def _scopes(layer: LayerCoverage) -> Iterator[tuple[str, int]]:
    """Yield each scope whose heads differ, and how many there are."""
    yield "query_head", layer.num_query_heads
    if layer.num_kv_heads != layer.num_query_heads:
        yield "kv_head", layer.num_kv_heads


def _head_of(event: AlertEvent, coverage: Mapping[str, LayerCoverage]) -> _Head:
    assert event.layer is not None
    assert event.head is not None
    return _head(coverage, event.layer, event.scope, event.head)


def _head(coverage: Mapping[str, LayerCoverage], layer: str, scope: str, head: int) -> _Head:
    known = coverage.get(layer)
    is_one_to_one = known is not None and known.num_kv_heads == known.num_query_heads
    return layer, "query_head" if is_one_to_one else scope, head


def _whole(keeper: Keeper, head: _Head, coverage: Mapping[str, LayerCoverage]) -> KeptLayer | None:
    """Return what was kept of a head's layer; None where nothing was, or where other processes hold heads of it."""
    kept, known = keeper.layers.get(head[0]), coverage.get(head[0])
    if kept is None or known is None or not known.measured:
        return None
    return kept if kept.num_heads == {"query_head": known.num_query_heads, "kv_head": known.num_kv_heads} else None


def _as_asked(evidence: HeadEvidence, event: AlertEvent, healthy: HeadEvidence | None) -> HeadEvidence:
    """Return the evidence under the name of the alarm that asks for it."""
    scope: Any = event.scope
    before = None if healthy is None else replace(healthy, scope=scope)
    return replace(evidence, rule=event.rule, scope=scope, healthy=before)

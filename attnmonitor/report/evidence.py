"""The evidence of alarms on the page: what the chosen head did when its alarm began, and before."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from torch import Tensor

from attnmonitor.messages import printable
from attnmonitor.record import RunRecord
from attnmonitor.report.tables import table
from attnmonitor.sample import HeadEvidence, LayerCoverage
from attnmonitor.summary.png import png_of
from attnmonitor.summary.style import ALARM_COLOR, VIRIDIS

__all__ = ["evidence_fragment", "evidence_section"]

_MOST_POSITIONS = 8
_HEADER = ("sequence", "position", "leverage", "energy share", "token")
_NOT_FINITE = 255  # its place in the palette


def evidence_section(record: RunRecord) -> str:
    """The evidence of all alarms of a run, hidden until the script shows that of the chosen head."""
    alarms = record.evidence
    first = {(each.layer, each.scope, each.head): each for each in reversed(alarms)}  # of each head
    fragments = "".join(evidence_fragment(each, record.coverage, opened=each in first.values()) for each in alarms)
    if not fragments:
        return ""
    return f"""<div class="evidence" hidden>
    <h3>Evidence <small class="head-name"></small></h3>
    <p class="note">From the sample in which the alarm began. Attention: brighter is more, vermilion is not finite.</p>
    {fragments}
  </div>"""


def evidence_fragment(evidence: HeadEvidence, coverage: Mapping[str, LayerCoverage], *, opened: bool) -> str:
    """The evidence of one alarm, with the heads that it is about as ``data-`` attributes.

    Args:
        evidence: The evidence.
        coverage: How each layer was captured, so that it is found by query head and by KV head.
        opened: Whether it is shown without a click.
    """
    known, head = coverage.get(evidence.layer), evidence.head
    of_scope: dict[str, tuple[int, ...]] = {evidence.scope: (head,)}
    if known is not None and known.num_kv_heads:
        heads = (head,) if evidence.scope == "query_head" else known.query_heads_of(head)
        of_scope = {"query_head": heads, "kv_head": (known.kv_head_of(heads[0]),)} if heads else of_scope
    data = "".join(
        f' data-{scope.replace("_", "-")}="{" ".join(map(str, heads))}"' for scope, heads in of_scope.items()
    )
    columns = _column(evidence, f"At the alarm, step {evidence.global_step:,}")
    if evidence.healthy is not None:
        columns += _column(evidence.healthy, f"Before, healthy at step {evidence.healthy.global_step:,}")
    summary = escape(_shown(f"{evidence.rule or 'Asked for'}, step {evidence.global_step:,}"))
    return f"""<details data-layer="{escape(evidence.layer)}"{data}{" open" if opened else ""}>
      <summary>{summary}</summary><div class="columns">{columns}</div></details>"""


def _column(evidence: HeadEvidence, heading: str) -> str:
    rows = [
        (
            f"{sequence}",
            f"{position:,}",
            f"{leverage:.3f}",
            f"{share:.3f}",
            "" if token is None else _shown(repr(token)),
        )
        for sequence, position, leverage, share, token in evidence.positions[:_MOST_POSITIONS]
    ]
    positions = table(f"Key positions, {heading}", _HEADER, rows) if rows else ""
    values = ", ".join(f"{value:.3g}" for value in evidence.singular_values.tolist()[:8])
    note = f"Singular values of the energy field: {values}" if values else "Its singular values are not known."
    return f"""<section>
      <h4>{escape(_shown(heading))}</h4>
      {_strip(evidence)}
      {positions or "<p class='note'>No key position stands out.</p>"}
      <p class="note">{escape(note)}</p>
    </section>"""


def _strip(evidence: HeadEvidence) -> str:
    num_rows, num_columns = evidence.attention.shape
    if not num_rows or not num_columns:
        return ""
    picture = base64.b64encode(_png(evidence.attention)).decode()
    sequences = list(dict.fromkeys(sequence for sequence, _ in evidence.rows))
    of = ", ".join(map(str, sequences[:4]))
    text = (
        f"{num_rows} attention rows of sequence{'' if len(sequences) == 1 else 's'} {of}, "
        f"{evidence.num_keys:,} keys from left to right"
    )
    return (
        f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{picture}"><figcaption class="note">'
        f"{escape(text)}</figcaption></figure>"
    )


def _shown(text: str) -> str:
    return printable(text, one_line=True)


def _png(probability: Tensor) -> bytes:
    """A picture with one pixel for each entry of ``(R, C)``; the root of a probability chooses its color."""
    shade = (probability.nan_to_num().clamp(0, 1).sqrt() * (_NOT_FINITE - 1)).round().int()
    rows = shade.masked_fill(~probability.isfinite(), _NOT_FINITE).tolist()
    palette = bytes(part for place in range(_NOT_FINITE) for part in _color(place / (_NOT_FINITE - 1)))
    return png_of(map(bytes, rows), probability.shape[1], palette + bytes.fromhex(ALARM_COLOR[1:]))


def _color(share: float) -> tuple[int, ...]:
    place = share * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    ends = (bytes.fromhex(color[1:]) for color in VIRIDIS[low : low + 2])
    return tuple(round(a + (place - low) * (b - a)) for a, b in zip(*ends, strict=True))

"""The evidence of a head: which keys dominate, where it looks, and how many patterns its logits have.

It is small and plain, so that it can be kept for every alarm, printed, drawn and read back from a record.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnmonitor.messages import printable, tail_of
from attnmonitor.sample.scopes import Scope

__all__ = ["HeadEvidence", "Position"]

Position = tuple[int, int, float, float, str | None]
"""A key position: sequence of the probe, position in it, leverage, share of the field's energy, and its token."""

_WIDTH = 80
_MAX_PRINTED = 8  # positions, and rows of attention
_SHADES = " .:-=+*#%@"


@dataclass(frozen=True, eq=False)
class HeadEvidence:
    r"""What one head did in one sample.

    Attributes:
        layer: Name of the layer.
        head: Index in ``scope``.
        scope: ``"query_head"``, or ``"kv_head"``: there the queries of all heads that read the key head are taken
            together, and attention is the mean over these heads.
        global_step: Optimizer steps done when it was taken.
        rule: Name of the rule whose alarm began; None where it was asked for.
        positions: The key positions with the largest leverage and the largest share of the energy field, 16 at most,
            in the order of the sum of both; first those whose keys are not finite. The token is None where no
            ``decode`` was given or the probe holds no ids of this layer's positions.
        attention: ``(R, C)``: up to 32 of the rows that verification rebuilds, and their probability in C ≤ 32 equal
            parts of the key positions.
        singular_values: Leading singular values of the energy field in `sequence`, 16 at most, descending.
        rows: Sequence and query position of each row of ``attention``.
        num_keys: Key positions that the columns of ``attention`` stand for.
        sequence: The sequence that ``singular_values`` are of: that of the first of ``positions``.
        group: Query heads that were taken together.
        healthy: The same head in the latest sample that showed it without an alarm; None where none is in reach.
    """

    layer: str
    head: int
    scope: Scope
    global_step: int
    rule: str | None
    positions: list[Position]
    attention: Tensor
    singular_values: Tensor
    rows: list[tuple[int, int]]
    num_keys: int
    sequence: int = 0
    group: int = 1
    healthy: HeadEvidence | None = None

    @property
    def noun(self) -> str:
        """``"KV head"`` for one that several query heads read, else ``"head"``."""
        return "KV head" if self.scope == "kv_head" and self.group > 1 else "head"

    def positions_text(self, most: int = 3) -> str:
        """Return the first positions in one line, ``""`` where there are none.

        Args:
            most: How many are named.
        """
        one_sequence = len({sequence for sequence, *_ in self.positions[:most]}) < 2
        named = [
            (f"{position}" if one_sequence else f"{sequence}:{position}")
            + ("" if token is None else f" {printable(repr(token), one_line=True)}")
            + f" (leverage {leverage:.2g}, energy {share:.2g})"
            for sequence, position, leverage, share, token in self.positions[:most]
        ]
        of = f" of sequence {self.positions[0][0]}" if named and one_sequence else " (sequence:position)"
        return f"positions{of}: {', '.join(named)}" if named else ""

    def __str__(self) -> str:
        """The evidence in lines of at most 80 characters."""
        return printable("\n".join(self._lines()))

    def __repr__(self) -> str:
        """One line, for lists of them."""
        return f"<HeadEvidence: {self._heading}>"

    @property
    def _heading(self) -> str:
        end = f" {self.noun} {self.head} at step {self.global_step:,}"
        end += "" if self.rule is None else f": {printable(self.rule, one_line=True):.40}"
        return tail_of(printable(self.layer, one_line=True), max(8, _WIDTH - len(end))) + end

    def _lines(self) -> list[str]:
        lines = [self._heading, *_position_lines(self.positions)]
        values = ", ".join(f"{value:.3g}" for value in self.singular_values.tolist())
        lines += textwrap.wrap(
            f"singular values of the energy field in sequence {self.sequence}: {values or 'unknown'}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        lines += _attention_lines(self)
        if self.healthy is not None:
            lines += [f"  before, at step {self.healthy.global_step:,}:"]
            lines += [f"  {line}"[:_WIDTH] for line in self.healthy._lines()[1:]]
        return lines


def _position_lines(positions: Sequence[Position]) -> list[str]:
    if not positions:
        return ["  no key position stands out: keys or queries are zero"]
    lines = [f"  {'sequence':>8} {'position':>8} {'leverage':>9} {'energy':>8}  token"]
    for sequence, position, leverage, share, token in positions[:_MAX_PRINTED]:
        text = "" if token is None else printable(repr(token), one_line=True)
        lines.append(f"  {sequence:>8} {position:>8} {leverage:>9.3f} {share:>8.3f}  {text}"[:_WIDTH].rstrip())
    return lines


def _attention_lines(evidence: HeadEvidence) -> list[str]:
    num_rows, num_columns = evidence.attention.shape
    if not num_rows:
        return ["  attention: no row of it is known"]
    step = max(1, num_rows // _MAX_PRINTED)
    lines = [f"  attention, {evidence.num_keys} keys in {num_columns} columns ('{_SHADES[-1]}' is 1, '?' not finite):"]
    for (sequence, position), row in list(zip(evidence.rows, evidence.attention.tolist(), strict=True))[::step]:
        shades = "".join(_shade(probability) for probability in row)
        lines.append(f"  {f'{sequence}:{position}':>12} |{shades}|"[:_WIDTH])
    return lines[: _MAX_PRINTED + 1]


def _shade(probability: float) -> str:
    if not 0 <= probability <= 1.01:
        return "?"
    return _SHADES[min(len(_SHADES) - 1, int(probability**0.5 * (len(_SHADES) - 1) + 0.5))]

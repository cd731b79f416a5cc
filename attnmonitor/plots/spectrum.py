"""The cumulative energy spectrum of a head: the curve that the effective rank is read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from attnmonitor.plots.style import figure_of, new_axes, strip, title
from attnmonitor.summary.style import BAND_COLOR, FAINT_INK, HEAD_COLORS, OTHER_HEADS_COLOR

if TYPE_CHECKING:
    from attnmonitor.functional import EnergySpectrum

__all__ = ["spectrum"]


def spectrum(
    singular_values: ArrayLike | EnergySpectrum,
    *,
    fraction: float = 0.9,
    head_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""How many components hold how much of a field's energy: :math:`\sum_{i \le r} \sigma_i^2 / T` over r.

    Args:
        singular_values: ``(…, r)`` descending, one row per head, or an `EnergySpectrum`, whose exact total energy T is
            then used; for plain singular values T is the sum of their squares.
        fraction: The share that defines the effective rank; a dot marks where each head reaches it.
        head_names: Names for up to five rows; more rows are drawn gray, with the median over them in color.
        ax: Axes to draw into; by default a new figure.

    Returns:
        The figure.
    """
    sigma = np.asarray(getattr(singular_values, "singular_values", singular_values), dtype=np.float64)
    energy = sigma.reshape(-1, sigma.shape[-1]) ** 2
    total = np.asarray(getattr(singular_values, "energy", energy.sum(-1)), dtype=np.float64).reshape(-1, 1)
    share = np.divide(np.cumsum(energy, axis=-1), total, out=np.full_like(energy, np.nan), where=total > 0)
    ax = new_axes() if ax is None else ax
    components = np.arange(1, energy.shape[-1] + 1)
    few = len(share) <= len(HEAD_COLORS)
    for row, curve in enumerate(share):
        color = HEAD_COLORS[row] if few else OTHER_HEADS_COLOR
        label = (head_names[row] if head_names is not None else f"head {row}") if few else None
        ax.plot(components, curve, color=color, linewidth=1.6 if few else 0.7, alpha=1 if few else 0.5, label=label)
        if (curve >= fraction).any():
            rank = int(np.argmax(curve >= fraction))
            ax.plot(components[rank], curve[rank], "o", color=color, markersize=5 if few else 2.5)
    if not few:
        median = np.nanmedian(share, axis=0)
        ax.plot(components, median, color=BAND_COLOR, linewidth=2, label=f"median over {len(share):,} heads")
    ax.axhline(fraction, color=FAINT_INK, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set(xlabel="components", ylabel="share of the field's energy", ylim=(0, 1.03))
    ax.set_xlim(0.5, max(2.0, 1.2 * _num_shown_components(share)))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    strip(ax)
    title(ax, "energy spectrum", f"dots: effective rank at {fraction:.0%} of the energy")
    return figure_of(ax)


def _num_shown_components(share: NDArray[np.float64]) -> int:
    """Components with which 90 % of the heads reach 99.5 % of their energy; the curves are flat after that."""
    reached = np.nan_to_num(share, nan=1.0) >= 0.995
    return int(np.quantile(np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, share.shape[1]), 0.9))

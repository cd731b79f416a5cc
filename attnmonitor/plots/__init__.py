"""Charts of the heads of a model, as matplotlib figures that change no global state.

Every function draws into the ``ax`` it is given or makes a new figure, and returns the figure. pyplot is not used: the
figure is in no list of open figures, needs no display, and is freed when no reference to it is left.
"""

from attnmonitor.messages import needed

with needed(by="attnmonitor.plots", extra="plots"):
    from attnmonitor.plots.curves import bands, bands_over, trajectories
    from attnmonitor.plots.evidence import evidence
    from attnmonitor.plots.heatmap import heatmap
    from attnmonitor.plots.overview import overview
    from attnmonitor.plots.spectrum import spectrum

__all__ = ["bands", "bands_over", "evidence", "heatmap", "overview", "spectrum", "trajectories"]

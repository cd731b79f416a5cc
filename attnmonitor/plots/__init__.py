"""Charts of what the heads of a model do, as matplotlib figures that touch nothing global.

Every function draws into the ``ax`` it is given or makes a figure of its own, and returns the figure. No pyplot: a
figure made here is in no list of open figures, needs no display and is gone when nobody holds it.
"""

from attnmonitor.messages import needed

with needed(by="attnmonitor.plots", extra="plots"):
    from attnmonitor.plots.curves import bands, bands_over, trajectories
    from attnmonitor.plots.heatmap import heatmap
    from attnmonitor.plots.overview import overview
    from attnmonitor.plots.spectrum import spectrum

__all__ = ["bands", "bands_over", "heatmap", "overview", "spectrum", "trajectories"]

"""torchmetrics classes over `attnmonitor.functional`: update per layer, compute one value per head."""

from attnmonitor.metrics.energy import (
    EnergyDelocalization,
    EnergyEffectiveRank,
    EnergyParticipationRatio,
    EnergyRMS,
    EnergyStableRank,
    QueryRMS,
)
from attnmonitor.metrics.heads import HeadMetric
from attnmonitor.metrics.keys import (
    KeyIncoherence,
    KeyLeverageMax,
    KeyNormParticipation,
    KeyParticipationRatio,
    KeyRank,
    KeyRMS,
)
from attnmonitor.metrics.rows import AttentionEntropy, MaxLogit, SinkMass
from attnmonitor.metrics.weights import InteractionEffectiveRank, InteractionParticipationRatio

METRIC_CLASSES: dict[str, type[HeadMetric]] = {
    cls.name: cls
    for cls in (
        EnergyEffectiveRank,
        EnergyParticipationRatio,
        EnergyStableRank,
        EnergyRMS,
        EnergyDelocalization,
        KeyIncoherence,
        KeyRank,
        KeyLeverageMax,
        KeyParticipationRatio,
        KeyNormParticipation,
        QueryRMS,
        KeyRMS,
        AttentionEntropy,
        MaxLogit,
        SinkMass,
        InteractionEffectiveRank,
        InteractionParticipationRatio,
    )
}
"""The class of every metric by its name in `attnmonitor.catalog`."""

__all__ = ["METRIC_CLASSES", "HeadMetric", *sorted(cls.__name__ for cls in METRIC_CLASSES.values())]

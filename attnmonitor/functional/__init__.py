"""Pure functions on tensors: energy fields, keys, queries, attention rows and learned interactions.

The names of each file's ``__all__`` are public here.
"""

from attnmonitor.functional import attention, checked_rows, energy, interaction, keys, queries, values
from attnmonitor.functional.attention import *  # noqa: F403
from attnmonitor.functional.checked_rows import *  # noqa: F403
from attnmonitor.functional.energy import *  # noqa: F403
from attnmonitor.functional.interaction import *  # noqa: F403
from attnmonitor.functional.keys import *  # noqa: F403
from attnmonitor.functional.queries import *  # noqa: F403
from attnmonitor.functional.spectrum import EnergySpectrum as EnergySpectrum
from attnmonitor.functional.values import *  # noqa: F403

__all__ = ["EnergySpectrum"]
__all__ += attention.__all__
__all__ += checked_rows.__all__
__all__ += energy.__all__
__all__ += interaction.__all__
__all__ += keys.__all__
__all__ += queries.__all__
__all__ += values.__all__

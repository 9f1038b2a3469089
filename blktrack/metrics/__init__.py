"""Figures for monitoring: what `status` and `history` know, as Prometheus reads it.

`collect` gathers, `text` is the format, `names` says what there is. What cannot be had is left out
and said by a gauge of its own: figures that are missing must not hide those that are there.
"""

from blktrack.metrics.collect import collect
from blktrack.metrics.text import Exposition

__all__ = ["Exposition", "collect"]

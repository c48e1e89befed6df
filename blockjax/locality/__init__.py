"""Progressive locality: how far each layer sees."""

from blockjax.locality.schedule import Locality
from blockjax.locality.segments import BOUNDARIES, Boundaries, SegmentState

__all__ = ["BOUNDARIES", "Boundaries", "Locality", "SegmentState"]

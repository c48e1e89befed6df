"""Recurrent layers as mixers of the decoder: linear attention, state spaces, delta rules, state vectors."""

from blockjax.recurrence.block_recurrent import BlockRecurrent
from blockjax.recurrence.delta import GDN, KDA
from blockjax.recurrence.lightning import Lightning
from blockjax.recurrence.mixer import Mixer, Work, num_params
from blockjax.recurrence.past import Past, forget
from blockjax.recurrence.ssd import SSD

MIXERS: dict[str, type[Mixer]] = {mixer.kind: mixer for mixer in (Lightning, SSD, GDN, KDA, BlockRecurrent)}
"""The kinds that `model.pattern` can name."""

__all__ = [
    "GDN",
    "KDA",
    "MIXERS",
    "SSD",
    "BlockRecurrent",
    "Lightning",
    "Mixer",
    "Past",
    "Work",
    "forget",
    "num_params",
]

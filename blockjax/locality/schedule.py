"""How local each layer is, and what that means for its attention.

The *locality* of a layer is a number from 0, attention over everything, to 1, attention over what is
near. A schedule sets it over depth; a mode turns it into a window, into segments or into a bias by
distance. Both are prior art: windows that change with depth (Longformer, arXiv:2004.05150, sec. 4;
MSWA, arXiv:2501.01039), interleaved windows (Gemma 2, arXiv:2408.00118), linear distance bias (ALiBi,
arXiv:2108.12409). Which direction is better, local late or local early, is contested: it is a switch.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from blockjax.arguments import parse_choice
from blockjax.errors import UsageError
from blockjax.locality.segments import BOUNDARIES, Boundaries
from blockjax.masks.predicates import FAR, array_module

MODES = ("window", "segment", "bias")

_OPTIONS = dict(
    reversed=False,
    low=0.0,
    high=1.0,
    mode="window",
    smallest=64,
    boundary="fixed",
    delimiters="10",
    strength=4.0,
)
SCHEDULES = {
    "beta": dict(value=1.0) | _OPTIONS,
    "constant": dict(value=1.0) | _OPTIONS,
    "step": dict(value=0.5) | _OPTIONS,
    "periodic": dict(value=6) | _OPTIONS,
    "table": dict(value="0/1") | _OPTIONS,
}


@dataclasses.dataclass(frozen=True)
class Locality:
    """A schedule over depth and a mode; `parse` makes one from a string such as `beta:5,mode=segment`.

    With t = l / (L - 1) for layer l of L (t = 1 if L = 1) the locality is low + (high - low) * s(t):

    - `beta:B`: s = t**B
    - `constant:C`: s = C
    - `step:A`: s = 1 from t = A on, 0 before
    - `periodic:P`: s = 0 in every P-th layer, 1 in the others
    - `table:0/0.5/1`: one value a layer

    Attributes:
      schedule, value: as above.
      reversed: turns the table of layers round: local early instead of late.
      low, high: range of the locality, in [0, 1].
      mode: what locality x does. `window`: the last context**(1 - x) * smallest**x tokens are visible.
        `segment`: only tokens of the same group of segments are, (context / smallest)**(1 - x) segments
        a group. `bias`: a key at distance d loses strength * x * d / smallest nats. 0 is always
        attention over everything.
      smallest: tokens of the smallest window, or of a segment.
      context: tokens of the longest sequence that the model is meant for.
      boundary: where segments end, a name in `segments.BOUNDARIES`.
      delimiters: token ids that end a segment, `10/46`, for boundary=delimiter.
      strength: see `bias`.
    """

    schedule: str
    value: float | int | str
    context: int
    reversed: bool = False
    low: float = 0.0
    high: float = 1.0
    mode: str = "window"
    smallest: int = 64
    boundary: str = "fixed"
    delimiters: str = "10"
    strength: float = 4.0

    @classmethod
    def parse(cls, text: str, context: int) -> Locality:
        """Reads `schedule:value,option=...`; an empty text is locality 0 everywhere.

        Raises:
          UsageError: an unknown schedule or option, or a number out of range.
        """
        schedule, options = parse_choice(text or "constant:0", SCHEDULES, name="model.locality")
        return cls(schedule=schedule, context=context, **options)

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("boundary", BOUNDARIES)):
            if getattr(self, name) not in choices:
                known = " or ".join(map(repr, choices))
                raise UsageError(f"model.locality: {name}={getattr(self, name)!r} must be {known}.")
        if not 0 <= self.low <= self.high <= 1:
            raise UsageError(
                f"model.locality: low={self.low} and high={self.high} must satisfy 0 <= low <= high <= 1."
            )
        if not 1 <= self.smallest <= FAR or not 0 <= self.strength < np.inf:
            raise UsageError(
                f"model.locality: smallest={self.smallest} must be at least 1 token and "
                f"strength={self.strength} a number >= 0."
            )
        least = {"beta": 0, "constant": 0, "step": 0, "periodic": 1}.get(self.schedule)
        most = {"constant": 1, "step": 1}.get(self.schedule, np.inf)
        if least is not None and not (least <= self.value <= most and self.value < np.inf):
            raise UsageError(
                f"model.locality: the value of {self.schedule}:{self.value} must lie in [{least}, {most}]."
            )
        if self.schedule == "table" and not all(0 <= x <= 1 for x in self._numbers("value", float)):
            raise UsageError(f"model.locality: the values of table:{self.value} must lie in [0, 1].")
        self._numbers("delimiters", int)

    def _numbers(self, name: str, kind) -> list:
        try:
            return [kind(x) for x in str(getattr(self, name)).split("/")]
        except ValueError as error:
            raise UsageError(
                f"model.locality: {name}={getattr(self, name)!r} must be numbers with '/' between them."
            ) from error

    def table(self, depth: int) -> np.ndarray:
        """The locality of each of `depth` layers, float32 in [0, 1].

        Raises:
          UsageError: an explicit table of another length.
        """
        t = np.linspace(0, 1, depth) if depth > 1 else np.ones(1)
        match self.schedule:
            case "beta":
                s = t**self.value
            case "constant":
                s = np.full(depth, self.value)
            case "step":
                s = t >= self.value
            case "periodic":
                s = np.arange(1, depth + 1) % self.value != 0
            case _:
                s = np.array(self._numbers("value", float))
                if len(s) != depth:
                    raise UsageError(
                        f"model.locality: table:{self.value} has {len(s)} values for {depth} layers; "
                        "give one a layer."
                    )
        s = s[::-1] if self.reversed else s
        return np.float32(self.low + (self.high - self.low) * s)

    @functools.cached_property
    def boundaries(self) -> Boundaries | None:
        """Where segments end; None in the other modes."""
        if self.mode != "segment":
            return None
        return Boundaries(self.boundary, self.smallest, tuple(self._numbers("delimiters", int)))

    def columns(self, locality) -> dict:
        """The columns of the layer table, `window`, `group` or `slope`, for localities of any shape.

        Concrete localities give NumPy, traced ones traced columns: what a layer sees can then move
        without a new compilation.
        """
        xp = array_module(locality)
        x = xp.clip(xp.asarray(locality, np.float32), 0, 1)
        # float64 where there is one: a window must not depend on how a power is rounded.
        x = x.astype(np.float64) if xp is np else x
        smallest = min(self.smallest, self.context)
        between = lambda far, near: far * (near / far) ** x  # noqa: E731
        if self.mode == "bias":
            return dict(slope=xp.asarray(self.strength / self.smallest * x, np.float32))
        if self.mode == "window":
            tokens = xp.round(between(self.context, smallest))
            return dict(window=xp.where(x > 0, tokens, FAR).astype(np.int32))
        segments = xp.maximum(xp.round(between(self.context / smallest, 1.0)), 1)
        return dict(group=xp.where(x > 0, segments, FAR).astype(np.int32))

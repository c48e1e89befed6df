"""Residual rules: which depth blocks a decoder has, and who attends to them.

A *sublayer* is an attention or an MLP, counted from 0; a *depth block* is a run of `size` of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from blockjax.arguments import parse_choice
from blockjax.errors import UsageError

_EACH = dict(heads=1)
_BLOCKS = dict(size=0, blocks=8, heads=1)
RESIDUALS = {
    "prenorm": {},
    "attn_res": _EACH,
    "block_attn_res": _BLOCKS,
    "delta": _EACH,
    "delta_block": _BLOCKS,
}


@dataclasses.dataclass(frozen=True)
class Residual:
    """How a sublayer reads what earlier ones wrote.

    Sources are the embedding and, for each completed depth block, what its sublayers added to the stream.

    - `prenorm`: reads the sum of everything so far (arXiv:2002.04745).
    - `attn_res`: reads a softmax mean of the sources and of the running sum of its own block
      (Attention Residuals, arXiv:2603.15031, eq. 6). `attn_res` alone has blocks of one sublayer.
    - `delta`: reads the sum of everything so far plus a gate times a softmax mean of the sources
      (Delta Attention Residuals, arXiv:2605.18855).

    With several heads each slice of the width has a softmax of its own (MHAR, arXiv:2607.27230).

    Attributes:
      rule: `prenorm`, `attn_res` or `delta`.
      sublayers: two a layer.
      size: sublayers of a depth block; the last block may be shorter.
      heads: slices of the width that weigh sources on their own.
    """

    rule: str
    sublayers: int
    size: int
    heads: int = 1

    @classmethod
    def parse(cls, text: str, sublayers: int) -> Residual:
        """Reads `prenorm`, `attn_res`, `delta:heads=4`, `block_attn_res:size=8`, `delta_block:blocks=4`.

        `size` counts sublayers; without it there are `blocks` blocks, all but the last of equal size.

        Raises:
          UsageError: an unknown rule or option, or a number that is not positive.
        """
        kind, options = parse_choice(text, RESIDUALS, name="model.residual")
        if kind == "prenorm":
            return cls(kind, sublayers, sublayers)
        if options.heads < 1:
            raise UsageError(f"model.residual={text}: heads={options.heads} must be at least 1.")
        if "block" not in kind:
            return cls(kind, sublayers, 1, options.heads)
        if options.size < 0 or options.blocks < 1:
            raise UsageError(
                f"model.residual={text}: size={options.size} sublayers, or blocks={options.blocks}, "
                "must be at least 1."
            )
        rule = "attn_res" if kind == "block_attn_res" else "delta"
        size = min(options.size or -(-sublayers // options.blocks), sublayers)
        return cls(rule, sublayers, size, options.heads)

    @property
    def blocks(self) -> int:
        """Number of depth blocks."""
        return -(-self.sublayers // self.size)

    @property
    def readers(self) -> int:
        """How many read by attention: every sublayer, and under `attn_res` the output head."""
        return {"prenorm": 0, "attn_res": self.sublayers + 1, "delta": self.sublayers}[self.rule]

    def starts(self, sublayer: int | np.ndarray) -> bool | np.ndarray:
        """Whether a depth block starts with this sublayer, or with each of them."""
        return sublayer % self.size == 0

    def end(self, sublayer: int) -> int:
        """The first sublayer after the depth block of this one."""
        return min((sublayer // self.size + 1) * self.size, self.sublayers)

    def num_params(self, width: int) -> int:
        """A query for each reader, and under `delta` a gate."""
        return self.readers * width + (self.readers if self.rule == "delta" else 0)

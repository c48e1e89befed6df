"""Splits by a hash of the document's id: adding documents never moves the others."""

import hashlib

import numpy as np


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` only."""
    # 53 bits, so that the largest one does not round to 1.0.
    return (int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 11) / 2**53


def assign_splits(hashes: np.ndarray, fractions: dict[str, float]) -> np.ndarray:
    """Which split each document is in, from its hash.

    The hash alone decides, unless that leaves a split empty: then the largest one gives it the
    document that lies nearest, if it has one to spare.

    Args:
        hashes: [D] float64 in [0, 1).
        fractions: part of the documents for each split; they sum to 1.

    Returns:
        [D] uint8, positions in `fractions`.
    """
    edges = np.cumsum(list(fractions.values()))[:-1]
    counts = np.bincount(np.searchsorted(edges, hashes, side="right"), minlength=len(fractions))
    for split in range(len(counts)):
        donor = counts.argmax()
        if counts[split] == 0 and counts[donor] > (split > 0):  # the first split may take the only document
            counts[split] += 1
            counts[donor] -= 1
    assignment = np.empty(len(hashes), np.uint8)
    assignment[np.argsort(hashes, kind="stable")] = np.repeat(np.arange(len(counts)), counts)
    return assignment

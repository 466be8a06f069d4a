"""Named random streams: one name per use, so that adding a use never moves another's numbers.

For simulations, and for everything computed from released values (sampling text, shuffling lessons): same root and
names, same numbers. DP noise and Poisson sampling of a real node do not come from here but from
`fl_app.privacy.noise`, whose production source has no seed parameter.

Source: numpy.random.SeedSequence, keyed by the SHA-256 of the names.
"""

from __future__ import annotations

import hashlib

import numpy as np


def _words(names: tuple[str | int, ...]) -> list[int]:
    digest = hashlib.sha256("\x1f".join(str(name) for name in names).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 32, 4)]


def stream(root: int, *names: str | int) -> np.random.Generator:
    """Return the generator called `names` under `root` (0 <= root < 2**63). Never for DP noise on a real node."""
    sequence = np.random.SeedSequence([root & 0xFFFFFFFF, root >> 32, *_words(names)])
    return np.random.Generator(np.random.PCG64(sequence))

"""Random numbers that depend on nothing but a seed and a position.

Invariant: the number for output position n of a seed is the same in every batch, on every replica
and after any interruption, since no state is kept (counter-based generators: Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011; each number is SplitMix64's at that place of
the stream that the mixed seed begins, Steele et al., OOPSLA 2014).
"""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: list[int], positions: list[int]) -> np.ndarray:
    """One number in [0, 1) for each seed and output position: [count] float64.

    Of 52 bits, so that the largest one times a sum still rounds to less than the sum.
    """
    starts = _mixed(np.array([seed & _MASK for seed in seeds], dtype=np.uint64) + _GOLDEN)
    states = starts + (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mixed(states) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: [count] uint64 to the same; products wrap at 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

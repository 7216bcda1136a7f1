"""Seeds: every random draw has a seed computed from what it depends on."""

import numpy as np


def seed_of(*parts: int) -> int:
    """Return a 63-bit seed that depends on all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Random numbers: every one comes from (seed, purpose, step), never from what was drawn before it."""

import numpy as np
import torch

# Purposes: SeedSequence([seed, purpose, step or epoch]) is a stream of its own.
INIT, SLICES, VIEW_Q, VIEW_K, SHUFFLE, PATCHES, CROPS, DROPOUT, LOOKS, PROBE = range(10)


def rng(seed: int, purpose: int, step: int = 0) -> np.random.Generator:
    """The generator of one purpose at one step (or epoch): equal on every process, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence([seed, purpose, step]))


def seed_torch(seed: int, purpose: int, step: int = 0, rank: int = 0) -> None:
    """Seed torch's own generators (initial weights, dropout) from the same tree of seeds; dropout by rank, too."""
    torch.manual_seed(int(np.random.SeedSequence([seed, purpose, step, rank]).generate_state(1, np.uint64)[0]))


def seed_suffix(seed: int) -> str:
    """What the names of runs with another seed than 0 end in."""
    return f"-seed{seed}" if seed else ""

"""Random parameters that hide no mistake: no zero-initialised projection, no program that draws them."""

import numpy as np

from rise_jax.trees import named_leaves, nested


def noise(abstract, spread=1 / 6):
    """Scales about 1, the rest about 0 but nowhere at it; for models 32 wide or less."""
    rng = np.random.default_rng(1)

    def draw(name, leaf):
        value = spread * rng.normal(size=leaf.shape)
        return np.asarray(1 + value if name.endswith("scale") else value, np.float32)

    return nested({name: draw(name, leaf) for name, leaf in named_leaves(abstract).items()})

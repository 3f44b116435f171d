"""The alphabet of axes, and the decorator that checks it at trace time.

B batch (global)                     S video tokens, after patchify
T pixel frames                       L text tokens (P prompt part, R rephrased part)
F latent frames                      D model width, M MLP width
H W height and width of the grid     N heads, K key/value heads, d head width
C channels                           V vocabulary

Channels come last everywhere. Diffusion time `t` is a `[B]` array in [0, 1]: 0 is data, 1 is noise.
Video is uint8 in [0, 255] outside the step and float in [-1, 1] inside it.
"""

from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8, jaxtyped

__all__ = ["Array", "Bool", "Float", "Int", "PyTree", "UInt8", "typed"]


def typed(function):
    """Checks array ranks, dtypes and repeated axis letters of annotated arguments and results; costs trace time only."""
    return jaxtyped(typechecker=beartype)(function)

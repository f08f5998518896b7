"""What a gradient computes a second time instead of keeping it: B batch, T frames, H W pixels, C channels."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_vae.layers.conv import Clip
from flax_vae.ops.schedule import at_once


def call_again(function: Callable[..., Any], layers: Any, x: Clip, carry: Any) -> tuple[Clip, Any]:
    """Gives function(layers, x, carry), of which a gradient keeps only these three and computes the inside again.

    What is within another such call is computed a third time, but for the convolution that it ends with: of a block
    that is computed again, a gradient again keeps only what goes into its norms. The gradients of the layers' kernels
    come before those of anything before these layers: else XLA puts them off, and keeps for them all that was computed
    again.
    """
    structure, parameters, state = nnx.split(layers, nnx.Param, ...)
    parameters, x, carry = at_once((parameters, x, carry))
    layers = nnx.merge(structure, parameters, state)  # the random state is that of the layers given
    return nnx.remat(function, graph_updates=False)(layers, x, carry)

"""Rematerialisation: what a gradient recomputes in place of keeping it. B batch, T frames, H W pixels, C channels."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_vae.layers.conv import Clip
from flax_vae.ops.schedule import gradients_together


def remat(function: Callable[..., Any], layers: Any, x: Clip, carry: Any) -> tuple[Clip, Any]:
    """Returns function(layers, x, carry); a gradient keeps only these three and recomputes the inside.

    Inside a rematerialised block each layer is computed three times, except the block's last convolution: of such a
    block a gradient keeps only what goes into its norms. The gradients of the kernels come before those of anything
    earlier; otherwise XLA puts them off, and keeps all that was recomputed for them.
    """
    structure, parameters, state = nnx.split(layers, nnx.Param, ...)
    parameters, x, carry = gradients_together((parameters, x, carry))
    layers = nnx.merge(structure, parameters, state)  # the random state is that of the layers given
    return nnx.remat(function, graph_updates=False)(layers, x, carry)

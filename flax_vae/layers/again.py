"""What a gradient computes a second time instead of keeping it: B batch, T frames, H W pixels, C channels."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

from flax_vae.layers.conv import Clip

_within: ContextVar[bool] = ContextVar("within", default=False)


def call_again(function: Callable[..., tuple[Clip, Any]], layers: Any, x: Clip, carry: Any) -> tuple[Clip, Any]:
    """Gives function(layers, x, carry), of which a gradient keeps only these three and computes the inside again.

    What is called within is not computed a third time. The gradients of the layers' kernels come before those of
    anything before these layers: else XLA puts them off, and keeps for them all that was computed again.
    """
    if _within.get():
        return function(layers, x, carry)
    structure, parameters, state = nnx.split(layers, nnx.Param, ...)
    parameters, x, carry = at_once((parameters, x, carry))
    layers = nnx.merge(structure, parameters, state)  # the random state is that of the layers given
    token = _within.set(True)
    try:
        return nnx.remat(lambda *args: function(*args), graph_updates=False)(layers, x, carry)
    finally:
        _within.reset(token)


@jax.custom_vjp
def at_once(tree):
    """Gives a tree as it is; none of its gradients is passed on before all of them are computed."""
    return tree


at_once.defvjp(lambda tree: (tree, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))

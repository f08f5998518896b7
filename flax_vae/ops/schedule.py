"""What a compiled program computes first, and what it computes once: hints that change no value."""

from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array

Tree = TypeVar("Tree")


@jax.custom_vjp
def not_before(other, x: Tree) -> Tree:
    """Gives `x`, but not before `other` is computed; gradients do not wait.

    XLA else puts off to the end of a program what only its caller asks for, and keeps what that is computed from.
    """
    return lax.optimization_barrier((other, x))[1]


@jax.custom_vjp
def at_once(tree: Tree) -> Tree:
    """Gives a tree as it is; none of its gradients is passed on before all of them are computed."""
    return tree


@jax.custom_vjp
def computed_once(x: Array) -> Array:
    """Gives `x`, which a CPU does not compute again within each of what needs it; other platforms may.

    XLA for TPUs computes what goes into a convolution within it, and saves writing it; for a CPU it writes it anyhow.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


not_before.defvjp(lambda other, x: (not_before(other, x), None), lambda _, gradient: (None, gradient))
at_once.defvjp(lambda tree: (tree, None), lambda _, gradients: (lax.optimization_barrier(gradients),))
computed_once.defvjp(lambda x: (computed_once(x), None), lambda _, gradient: (gradient,))

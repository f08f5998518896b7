"""Scheduling hints for XLA: what a program computes first, together or once; they change no value."""

from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array

Tree = TypeVar("Tree")


@jax.custom_vjp
def after(other, x: Tree) -> Tree:
    """Returns x, but makes the forward pass compute `other` first.

    Otherwise XLA schedules an output that nothing else reads at the end of the program and keeps its inputs alive.
    """
    return lax.optimization_barrier((other, x))[1]


@jax.custom_vjp
def gradients_together(tree: Tree) -> Tree:
    """Returns a tree as it is; the backward pass computes all of its gradients before it passes any on."""
    return tree


@jax.custom_vjp
def materialize_on_cpu(x: Array) -> Array:
    """Materialises x on CPU, so that XLA does not fuse (and recompute) it into every consumer; a no-op elsewhere.

    A TPU fuses what goes into a convolution and saves writing it; a CPU writes it in any case.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


after.defvjp(lambda other, x: (after(other, x), None), lambda _, gradient: (None, gradient))
gradients_together.defvjp(lambda tree: (tree, None), lambda _, gradients: (lax.optimization_barrier(gradients),))
materialize_on_cpu.defvjp(lambda x: (materialize_on_cpu(x), None), lambda _, gradient: (gradient,))

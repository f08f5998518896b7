"""Proof that flax_vae and torch_ref compute the same functions."""

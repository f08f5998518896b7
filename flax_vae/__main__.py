"""`python -m flax_vae` is `flax-vae`."""

from flax_vae.cli import main

main()

"""What every family shares: the posterior and the scaling of latents."""

"""Ways to run a model: lossy tiles."""

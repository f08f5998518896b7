"""What causal video VAEs are made of; every layer maps a whole clip to a whole clip."""

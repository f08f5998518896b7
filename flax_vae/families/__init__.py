"""The families of models, one file each, and the registry that finds them."""

"""Checkpoints as others write, name and keep them: pickles, which are read and never run, wrapped names, the hub."""

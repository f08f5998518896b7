"""Work from file to file, resumable: encode, decode, reconstruct, extract, evaluate, port, train."""


class CheckFailed(Exception):
    """Results that should agree do not."""

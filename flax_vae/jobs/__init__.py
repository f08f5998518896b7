"""Work from file to file that can be stopped and gone on with: encode, decode, reconstruct, extract, evaluate, port."""


class CheckFailed(Exception):
    """Results that should agree do not."""

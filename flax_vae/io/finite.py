"""Results that are not finite, as of damaged weights: refused before they are written."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from flax_vae.io.files import PathLike


class NotFinite(ValueError):
    """NaN or infinity in what a model has computed."""


def check_finite(what: str, values: np.ndarray) -> None:
    """Raises NotFinite, with `what` the values are, where any of them is NaN or infinite."""
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{what} hold NaN or infinity, not finite numbers alone: the weights are damaged, or their precision "
            "overflows; try float32"
        )


@contextmanager
def computed_of(path: PathLike) -> Iterator[None]:
    """Names the file, in the error, of which something that is not finite was computed."""
    try:
        yield
    except NotFinite as error:
        error.args = (f"{path}: {error}",)  # the same error, which has notes on how to go on
        raise

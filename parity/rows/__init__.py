"""The table of everything that is compared: one row a layer, block, model or loss, in every odd case."""

from parity.rows import layers, pyramid, train

CASES = [*layers.CASES, *pyramid.CASES, *train.CASES]

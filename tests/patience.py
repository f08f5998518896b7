"""How long tests wait for other processes."""

PATIENCE = 600  # seconds, which are enough on a machine that is several times slower, and busy

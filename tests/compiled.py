"""What a compiled program tells of itself."""

from typing import Any


def memory(compiled) -> Any:
    """Returns its sizes in bytes: temporaries, arguments, outputs."""
    return compiled.memory_analysis()


def text(compiled) -> str:
    """Returns its HLO."""
    return compiled.as_text()

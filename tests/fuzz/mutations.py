"""Inputs, each made of the whole samples by a seed and a number alone."""

import copy
import io
import json
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.fuzz.samples import Sample

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1)
HEADER = 256  # bytes in which a mutation is as likely as in the rest of the file
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "\0", "\ud800", "9" * 5000, "1e999999999", "0/0", [], {}, [[]], {"": None}),
)


def make_input(samples: Sequence[Sample], seed: int, number: int) -> Sample:
    """Returns the input of this number: a sample with one file mutated, rarely two."""
    rng = np.random.default_rng((seed, number))
    sample = samples[number % len(samples)]
    files = dict(sample.files)
    names = list(files)
    for name in {
        sample.name if rng.random() < 0.7 else names[rng.integers(len(names))] for _ in range(1 + (rng.random() < 0.1))
    }:
        files[name] = mutated(rng, name, files[name])
    return Sample(sample.kind, sample.name, files)


def mutated(rng: np.random.Generator, name: str, data: bytes) -> bytes:
    """Returns other bytes for a file: its JSON edited, what its container holds mutated, or any of its bytes."""
    if name.endswith((".json", ".jsonl")) and rng.random() < 0.7:
        return b"\n".join(edited(rng, line) for line in (data.splitlines() if name.endswith("l") else [data]))
    if name.endswith(".safetensors") and rng.random() < 0.6:
        size = int.from_bytes(data[:8], "little")
        header = edited(rng, data[8 : 8 + size])
        return struct.pack("<Q", len(header)) + header + data[8 + size :]
    if data.startswith(b"PK") and rng.random() < 0.7:
        return repacked(rng, data)
    for _ in range(int(rng.integers(1, 4))):
        data = MUTATIONS[rng.integers(len(MUTATIONS))](rng, data)
    return data


def repacked(rng: np.random.Generator, data: bytes) -> bytes:
    """Mutates one member of a zip file, mostly the pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith(".pkl")]
        chosen = pickles[0] if pickles and rng.random() < 0.7 else names[rng.integers(len(names))]
        for name in names:
            content = old.read(name)
            if name == chosen:
                content = MUTATIONS[rng.integers(len(MUTATIONS))](rng, content)
            new.writestr(name, content)
    return file.getvalue()


def edited(rng: np.random.Generator, text: bytes) -> bytes:
    """Changes, removes or adds up to three values of a JSON text."""
    tree = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        nodes = [node for node in containers(tree) if node]
        if not nodes:
            break
        node = nodes[rng.integers(len(nodes))]
        key = list(node)[rng.integers(len(node))] if isinstance(node, dict) else int(rng.integers(len(node)))
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])  # it is edited in turn
        action = rng.integers(5)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[str(value)] = node.pop(key)
        elif action == 2 and isinstance(node[key], int | float):
            node[key] = -node[key] if rng.random() < 0.3 else node[key] * int(rng.choice([2, 1000, 2**40]))
        else:
            node[key] = value
    return json.dumps(tree).encode()


def containers(tree: Any) -> list[Any]:
    """Lists all dicts and lists in a tree."""
    if not isinstance(tree, dict | list):
        return []
    inner = tree.values() if isinstance(tree, dict) else tree
    return [tree, *(node for value in inner for node in containers(value))]


def place(rng: np.random.Generator, data: bytes) -> int:
    """Returns an offset, as often in the header as behind it."""
    return int(rng.integers(max(min(len(data), HEADER) if rng.random() < 0.5 else len(data), 1)))


def block(rng: np.random.Generator, data: bytes) -> slice:
    """Returns a part of some bytes, of very different sizes."""
    start = place(rng, data)
    return slice(start, start + 1 + int(2 ** rng.uniform(0, np.log2(max(len(data) - start, 2)))))


def flip(rng: np.random.Generator, data: bytes) -> bytes:
    """Flips up to eight bits."""
    spoiled = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        spoiled[place(rng, data)] ^= 1 << int(rng.integers(8))
    return bytes(spoiled)


def truncate(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: place(rng, data)]


def insert(rng: np.random.Generator, data: bytes) -> bytes:
    """Inserts random bytes, or what is elsewhere in the file."""
    at = place(rng, data)
    new = data[block(rng, data)] if rng.random() < 0.5 else rng.bytes(int(2 ** rng.uniform(0, 10)))
    return data[:at] + new + data[at:]


def remove(rng: np.random.Generator, data: bytes) -> bytes:
    gone = block(rng, data)
    return data[: gone.start] + data[gone.stop :]


def blank(rng: np.random.Generator, data: bytes) -> bytes:
    """Overwrites a part with zeros or ones."""
    gone = block(rng, data)
    filler = (b"\0", b"\xff")[rng.integers(2)]
    return data[: gone.start] + filler * len(data[gone]) + data[gone.stop :]


def swap(rng: np.random.Generator, data: bytes) -> bytes:
    """Swaps the parts on both sides of an offset, within a window."""
    window = block(rng, data)
    cut = window.start + (len(data[window]) // 2)
    return data[: window.start] + data[cut : window.stop] + data[window.start : cut] + data[window.stop :]


def extreme(rng: np.random.Generator, data: bytes) -> bytes:
    """Sets a number of one to eight bytes to an extreme value, in one byte order or the other."""
    size, at = int(2 ** rng.integers(4)), place(rng, data)
    value = EXTREMES[rng.integers(len(EXTREMES))] % 256**size
    return data[:at] + value.to_bytes(size, ("little", "big")[rng.integers(2)]) + data[at + size :]


MUTATIONS = (flip, truncate, insert, remove, blank, swap, extreme, extreme)

"""Files as torch writes them, put together by hand: float32 tensors by name, and what a trainer keeps beside them."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # of files from before torch 1.6
COMMAND = b"cposix\nsystem\n"  # what a pickle would call


def zipped(tensors: Mapping[str, np.ndarray], **beside: bytes) -> bytes:
    """Returns a file of torch 1.6 or later; `beside` are more entries, pickled, and there the tensors are a `model`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", whole(tensors, (), beside))
        archive.writestr("archive/byteorder", "little")
        for i, tensor in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", tensor.tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def legacy(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns a file of an earlier torch: pickles one after the other, then the numbers."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    heads = [pickle.dumps(each, protocol=2) for each in (MAGIC, 1001, system)]
    keys = pickle.dumps([str(i) for i in range(len(tensors))], protocol=2)
    storages = [struct.pack("<q", tensor.size) + tensor.tobytes() for tensor in tensors.values()]
    return b"".join([*heads, whole(tensors, (b"N",), {}), keys, *storages])


def hostile() -> bytes:
    """Returns, pickled, what runs a command where it is loaded."""
    return COMMAND + group(text("touch canary")) + b"R"


def whole(tensors: Mapping[str, np.ndarray], more: tuple[bytes, ...], beside: Mapping[str, bytes]) -> bytes:
    """Returns a pickle of the tensors by name; `more` ends what is said of each of their storages."""
    held = mapping({key: rebuilt(i, tensor, more) for i, (key, tensor) in enumerate(tensors.items())})
    return b"\x80\x02" + (mapping({"model": held, **beside}) if beside else held) + b"."


def rebuilt(number: int, tensor: np.ndarray, more: tuple[bytes, ...]) -> bytes:
    """Returns, pickled, the call that makes a tensor of a storage."""
    kind = b"ctorch\nFloatStorage\n"
    storage = group(text("storage"), kind, text(str(number)), text("cpu"), integer(tensor.size), *more) + b"Q"
    strides = [stride // tensor.itemsize for stride in tensor.strides]
    hooks = b"ccollections\nOrderedDict\n)R"
    layout = group(*map(integer, tensor.shape)), group(*map(integer, strides)), b"\x89", hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + group(storage, integer(0), *layout) + b"R"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def integer(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)

"""Files that torch.save wrote, read without torch: a pickle of what to build, and beside it the bytes of each storage.

Of what the pickle asks for, only the few calls that stand for a plain tensor are understood: a trainer's own checkpoint
is read whatever objects lie beside its weights, and nothing of it is run.
"""

import io
import math
import mmap
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (teaches numpy what bfloat16 is)
import numpy as np

from flax_vae.io.files import kind
from flax_vae.io.foreign.inert import Call, Global, Inert, Storage

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file from before torch 1.6
MAX_DEPTH = 64  # of dictionaries within dictionaries
MAX_ELEMENTS = 2**40  # of a tensor
REBUILD = "torch._utils._rebuild_"
PLAIN = (Global("torch.Tensor"), Global("torch.nn.parameter.Parameter"))
MODULE_PARTS = ("_modules", "_parameters", "_buffers")  # of a whole nn.Module; no part of its tensors' names


class StoredTensor(NamedTuple):
    """A plain tensor in a file: `offset` and `strides` count elements of its storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The tensors of one .bin, .pt, .pth or .ckpt file, by name: keys of dictionaries, and of those within, dotted."""

    def __init__(self, path: Path):
        self.path = path
        try:
            read = read_zip if zipfile.is_zipfile(path) else read_legacy
            content, self._records, self._order = read(path)
            named = list(named_tensors(content))
            self._tensors = dict(named)
            if len(named) > len(self._tensors):
                raise ValueError("two tensors have one name")
            for tensor in self._tensors.values():
                if isinstance(tensor, StoredTensor):
                    check_inside(tensor, self._records[tensor.storage.record][1])
        except Exception as error:  # a damaged pickle can raise anything
            what = f"{path} is not what torch.save writes ({type(error).__name__}: {str(error)[:200]})"
            raise ValueError(f"{what}; it looks like {kind(path)}") from None
        if not self._tensors:
            raise ValueError(f"{path} holds no tensors by name, but {content_of(content)}: save a state_dict")
        self.specs = {
            key: (x.shape, x.dtype) if isinstance(x, StoredTensor) else ((), x.removeprefix(REBUILD))
            for key, x in self._tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor; ValueError where it is sparse, quantized, or of another kind that is not plain."""
        tensor = self._tensors[key]
        if not isinstance(tensor, StoredTensor):
            raise ValueError(f"{self.path}: {key!r} is no plain tensor, but a {self.specs[key][1]}")
        dtype, storage = np.dtype(tensor.dtype), tensor.storage
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, dtype)
        start = self._records[storage.record][0] + storage.start * np.dtype(storage.dtype).itemsize
        start += tensor.offset * dtype.itemsize
        flat = np.fromfile(self.path, np.uint8, span(tensor) * dtype.itemsize, offset=start).view(dtype)
        flat = flat if self._order == "little" else flat.byteswap()
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)


Records = dict[str, tuple[int, int]]  # where each record of a file starts, and its bytes


def read_zip(path: Path) -> tuple[Any, Records, str]:
    """Returns the content of a file of torch 1.6 or later, its records, and the order of bytes."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = {info.filename: info for info in archive.infolist()}
        if any(
            info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size for info in entries.values()
        ):
            raise ValueError("it is compressed")
        name = next(name for name in entries if name.rpartition("/")[2] == "data.pkl")
        root = name.removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise ValueError("it is a TorchScript program: save the state_dict")
        unpickler = Inert(io.BytesIO(archive.read(name)))
        content = unpickler.load()
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in entries else "little"
        records = {}
        for record in unpickler.storages:
            info = entries[f"{root}data/{record}"]
            file.seek(info.header_offset + 26)
            names, extra = struct.unpack("<HH", file.read(4))
            records[record] = info.header_offset + 30 + names + extra, info.file_size
    size = path.stat().st_size
    if any(start + length > size for start, length in records.values()):
        raise ValueError("it ends before its last tensor")
    return content, records, order


def read_legacy(path: Path) -> tuple[Any, Records, str]:
    """Returns the content of a file from before torch 1.6, its records, and the order of bytes."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        if Inert(view).load() != MAGIC:
            raise ValueError("it does not begin as such files do")
        Inert(view).load()  # the version of the format, which never changed
        system = Inert(view).load()
        unpickler = Inert(view)
        content, records = unpickler.load(), {}
        for record in Inert(view).load():
            (elements,) = struct.unpack("<q", view.read(8))
            length = elements * np.dtype(unpickler.storages[str(record)].dtype).itemsize
            records[str(record)] = view.tell(), length
            view.seek(length, 1)
    return content, records, "little" if system.get("little_endian", True) else "big"


def named_tensors(content: Any) -> Iterator[tuple[str, StoredTensor | str]]:
    """Yields the tensors within dictionaries and objects, each by its dotted name; what is no plain one as its kind.

    Each dictionary is entered once: one may hold itself, or be held by many.
    """
    waiting, entered = [("", content, 0)], set()
    while waiting:
        name, value, depth = waiting.pop()
        if (tensor := tensor_of(value)) is not None:
            yield name, tensor
        elif isinstance(value, dict | Call) and id(value) not in entered and depth < MAX_DEPTH:
            entered.add(id(value))
            waiting += reversed(
                [(f"{name}.{key}" if name else key, inner, depth + 1) for key, inner in entries_of(value)]
            )


def entries_of(value: dict | Call) -> Iterator[tuple[str, Any]]:
    """Yields what a dictionary or an object holds; of a whole nn.Module, what its state_dict would."""
    entries = value.entries if isinstance(value, Call) else value
    if not isinstance(value, Call) or "_modules" not in entries:
        yield from entries.items()
        return
    unsaved: Any = entries.get("_non_persistent_buffers_set", ())
    unsaved = unsaved.arguments[0] if isinstance(unsaved, Call) and unsaved.arguments else unsaved
    for part in MODULE_PARTS:
        for key, inner in entries_of(entries.get(part, {})):
            if part != "_buffers" or key not in unsaved:
                yield key, inner


def tensor_of(value: Any) -> StoredTensor | str | None:
    """Returns the plain tensor that a value stands for; the kind of one that is not plain; None for other values."""
    while isinstance(value, Call):
        match value.name.replace("torch.tensor.", "torch._tensor."), value.arguments:
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (inner, *_):
                value = inner
            case "torch._tensor._rebuild_from_type_v2" | "torch._tensor._rebuild_from_type", (made, of, inner, *_):
                if of not in PLAIN:
                    return of.name
                value = Call(made, inner)
            case "torch._utils._rebuild_tensor", (storage, offset, shape, strides):
                return StoredTensor(storage, storage.dtype, offset, sizes(shape), sizes(strides))
            case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *metadata):
                # metadata says that the values are to be negated or conjugated
                plain = StoredTensor(storage, storage.dtype, offset, sizes(shape), sizes(strides))
                return "negated or conjugated tensor" if any(metadata) else plain
            case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, strides, _, _, dtype, *metadata):
                plain = StoredTensor(storage, dtype.name.removeprefix("torch."), offset, sizes(shape), sizes(strides))
                return "negated or conjugated tensor" if any(metadata) else plain
            case name, _:
                return name if name.startswith(REBUILD) else None
    return None


def sizes(shape: Any) -> tuple[int, ...]:
    """Returns a shape, or strides, as a tuple."""
    return tuple(shape.arguments[0] if isinstance(shape, Call) else shape)  # a call of torch.Size


def span(tensor: StoredTensor) -> int:
    """Returns the elements from a tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))


def check_inside(tensor: StoredTensor, length: int) -> None:
    """Raises ValueError unless a tensor lies within its storage, and that within its record of `length` bytes."""
    storage, item = tensor.storage, np.dtype(tensor.dtype).itemsize
    numbers = [storage.start, storage.elements, tensor.offset, *tensor.shape, *tensor.strides]
    if not all(type(number) is int and number >= 0 for number in numbers) or math.prod(tensor.shape) > MAX_ELEMENTS:
        raise ValueError(f"a tensor's sizes are wrong: {numbers}")
    bytes_held = storage.elements * np.dtype(storage.dtype).itemsize
    start = storage.start * np.dtype(storage.dtype).itemsize
    needed = 0 if 0 in tensor.shape else (tensor.offset + span(tensor)) * item
    if needed > bytes_held or start + bytes_held > length:
        raise ValueError(f"a tensor of shape {tensor.shape} is larger than what is stored of it")


def content_of(content: Any) -> str:
    """Returns, as text, what a file holds in place of tensors."""
    if isinstance(content, dict) and content:
        return ", ".join(map(repr, list(content)[:9]))
    return f"a {content.name if isinstance(content, Call) else type(content).__name__}"

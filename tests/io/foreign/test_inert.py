"""Pickles from strangers: what they ask for is written down, never called, and takes no more memory than the file."""

import argparse
import collections
import copyreg
import datetime
import enum
import functools
import io
import operator
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest

from flax_vae.io.foreign.inert import Call, Inert
from flax_vae.io.foreign.torch_file import MAGIC, TorchFile, entries_of


class Asks:
    """Pickled, it asks for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def noted(path):
    """Would be called, were it called."""
    pathlib.Path(path).touch()


def load(content: bytes):
    return Inert(io.BytesIO(content)).load()


# What asks for a call without a name that is known to be harmful: each must be inert
QUIET = {
    "function": lambda path: Asks(noted, path),
    "nested": lambda path: {"a": [Asks(list, [Asks(noted, path)])]},
    "partial": lambda path: Asks(functools.partial, noted, path),
    "method": lambda path: Asks(getattr, Asks(pathlib.Path, path), "touch"),
    "called method": lambda path: Asks(operator.methodcaller, "touch"),
    "attribute": lambda path: Asks(operator.attrgetter("a.b").__class__, "__class__.__bases__"),
    "map": lambda path: Asks(list, Asks(map, noted, (path,))),
    "copyreg": lambda path: Asks(copyreg.constructor, noted),
    "file": lambda path: Asks(io.FileIO, path, "w"),
    "state": lambda path: Asks(argparse.Namespace, noted),
}
LOUD = {
    "os.system": lambda path: Asks(os.system, f"touch {path}"),
    "eval": lambda path: Asks(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Asks(exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Asks(open, str(path), "w"),
    "nested in a state": lambda path: {"args": argparse.Namespace(a=Asks(os.system, f"touch {path}"))},
    "as a key": lambda path: {Asks(os.system, f"touch {path}"): 1},
    "import": lambda path: Asks(__import__, "subprocess"),
    "os.mkdir": lambda path: Asks(os.mkdir, str(path)),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", QUIET.values(), ids=QUIET.keys())
def test_no_call_is_made(tmp_path, make, protocol):
    load(pickle.dumps(make(tmp_path / "ran"), protocol))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", LOUD.values(), ids=LOUD.keys())
def test_a_command_is_refused_by_name(tmp_path, make, protocol):
    with pytest.raises(pickle.UnpicklingError, match=r"it would run \w+\.\w+; nothing was run"):
        load(pickle.dumps(make(tmp_path / "ran"), protocol))
    assert not list(tmp_path.iterdir())


BY_HAND = {
    "instance": b"(Vecho\n" + b"ios\nsystem\n.",
    "object": b"(cos\nsystem\nVecho\no.",
    "protocol 0": b"cposix\nsystem\n(Vecho\ntR.",
    "python 2": b"c__builtin__\neval\n(V1\ntR.",
    "a name within a name": pickle.PROTO + b"\x04" + b"\x8c\x05torch\x8c\x09os.system\x93.",
    "a module's module": pickle.PROTO + b"\x04" + b"\x8c\x0dtorch.storage\x8c\x0fsys.modules.get\x93.",
    "agreed numbers": b"\x82\x01.",
}


@pytest.mark.parametrize("content", BY_HAND.values(), ids=BY_HAND.keys())
def test_commands_written_by_hand_are_refused(content):
    with pytest.raises(pickle.UnpicklingError, match=r"would run|by the number"):
        load(content)


def test_what_is_on_the_stack_can_not_be_called():
    for function in (b"K\x01", b"]", b"Vos.system\n", b"cargparse\nNamespace\n)R"):
        with pytest.raises(pickle.UnpicklingError, match="it calls a"):
            load(function + b")R.")


class Colour(enum.Enum):
    RED = 1


TRAINERS = {
    "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("out")),
    "now": datetime.datetime(2024, 5, 1),
    "loss": np.float32(0.5),
    "history": np.arange(3),
    "dtype": np.dtype("float32"),
    "rng": np.random.default_rng(0).bit_generator.state,
    "counts": collections.defaultdict(list, {"a": [1]}),
    "ordered": collections.OrderedDict(a=1),
    "queue": collections.deque([1, 2], 3),
    "colour": Colour.RED,
    "set": {"a", pathlib.Path("b")},
    "frozen": frozenset({"a", (1, 2)}),
    "complex": 1 + 2j,
    "by path": {pathlib.Path("a"): 1, (1, 2): 3},
    "bytes": b"abc",
    "slice": slice(1, 2),
    "range": range(3),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_objects_become_notes_and_plain_values_stay(protocol):
    found = load(pickle.dumps(TRAINERS | {"epoch": 3, "names": ["a", 1.5, None, True]}, protocol))
    assert found.keys() == TRAINERS.keys() | {"epoch", "names"}
    assert (found["epoch"], found["names"]) == (3, ["a", 1.5, None, True])
    assert dict(entries_of(found["args"]))["lr"] == 1e-4
    assert isinstance(found["now"], Call)
    assert found["now"].name == "datetime.datetime"
    assert dict(entries_of(found["ordered"])) == {"a": 1}


BOMBS = {
    "a key of nested tuples": b"}" + b")" + b"\x85" * 300_000 + b"K\x01s.",
    "a set of nested tuples": b"\x8f(" + b")" + b"\x85" * 300_000 + b"\x90.",
    "a frozen set of nested tuples": b"(" + b")" + b"\x85" * 300_000 + b"\x91.",
    "a dictionary of nested tuples": b"(" + b")" + b"\x85" * 300_000 + b"K\x01d.",
    "a memo of two thousand million": b"K\x01r\xff\xff\xff\x7f.",
    "nested lists": b"]" * 300_000 + b"a" * 299_999 + b".",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_do_not_go_off(content):
    load(content)


@pytest.mark.parametrize(
    "content", [b"X\xff\xff\xff\x7fabc.", b"\x8e" + b"\xff" * 7 + b"\x7f.", b"\x95" + b"\xff" * 8, b"B\0"]
)
def test_sizes_that_the_file_does_not_have_are_an_error(content):
    with pytest.raises((EOFError, ValueError, UnicodeError, struct.error, pickle.UnpicklingError)):
        load(content)


# Whole files, by hand


def torch_zip(path, content: bytes, records: dict[str, bytes], **settings):
    with zipfile.ZipFile(path, "w", **settings) as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path


def tensor(shape=(2, 3), strides=(3, 1), offset=0, elements=6, storage="FloatStorage", record="0", location="cuda:0"):
    """Writes the pickle of {"a": a tensor}, as torch does."""
    sizes = b"".join(
        b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", size) for size in sizes) + b"t" for sizes in (shape, strides)
    )
    pid = b"(X\x07\0\0\0storagectorch\n" + storage.encode() + b"\nV" + record.encode() + b"\nV" + location.encode()
    pid += b"\n\x8a\x08" + struct.pack("<q", elements) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"\x8a\x08" + struct.pack("<q", offset) + sizes + hooks + b"tR"
    )
    return b"\x80\x02}V" + b"a\n" + call + b"s."


VALUES = np.arange(6, dtype=np.float32)


def test_a_tensor_is_read_without_torch(tmp_path):
    path = torch_zip(tmp_path / "a.pt", tensor(), {"data/0": VALUES.tobytes()})
    file = TorchFile(path)
    assert file.specs == {"a": ((2, 3), "float32")}
    assert np.array_equal(file.read("a"), VALUES.reshape(2, 3))
    path = torch_zip(tmp_path / "b.pt", tensor((2, 2), (1, 3), 1), {"data/0": VALUES.tobytes()})
    assert np.array_equal(TorchFile(path).read("a"), [[1, 4], [2, 5]])
    path = torch_zip(tmp_path / "c.pt", tensor(), {"data/0": VALUES.astype(">f4").tobytes(), "byteorder": b"big"})
    assert np.array_equal(TorchFile(path).read("a"), VALUES.reshape(2, 3))


def test_a_file_from_before_torch_1_6_is_read_without_torch(tmp_path):
    parts = [pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True})]
    content = tensor().replace(b"tQ", b"NtQ")
    path = tmp_path / "old.pth"
    path.write_bytes(b"".join([*parts, content, pickle.dumps(["0"], 2), struct.pack("<q", 6), VALUES.tobytes()]))
    assert np.array_equal(TorchFile(path).read("a"), VALUES.reshape(2, 3))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"old\.pth is not what torch\.save writes"):
        TorchFile(path)


LIES = {
    "more than is stored": (tensor((2, 4), (4, 1)), "larger than what is stored"),
    "more than the record": (tensor(elements=7), "larger than what is stored"),
    "behind the end": (tensor(offset=3), "larger than what is stored"),
    "an offset below zero": (tensor(offset=-1), "sizes are wrong"),
    "a stride below zero": (tensor(strides=(-3, 1)), "sizes are wrong"),
    "a size below zero": (tensor((-2, 3)), "sizes are wrong"),
    "a size beyond all bounds": (tensor((2**40, 2**40), (0, 0)), "sizes are wrong"),
    "fewer strides than sizes": (tensor((2, 3), (1,)), "zip"),
    "another record": (tensor(record="1"), "archive/data/1"),
    "a record outside": (tensor(record="../../x"), "archive/data/../../x"),
    "a storage of no tensor": (tensor(storage="Storage"), "it holds a torch.Storage"),
    "no pickle": (b"", "EOFError"),
    "no tensors": (pickle.dumps({"epoch": 3, "args": argparse.Namespace()}), "no tensors by name, but 'epoch', 'args'"),
    "a list": (pickle.dumps([1]), "no tensors by name, but a list"),
}


@pytest.mark.parametrize(("content", "said"), LIES.values(), ids=LIES.keys())
def test_files_that_lie_are_refused(tmp_path, content, said):
    path = torch_zip(tmp_path / "lies.pt", content, {"data/0": VALUES.tobytes()})
    with pytest.raises(ValueError) as caught:
        TorchFile(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_compressed_files_and_programs_are_refused(tmp_path):
    records = {"data/0": VALUES.tobytes()}
    with pytest.raises(ValueError, match="it is compressed"):
        TorchFile(torch_zip(tmp_path / "a.pt", tensor(), records, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="TorchScript program: save the state_dict"):
        TorchFile(torch_zip(tmp_path / "b.pt", tensor(), records | {"constants.pkl": b""}))


def test_a_tensor_of_zero_strides_takes_no_memory(tmp_path):
    path = torch_zip(tmp_path / "a.pt", tensor((2**18, 2**18), (0, 0)), {"data/0": VALUES.tobytes()})
    assert TorchFile(path).read("a").shape == (2**18, 2**18)

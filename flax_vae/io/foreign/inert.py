"""Pickles from strangers, read without calling anything.

A pickle is a program that may call any function. Here no call is made: each that it asks for becomes a `Call`, a name
and arguments, so that whoever reads it can take what it understands, and no file can run code.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Untyped": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "int8",
    "QUInt8": "uint8",
    "QInt32": "int32",
    "QUInt4x2": "uint8",
    "QUInt2x4": "uint8",
}
# No file is safe because of these two: nothing is ever called. But a file that names one was made to do harm, and who
# was given it should hear of that.
COMMANDS = {"os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "pty", "socket", "importlib", "ctypes"}
BUILTIN_COMMANDS = {"eval", "exec", "execfile", "compile", "open", "__import__", "breakpoint", "input"}


@dataclass(frozen=True)
class Global:
    """The name of a function or a class in a pickle."""

    name: str


class Call:
    """What a pickle asks for a function to make, and what is put into that: entries of a dictionary, or attributes."""

    def __init__(self, function: Any, arguments: Any):
        if not isinstance(function, Global):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        self.name, self.arguments, self.entries = function.name, arguments, dict[str, Any]()

    def __setitem__(self, key: str, value: Any) -> None:
        self.entries[key] = value

    def extend(self, items: Any) -> None:
        """Leaves out the items of a list."""

    append = extend


class Storage(NamedTuple):
    """Elements that tensors are views of: those from `start` on of a record of the file."""

    dtype: str
    record: str
    start: int
    elements: int


class Inert(pickle._Unpickler):
    """Unpickles plain values in plain containers, and makes a `Call` of all that would have been called.

    It is the unpickler in Python: by the one in C, a few bytes can ask for any amount of memory. Of dictionaries and
    sets only what has a name is kept: whatever else a file holds is never hashed, which for nested tuples can crash.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Global:
        """Returns a name; UnpicklingError for those of commands."""
        first, *inner = [module.partition(".")[0], *name.split(".")]
        is_builtin = first in ("builtins", "__builtin__", "io", "_io")
        if COMMANDS & {first, *inner[:-1]} or (is_builtin and inner[-1] in BUILTIN_COMMANDS):
            raise pickle.UnpicklingError(f"it would run {module}.{name}; nothing was run, but do not use this file")
        return Global(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Refuses a number that stands for a function where programs have agreed on it."""
        raise pickle.UnpicklingError(f"it names a function by the number {code}")

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage that the pickle names, or the class that it gives the source of."""
        if pid[0] == "module":
            return pid[1]
        _, storage, record, _, elements, *view = pid
        name = storage.name.rpartition(".")[2].removesuffix("Storage")
        if name not in STORAGES:
            raise pickle.UnpicklingError(f"it holds a {storage.name}")
        _, start, elements = view[0] if view and view[0] else (None, 0, elements)
        return self.storages.setdefault(str(record), Storage(STORAGES[name], str(record), start, elements))

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.append(Call(function, arguments))

    def load_call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = Call(self.stack[-1], arguments)

    def load_call_with_keywords(self) -> None:
        self.stack.pop()
        self.load_call()

    def load_state(self) -> None:
        state = self.stack.pop()
        for attributes in state if isinstance(state, tuple) else (state,):  # those of __dict__, and those of slots
            if isinstance(self.stack[-1], Call) and isinstance(attributes, dict):
                self.stack[-1].entries |= attributes

    def load_entry(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if isinstance(key, str):
            self.stack[-1][key] = value

    def load_entries(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                self.stack[-1][key] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({key: value for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str)})

    def load_members(self) -> None:
        names = {item for item in self.pop_mark() if isinstance(item, str)}
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(names)

    def load_frozen_members(self) -> None:
        items = self.pop_mark()  # first: it changes what append is
        self.append(frozenset(item for item in items if isinstance(item, str)))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_call,
        pickle.NEWOBJ[0]: load_call,
        pickle.NEWOBJ_EX[0]: load_call_with_keywords,
        pickle.BUILD[0]: load_state,
        pickle.SETITEM[0]: load_entry,
        pickle.SETITEMS[0]: load_entries,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_members,
        pickle.FROZENSET[0]: load_frozen_members,
    }

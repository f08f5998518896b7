"""The command line `flax-vae`: one module a command, and here how they are called and how they fail."""

import contextlib
import importlib
import inspect
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, Union

from flax_vae.jobs import CheckFailed
from flax_vae.runtime.cluster import is_joined, leave
from flax_vae.runtime.compiler_options import order_for_memory

COMMANDS = ("info", "port", "encode", "decode", "reconstruct", "eval", "extract", "train", "export", "plan", "demo")
EXTRAS = {
    "av": "video",
    "matplotlib": "video",
    "torch": "torch",
    "grain": "train",
    "orbax": "train",
    "optax": "train",
    "libtpu": "tpu",
    "rich": "cli",
    "tyro": "cli",
}
SUMMARY = """Causal video VAEs in JAX: port a torch checkpoint, encode and decode video, measure what is lost, train.

COMMAND --help explains each and shows an example. A good first one: flax-vae demo"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: cleaned up after like an interrupt."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command in `args`, by default those of the process, and ends the process.

    Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted, 141 nobody reads what is printed, 143
    terminated. Anything else is a bug and shows its traceback.
    """
    signal.signal(signal.SIGTERM, terminate)
    order_for_memory()
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                call(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()  # at its own exit Python could only complain of a closed pipe
    except KeyboardInterrupt as stop:
        what, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        report(stop, f"{what}; nothing half-written is left")
        os._exit(code)  # at once: XLA may be compiling in a thread, and Python's own exit crashes under it
    except CheckFailed as error:
        report(error)
        leave(1)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            leave_unread()
        report(error, missing_package(error) if isinstance(error, ModuleNotFoundError) else None)
        leave(2)
    except Exception as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            report(error, f"out of memory; give a smaller --memory or --size ({str(error).splitlines()[0]})")
            leave(2)
        if not is_joined():
            raise
        traceback.print_exc()
        leave(1)  # at once, so that the other processes end too
    sys.exit(0)


def terminate(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the cleaning up short
    raise Terminated


def is_unread() -> bool:
    """Whether the reader of standard output or error, such as head, has gone."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))


def leave_unread() -> NoReturn:
    """Ends the process in silence, as SIGPIPE ends others."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    leave(128 + signal.SIGPIPE)


def report(error: BaseException, message: str | None = None) -> None:
    """Prints an error, or a message in its place, and its notes: what is done, and how to go on."""
    lines = [f"flax-vae: {message or error}", *getattr(error, "__notes__", [])]
    with contextlib.suppress(BrokenPipeError):  # nobody reads, and the exit code says it too
        print("\n".join(lines), file=sys.stderr, flush=True)


def show_warning(message: Warning | str, *_: object) -> None:
    """Prints a warning without the line of code that it comes from."""
    print(f"flax-vae: warning: {message}", file=sys.stderr, flush=True)


def call(args: list[str]) -> None:
    """Parses the arguments and calls the command; tyro itself exits for --help and for wrong usage."""
    import tyro

    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():  # tyro itself looks at TERM and at standard output alone
        tyro._experimental_options["ansi_codes"] = False
    if args and args[0] in COMMANDS:
        command = load(args[0], args[1:])
        tyro.cli(command, prog=f"flax-vae {args[0]}", args=args[1:], description=inspect.getdoc(command))
        return
    entries = []
    for name, command in zip(COMMANDS, map(load, COMMANDS), strict=True):
        summary = str(command.__doc__).splitlines()[0]
        entries.append(Annotated[command, tyro.conf.subcommand(name, description=summary)])
    choice: Any = Union[tuple(entries)]  # noqa: UP007 (X | Y takes no list)
    tyro.cli(choice, prog="flax-vae", args=args, description=SUMMARY)


def load(name: str, args: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns the function that is the command of this name; it imports jax only when it is called.

    Where the defaults of the arguments follow from one of them, a preset, they are those for `args`.
    """
    module = importlib.import_module(f"flax_vae.cli.{name}")
    return module.with_preset(args) if hasattr(module, "with_preset") else getattr(module, name)


def missing_package(error: ModuleNotFoundError) -> str:
    """Returns how to get a package that a command needs."""
    name = (error.name or "").split(".")[0]
    if name in ("parity", "torch_ref"):
        return f"this command needs the folder {name}/ of the repository: run it from a clone of flax_vae"
    wanted = f'"flax_vae[{EXTRAS[name]}]"' if name in EXTRAS else name or str(error)
    return f"this command needs the package {name}: pip install {wanted}"

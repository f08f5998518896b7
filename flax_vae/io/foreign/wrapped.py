"""Finding a model among the names of a file: within wrappers, and beside other parts, as an optimizer or an average.

Names are dotted paths, in a file as in a model. One rule takes wrappers off, wherever they are: where the model knows
none of the branches of a file, and there is only one, that branch is a wrapper (`module.`, `encoder._orig_mod.`). So a
file can hold several models, each under a prefix of its own, and what is under no model's prefix is none of them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

MAX_NAMES, MAX_DEPTH, MAX_LISTED = 100_000, 40, 4
AVERAGED = re.compile(r"(?:^|[._])(?:ema|averaged?|avg|swa)(?:[._]|$)", re.IGNORECASE)
INNER_WRAPPER = re.compile(r"_.*|module")  # as torch names them, where no model says what is one


@dataclass
class Branch:
    """A node of the tree of names: the branches below it, and the name that ends here."""

    below: dict[str, "Branch"] = field(default_factory=dict)
    name: str | None = None

    def names(self) -> list[str]:
        """Lists all names at or below this node."""
        return [node.name for _, node in walk(self) if node.name is not None]


@dataclass
class Part:
    """What is under a prefix of a file, beside what a model asks for.

    Attributes:
      prefix: dotted, with a last dot unless it is empty.
      found: the file's names by the model's.
      missing, unexpected: names of the model and of the file that the other lacks, by branches.
    """

    prefix: str
    found: dict[str, str] = field(default_factory=dict)
    missing: list[list[str]] = field(default_factory=list)
    unexpected: list[list[str]] = field(default_factory=list)


def tree(names: Iterable[str]) -> Branch:
    """Returns names as a tree; ValueError for more than any checkpoint has."""
    root = Branch()
    for count, name in enumerate(names):
        if count == MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES:,} tensors are no checkpoint of a VAE")
        node = root
        for segment in name.split(".", MAX_DEPTH):
            node = node.below.setdefault(segment, Branch())
        node.name = name
    return root


def walk(root: Branch, prefix: str = "") -> Iterator[tuple[str, Branch]]:
    """Yields every node below one, with its prefix, in the order of the names."""
    waiting = [(prefix, root)]
    while waiting:
        prefix, node = waiting.pop()
        yield prefix, node
        waiting += reversed([(f"{prefix}{segment}.", below) for segment, below in node.below.items()])


def find_parts(wanted: Iterable[str], names: Iterable[str]) -> list[Part]:
    """Returns what each prefix of a file's names that has something of a model has of it."""
    ours, parts = tree(wanted), []
    for prefix, node in walk(tree(names)):
        if node.below.keys() & ours.below.keys():
            part = Part(prefix)
            compare(ours, node, part)
            parts += [part] if part.found else []
    return parts


def compare(ours: Branch, theirs: Branch, part: Part) -> None:
    """Adds to a part what a branch of a file has of a branch of a model, with wrappers taken off."""
    while is_wrapper(theirs, ours):
        (theirs,) = theirs.below.values()
    if ours.name is not None and theirs.name is not None:
        part.found[ours.name] = theirs.name
    elif ours.name is not None or theirs.name is not None:
        part.missing += [[ours.name]] if ours.name is not None else []
        part.unexpected += [[theirs.name]] if theirs.name is not None else []
    for segment in dict.fromkeys([*ours.below, *theirs.below]):
        if segment not in theirs.below:
            part.missing.append(ours.below[segment].names())
        elif segment not in ours.below:
            part.unexpected.append(theirs.below[segment].names())
        else:
            compare(ours.below[segment], theirs.below[segment], part)


def is_wrapper(theirs: Branch, ours: Branch) -> bool:
    """Whether a branch of a file holds one branch alone, which the model does not know in its place."""
    is_inner = theirs.name is None and ours.name is None and len(theirs.below) == 1
    return is_inner and not theirs.below.keys() & ours.below.keys()


def choose(parts: list[Part]) -> tuple[Part, str]:
    """Returns the one part that is the model, and a note on the choice, empty where there was none.

    Of several that have all of the model, the averaged weights are taken, as those that are meant for use. Raises
    ValueError, with the names of the parts, where that does not decide.
    """
    whole = {part.prefix: part for part in reversed(parts) if not part.missing}
    if len(whole) < 2:
        return next(iter(whole.values()), max(parts, key=lambda part: len(part.found))), ""
    listed = ", ".join(repr(prefix.removesuffix(".") or "(top)") for prefix in sorted(whole))
    averaged = [prefix for prefix in whole if AVERAGED.search(prefix)]
    if len(averaged) != 1:
        raise ValueError(
            f"this file holds several models, in {listed}: name one, as `part`, or --part of flax-vae port"
        )
    (prefix,) = averaged
    chosen = prefix.removesuffix(".")
    return whole[prefix], f"this file holds several models, in {listed}: {chosen!r}, the averaged weights, is taken"


def outside(part: Part, parts: list[Part]) -> Part:
    """Returns a part without what another of the parts, which has all of a model, holds within its prefix."""
    whole = [other.prefix for other in parts if not other.missing and other.prefix != part.prefix]
    inner = tuple(prefix for prefix in whole if prefix.startswith(part.prefix))
    unexpected = [[name for name in names if not name.startswith(inner)] for names in part.unexpected]
    return Part(part.prefix, part.found, part.missing, list(filter(None, unexpected)))


def branches(names: Mapping[str, object]) -> Iterator[dict[str, str]]:
    """Yields, for each prefix of a file that may be a model's, its names by what they are without wrappers."""
    for prefix, node in walk(tree(names)):
        if len(node.below) > 1:
            under = node.names()
            yield {".".join(plain(name.removeprefix(prefix).split("."))): name for name in under}


def plain(segments: list[str]) -> list[str]:
    """Returns the segments of a name without those that torch's wrappers add."""
    return [segment for segment in segments[:-1] if not INNER_WRAPPER.fullmatch(segment)] + segments[-1:]


def common_prefix(names: list[str]) -> str:
    """Returns the dotted prefix that all names share, without their last segment."""
    first, last = min(names).split(".")[:-1], max(names).split(".")[:-1]
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return "".join(f"{segment}." for segment in first[:shared])

"""Which meshes and memory savings a search tries, in which order, and how it ranks the reports."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from flax_vae.families import registry
from flax_vae.planning.chips import parse_topology
from flax_vae.planning.describe import amount, settings, verdict
from flax_vae.planning.request import Report, Request
from flax_vae.runtime.mesh import AXES, check_sizes


def candidates(request: Request) -> Iterator[Request]:
    """Yields variants of a request: more clips at a time on more devices first, what saves memory later.

    Meshes are all those of all devices that divide the clips evenly. Chunks and frame by frame stay where they are
    asked for; otherwise both are tried too, and for training remat and fsdp.
    """
    variants, meshes = list(savings(request)), list(admitted(request))
    seen: list[Request] = []
    order = sorted(product(range(len(variants)), range(len(meshes))), key=lambda pair: (sum(pair), pair))
    for variant, mesh in order:
        fsdp = variants[variant].fsdp and meshes[mesh].get("data", 1) > 1
        tried = replace(variants[variant], mesh=meshes[mesh], fsdp=fsdp)
        if tried in seen or (tried.mesh.get("time", 1) > 1 and (tried.chunk or tried.frame_by_frame)):
            continue
        seen.append(tried)
        yield tried


def savings(request: Request) -> Iterator[Request]:
    """Yields variants that take ever less memory, the fastest first."""
    if request.job == "train":
        yield replace(request, remat=False, fsdp=False)
        yield replace(request, remat=True, fsdp=False)
        request = replace(request, remat=True, fsdp=True)
    yield request
    factor = registry.preset(request.model).temporal_factor
    chunks = [] if request.chunk else [size for size in (2 * factor, factor) if size < request.frames - 1]
    yield from (replace(request, chunk=size) for size in chunks)
    if not request.frame_by_frame:
        yield replace(request, frame_by_frame=True)


def admitted(request: Request) -> Iterator[dict[str, int]]:
    """Yields meshes of all devices that divide the clips evenly: those over clips first, then over few axes."""
    count = parse_topology(request.topology).devices
    if count is None:
        raise ValueError("--search needs to know how many devices there are: give a slice of TPUs, or cpu:8")
    config = registry.preset(request.model)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    found = [sizes for sizes in product(divisors, repeat=len(AXES)) if prod(sizes) == count]
    for sizes in sorted(found, key=lambda sizes: (-sizes[0], sum(n > 1 for n in sizes), sizes)):
        mesh = {axis: size for axis, size in zip(AXES, sizes, strict=True) if size > 1} or {"data": 1}
        try:
            check_sizes(mesh, config, request.batch, request.frames, request.height, request.width)
        except ValueError:
            continue
        yield mesh


def rank(report: Report) -> tuple[Any, ...]:
    """Returns a sorting key: what fits by its bound, then what does not by the memory that it needs."""
    needed = report.needed or 0
    if report.fits is False:
        return 1, needed
    return 0, report.longest, sum((report.seconds or {}).values()), needed


def conclusion(reports: Sequence[Report]) -> str:
    """Returns a sentence on the first of the ranked reports: the best one, or how far the nearest is from fitting."""
    best = reports[0]
    if best.fits is not False:
        return f"best: {settings(best.request)}; {verdict(best)}"
    needed, available, request = best.needed or 0, best.available or 1, best.request
    times = needed / available
    share = max(int(request.batch / times), 1)
    smaller = f"a batch of {share} in place of {request.batch}" if share < request.batch else "smaller frames"
    return (
        f"nothing fits. The nearest is {settings(request)}: it needs {amount(needed)}, {times:.2f} times the "
        f"{amount(available)} there are. What may: about {-(-int(best.devices * times * 100) // 100)} devices or more, "
        f"{smaller}, chips with more memory, or more of what saves it (--most tries more)"
    )

"""`flax-vae plan`."""

from typing import Annotated

from tyro.conf import arg

from flax_vae.cli.options import Flag, described, flag_help
from flax_vae.io.files import to_json
from flax_vae.jobs.screen import note, table
from flax_vae.planning.compile_ahead import compile_one, compiled_ahead
from flax_vae.planning.describe import amount, bound_words, report_json, rows, settings, title, verdict
from flax_vae.planning.request import Report, Request
from flax_vae.planning.wanted import Wanted, request_of, with_mesh

AsJson = Annotated[Flag, flag_help("print one JSON object, or a list")]
Search = Annotated[Flag, flag_help("try meshes, remat, fsdp, chunks and frame by frame, and rank what fits")]
Most = Annotated[int, described("N", "with --search: programs to compile at most")]


def plan(wanted: Annotated[Wanted, arg(name="")], json: AsJson = False, search: Search = False, most: Most = 8) -> None:
    """Compiles a program for TPUs that need not be there: does it fit, and what bounds its speed?

    Memory is what the compiler plans for. Times are the shortest possible, at the peak rates of the chip: products in
    bfloat16, all bytes through memory, all exchanges over links that are never idle. TPUs need the package libtpu.

    Example:
      flax-vae plan --topology v5e:4x4 --batch 32 --mesh data=8,height=2
    """
    request = request_of(wanted)
    if most < 1:
        raise ValueError(f"--most {most}: expected at least 1")
    if search:
        if wanted.mesh is not None:
            raise ValueError(f"--mesh {wanted.mesh} and --search, which tries all meshes: give one of the two")
        show_search(request, most, json)
        return
    request = with_mesh(request, wanted.mesh)
    note(f"compiling for {request.topology}: seconds for a small model, many minutes for a step of the full one")
    report = compile_one(request)
    if json:
        print(to_json(report_json(report)))
        return
    table(title(request), list(rows(report)))
    print(verdict(report))


def show_search(request: Request, most: int, as_json: bool) -> None:
    """Compiles the most promising candidates, notes each, and prints those that compile, ranked by their bound."""
    from flax_vae.planning.search import candidates, conclusion, rank

    found = list(candidates(request))
    if not found:
        raise ValueError(f"{title(request)}: no mesh divides these clips evenly; take another batch or size")
    note(f"{len(found)} ways to divide the work, of which {min(most, len(found))} are compiled")
    reports: list[Report] = []
    for i, (tried, report) in enumerate(compiled_ahead(found[:most]), 1):
        words = f"cannot be: {report}" if isinstance(report, ValueError) else verdict(report)
        note(f"{i} of {min(most, len(found))}: {settings(tried)}: {words}")
        if not isinstance(report, ValueError):
            reports.append(report)
    if not reports:
        raise ValueError("none of these could be compiled")
    reports.sort(key=rank)
    if as_json:
        print(to_json([report_json(report) for report in reports]))
        return
    fits = {True: "yes", False: "no", None: "not known"}
    cells = [(settings(r.request), amount(r.needed), fits[r.fits], bound_words(r)) for r in reports]
    table(title(request), cells, ("", "memory", "fits", "at least"))
    print(conclusion(reports))

"""`flax-vae plan`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from flax_vae.cli.plan_request import Wanted, request_of, with_mesh
from flax_vae.jobs.screen import note

AsJson = Annotated[bool, FlagCreatePairsOff, arg(help="print one JSON object, or a list", help_behavior_hint="")]
Search = Annotated[
    bool,
    FlagCreatePairsOff,
    arg(help="try meshes, remat, fsdp, chunks and frame by frame, and rank what fits", help_behavior_hint=""),
]
Most = Annotated[int, arg(metavar="N", help="with --search: programs to compile at most")]


def plan(wanted: Annotated[Wanted, arg(name="")], json: AsJson = False, search: Search = False, most: Most = 8) -> None:
    """Compiles a program for TPUs that need not be there: does it fit, and what bounds its speed?

    Memory is what the compiler plans for. Times are the shortest possible, at the peak rates of the chip: products in
    bfloat16, all bytes through memory, all exchanges over links that are never idle. TPUs need the package libtpu.

    Example:
      flax-vae plan --topology v5e:4x4 --batch 32 --mesh data=8,height=2
    """
    from flax_vae.cli.plan_screen import print_json, report_json, show
    from flax_vae.planning.compile_ahead import compile_one
    from flax_vae.planning.search import searched

    request = request_of(wanted)
    if most < 1:
        raise ValueError(f"--most {most}: expected at least 1")
    if search:
        if wanted.mesh is not None:
            raise ValueError(f"--mesh {wanted.mesh} and --search, which tries all meshes: give one of the two")
        searched(request, most, json)
        return
    request = with_mesh(request, wanted.mesh)
    note(f"compiling for {request.topology}: seconds for a small model, many minutes for a step of the full one")
    report = compile_one(request)
    if json:
        print_json(report_json(report))
    else:
        show(report)

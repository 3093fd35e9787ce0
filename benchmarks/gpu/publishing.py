"""Part "publishing": weights written as orbax shards into shared memory, and read with all checks,
as a sampler's process does.

The weights lie on the device in float32 and are cast there to bfloat16. The first two versions are
written to fresh pages, the later ones over the files of the last but one, as in a run.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.gpu.measuring import GIB, attempted
from benchmarks.gpu.models import named, random_stored
from benchmarks.gpu.rows import Context, Row, in_time
from benchmarks.publishing import Held
from jaxgrpo.learner.sharding import make_layout, make_mesh
from jaxgrpo.storage import publish

_VERSIONS = 4
_SPARE_BYTES = 2**30  # left free beside two versions


def run(unit: str, context: Context) -> Iterator[Row]:
    model = named(unit)
    mesh, layout = make_mesh(jax.devices()[:1]), make_layout(model, 1)
    size = publish.published_bytes(layout)
    what = {"row": "publish", "model": unit, "layers": model.layers, "gib": size / GIB}
    room = shutil.disk_usage(context.scratch).free
    if room < 2 * size + _SPARE_BYTES:
        why = f"shared memory has {room / GIB:.1f} GiB free, two versions take {2 * size / GIB:.1f}"
        yield {**what, "row": "left out", "why": why}
        return
    held = Held(model, random_stored(layout, mesh), layout, mesh)
    for version in range(1, _VERSIONS + 1):
        row = what | {"version": version}
        yield from in_time(context, attempted(row, _round(held, context.scratch, row)), row)


def _round(held: Held, root: Path, row: Row) -> Iterator[Row]:
    found, version = held.round(root, row["version"]), row["version"]
    if version > 1:
        publish.retire_version(root, version - 1)
    rates = {
        f"{what}_gb_per_second": held.bytes / 1e9 / found[name]
        for what, name in (("write", "write"), ("read", "read and check"))
    }
    yield {**row, "write_seconds": found["write"], "read_seconds": found["read and check"], **rates}

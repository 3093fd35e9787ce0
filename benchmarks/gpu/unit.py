"""One unit in this process: `python -m benchmarks.gpu.unit PART MODULE UNIT --out DIR --seconds S`,
started by runner.py."""

import argparse
import importlib
import os
import time
from pathlib import Path

from benchmarks.gpu import rows
from jaxgrpo.paths import cache_root, machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.unit")
    parser.add_argument("part")
    parser.add_argument("module")
    parser.add_argument("unit")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bfcl")
    args = parser.parse_args()
    # Before jax's first use; as jaxgrpo.run.setup.enable_compilation_cache.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_root() / "xla" / machine()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    context = rows.Context(
        args.out, time.monotonic() + args.seconds, args.scratch, args.tiny, args.bfcl
    )
    for row in importlib.import_module(args.module).run(args.unit, context):
        rows.add(args.out, {"part": args.part, "unit": args.unit, **row})


if __name__ == "__main__":
    main()

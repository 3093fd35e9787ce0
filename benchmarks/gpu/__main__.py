"""All that is to be known of one GPU, in minutes: `python -m benchmarks.gpu --minutes 9 --out DIR`

The parts, in their order, what is least known first: device (versions), attention (the kernels
against each other and against float32), peak (bfloat16 products), torch (the update in PyTorch),
sampler (the embedded one's rates), demo (configs/cpu_demo.py), mfu (the update on real tokens, and
its memory), model (the kernels through a whole update), publishing (weights to shared memory and
back), tests. docs/gpu.md says what they need and how they are read.

Every unit of a part is a process of its own with a deadline of its own: a crash, a hang, or memory
that does not suffice costs that unit alone. None is begun for which the time left is too short. A
figure is in DIR/figures.jsonl, one JSON object a line, as soon as it is known; DIR/summary.md has
tables, written anew after each unit; DIR/logs what the units said. Ends with status 0 when
everything that was begun worked, 1 when something did not.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import rows
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runner import Settings, run_parts
from benchmarks.gpu.summary import summary, wrong

_NAMES = [part.name for part in PARTS]
_END_SECONDS = 2.0  # of the minutes, kept for the end


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parse(arguments)
    asked = args.parts.split(",") if args.parts else _NAMES
    chosen = [part for part in PARTS if part.name in asked]
    bfcl = args.bfcl and str(Path(args.bfcl).absolute())
    settings = Settings(args.out, args.tiny, bfcl, args.units)
    problems = [f"--parts {n!r} is none of {', '.join(_NAMES)}" for n in asked if n not in _NAMES]
    if not problems and not any(settings.units(part) for part in chosen):
        known = ", ".join(f"{unit!r}" for part in chosen for unit in part.units)
        problems.append(f"--units {args.units!r} is in none of the names {known}")
    if args.minutes <= 0:
        problems.append(f"--minutes must be above 0, got {args.minutes}")
    if args.bfcl and not Path(args.bfcl).is_dir():
        problems.append(f"--bfcl {args.bfcl} is no folder: give one that holds bfcl_eval")
    if (args.out / rows.FIGURES).exists():
        problems.append(f"--out {args.out} holds the figures of another run: give another folder")
    if problems:
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unit in progress ends too

    def report() -> None:
        found = rows.read(args.out)
        print(f"{found[-1]['part']}, {found[-1]['unit']}: {found[-1]['status']}", flush=True)
        (args.out / "summary.md").write_text(summary(found))

    run_parts(chosen, settings, args.minutes * 60 - _END_SECONDS, report)
    found = rows.read(args.out)
    print(summary(found))
    return int(any(map(wrong, found)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for the figures, new or empty"
    )
    parser.add_argument("--parts", help=f"some of {','.join(_NAMES)} (default: all)")
    parser.add_argument(
        "--units", default="", metavar="TEXT", help="only units whose names contain this, e.g. '7B'"
    )
    parser.add_argument(
        "--bfcl",
        help="an unpacked bfcl_eval for the demo (default: an installed one, or the cache's)",
    )
    parser.add_argument("--tiny", action="store_true", help="all of it at sizes for a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

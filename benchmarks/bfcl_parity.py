"""Compare our check of BFCL's multi-turn tasks with the official verdicts.

    python -m benchmarks.bfcl_parity [--release v3] [--tasks 200] [--folder DIR]

Lists of calls are derived from each task's ground truth: as it is, none, reversed, doubled, without
the last call, with one wrong argument, and after another task's calls. Each list is judged on fresh
instances by `jaxgrpo.envs.bfcl.scoring.check_calls` and, in a separate process, by the package's
own `multi_turn_checker`, for the first turn and for all turns. Takes about 90 s on one core.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgrpo.envs.bfcl.execution import Call
from jaxgrpo.envs.bfcl.scoring import check_calls
from jaxgrpo.envs.bfcl.source import RELEASES, Package, open_package
from jaxgrpo.envs.bfcl.tasks import CATEGORIES, BfclTask, Library, load_library

VARIANTS = (
    "perfect",
    "empty",
    "reversed",
    "doubled",
    "truncated",
    "wrong_argument",
    "after_another",
)
SCOPES = ("first_turn", "all_turns")

Turns = list[list[list[Call]]]  # turns of steps of calls


@dataclasses.dataclass(frozen=True)
class Case:
    """One list of calls to judge, with its names in the table."""

    task: BfclTask
    variant: str
    scope: str
    turns: Turns


def cases(
    library: Library, categories: Sequence[str], variants: Sequence[str], tasks: int
) -> Iterator[Case]:
    """Yield all cases of the first `tasks` tasks of each category, in the data's order."""
    for category in categories:
        listed = list(library.tasks[category].values())
        for index, task in enumerate(listed[:tasks]):
            other = next(
                (t for t in listed[index + 1 :] + listed[:index] if t.involved == task.involved),
                task,
            )
            for variant in variants:
                for scope in SCOPES:
                    played = 1 if scope == "first_turn" else len(task.turns)
                    turns = [
                        _vary(variant, turn.truth, other.turns[0].truth)
                        for turn in task.turns[:played]
                    ]
                    yield Case(task, variant, scope, turns)


def _vary(variant: str, truth: Sequence[Call], another: Sequence[Call]) -> list[list[Call]]:
    """Return the policy's steps of one turn."""
    calls = {
        "perfect": list(truth),
        "empty": [],
        "reversed": list(truth)[::-1],
        "doubled": [call for call in truth for _ in range(2)],
        "truncated": list(truth)[:-1],
        "wrong_argument": [*truth[:-1], *(_wrong(call) for call in truth[-1:])],
        "after_another": [*another, *truth],
    }[variant]
    return [[call] for call in calls] if variant == "reversed" else [calls] if calls else []


def _wrong(call: Call) -> Call:
    """Change the call's first argument, or add one if it has none."""
    if not call.arguments:
        return Call(call.name, {"surplus": 1})
    name, value = next(iter(call.arguments.items()))
    changed = (
        value + 1 if isinstance(value, int | float) and not isinstance(value, bool) else f"{value}_"
    )
    return Call(call.name, {**call.arguments, name: changed})


def ours(library: Library, case: Case) -> bool:
    """Judge with our check."""
    truth = [turn.truth for turn in case.task.turns[: len(case.turns)]]
    verdicts = check_calls(
        library.session(case.task), library.session(case.task), truth, case.turns
    )
    return len(verdicts) == len(truth) and verdicts[-1].passed


def official(package: Package, listed: Sequence[Case]) -> list[bool]:
    """Judge with the official checker, in a separate process."""
    lines = [
        json.dumps({
            "id": case.task.id,
            "category": f"multi_turn_{case.task.category}",
            "turns": [[[_text(call) for call in step] for step in turn] for turn in case.turns],
        })
        for case in listed
    ]  # fmt: skip
    command = [
        sys.executable,
        str(Path(__file__).with_name("bfcl_official.py")),
        str(package.folder.parent),
        package.release.name,
    ]
    done = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the official checker failed: {done.stderr[-2000:]}")
    return [json.loads(line)["valid"] for line in done.stdout.splitlines()]


def _text(call: Call) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


def compare(
    library: Library, package: Package, listed: Sequence[Case]
) -> list[tuple[Case, bool, bool]]:
    """Return each case with our verdict and the official one."""
    theirs = official(package, listed)
    if len(theirs) != len(listed):
        raise RuntimeError(f"the official checker answered {len(theirs)} of {len(listed)} cases")
    return [
        (case, ours(library, case), verdict) for case, verdict in zip(listed, theirs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--release",
        default="v3",
        choices=list(RELEASES),
        help="whose data, simulators and checker (default: v3)",
    )
    parser.add_argument("--tasks", type=int, default=200, help="number of tasks per category")
    parser.add_argument("--folder", help="an unpacked bfcl_eval instead of the downloaded one")
    options = parser.parse_args()
    package = open_package(options.release, options.folder)
    library = load_library(package)
    compared = compare(library, package, list(cases(library, CATEGORIES, VARIANTS, options.tasks)))
    print(f"{'category':14}{'calls':16}{'turns':12}{'cases':>6}{'agree':>7}{'passed':>8}")
    for category in CATEGORIES:
        for variant in VARIANTS:
            for scope in SCOPES:
                rows = [
                    r
                    for r in compared
                    if (r[0].task.category, r[0].variant, r[0].scope) == (category, variant, scope)
                ]
                agree, passed = (
                    sum(mine == theirs for _, mine, theirs in rows),
                    sum(theirs for _, _, theirs in rows),
                )
                print(f"{category:14}{variant:16}{scope:12}{len(rows):6}{agree:7}{passed:8}")
    differing = [
        f"{case.task.id}/{case.variant}/{case.scope}"
        for case, mine, theirs in compared
        if mine != theirs
    ]
    summary = {
        "release": package.release.version,
        "cases": len(compared),
        "agree": len(compared) - len(differing),
    }
    print(json.dumps(summary | {"differing": differing}))


if __name__ == "__main__":
    main()

"""Run BFCL's own `multi_turn_checker`, in this process of its own.

    python benchmarks/bfcl_official.py FOLDER RELEASE < cases > verdicts

FOLDER holds the package `bfcl_eval`; RELEASE names its data, as in `BFCL_v3_multi_turn_base.json`.
Each line of the input is a case, `{"id": ..., "category": ..., "turns": [[["cd(folder='a')"]]]}`,
turns of steps of calls; the ground truth is cut to as many turns. Each line of the output is
`{"valid": ..., "error": ...}`. Every case runs in a fork: the checker keeps its simulators, and
some of their tables, for as long as its process lives. (benchmarks/bfcl_parity.py starts this.)
"""

import functools
import json
import os
import sys
from pathlib import Path


@functools.cache
def read(folder: Path, release: str, category: str) -> dict[str, dict]:
    rows = [
        json.loads(line)
        for line in (folder / f"BFCL_{release}_{category}.json").read_text("utf-8").splitlines()
    ]
    return {row["id"]: row for row in rows}


def verdict(case: dict, entry: dict, truth: list) -> dict:
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    played = len(case["turns"])
    try:
        result = multi_turn_checker(case["turns"], truth[:played], entry, case["category"], "case")
    except RecursionError:
        return {"valid": False, "error": "recursion"}
    return {"valid": result["valid"], "error": result.get("error_type", "")}


def main(folder: Path, release: str) -> None:
    sys.path.insert(0, str(folder))
    __import__("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    for module in ("gorilla_file_system", "math_api", "message_api", "posting_api", "ticket_api", "trading_bot", "travel_booking",
                   "vehicle_control"):  # fmt: skip
        __import__(
            f"bfcl_eval.eval_checker.multi_turn_eval.func_source_code.{module}"
        )  # once, before the forks
    for line in sys.stdin:
        case = json.loads(line)
        data = folder / "bfcl_eval" / "data"
        entry = read(data, release, case["category"])[case["id"]]
        truth = read(data / "possible_answer", release, case["category"])[case["id"]][
            "ground_truth"
        ]
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(verdict(case, entry, truth)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            sys.exit(f"the checker died on {case['id']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

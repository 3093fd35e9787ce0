"""How fast the viewer is on a run of many episodes: indexing, opening, searching, filtering, and
the server's memory.

    python -m benchmarks.viewer --episodes 1000
    python -m benchmarks.viewer --episodes 200000 --folder /somewhere/large

The second one writes 2.7 GB, which it keeps and uses again.

The episodes are of 2,000 completion tokens, generated and written with the project's recorder.
The server is the real one, in a process of its own, asked over HTTP; each page's time is the
median of seven, with the first one and the mean processor time beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.viewer_runs import write_run
from jaxgrpo.viewer import queries
from jaxgrpo.viewer.filters import Filter
from jaxgrpo.viewer.index import Index

TOKENS = 2000
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.viewer", description=__doc__)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument(
        "--folder", type=Path, help="where the run is, or is to be; a temporary folder by default"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "run"
        if not (folder / "trajectories").exists():
            began = time.perf_counter()
            write_run(folder, options.episodes, TOKENS)
            show("generating", time.perf_counter() - began)
        cache = Path(scratch) / "cache"
        index = measure_index(folder, cache / "viewer")
        measure_server(folder, cache, index)


def show(what: str, seconds: float, more: str = "") -> None:
    print(f"{what:34} {seconds:10.3f} s  {more}", flush=True)


def measure_index(folder: Path, cache: Path) -> Index:
    """Index all, then once more one file that was written anew."""
    files = list((folder / "trajectories").iterdir())
    size = sum(path.stat().st_size for path in files)
    print(
        f"{len(files)} files, {size / 1e9:.2f} GB, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    index = Index(folder, cache)
    began, used = time.perf_counter(), os.times()
    index.refresh()
    took, after = time.perf_counter() - began, os.times()
    processor = sum(after[:4]) - sum(used[:4])
    with index.connect() as db:
        count = queries.totals(db)["episodes"]
    show(
        "index all",
        took,
        f"{count} episodes, {count / took:,.0f} per second; processor {processor:.1f} s, "
        f"{count / processor:,.0f} per second of it",
    )
    files[0].touch()
    began = time.perf_counter()
    index.refresh()
    took = time.perf_counter() - began
    show("index one changed file", took, f"{len(files)} files looked at")
    print(f"the index has {index.path.stat().st_size / 1e6:,.0f} MB")
    return index


def measure_server(folder: Path, cache: Path, index: Index) -> None:
    """The pages, asked for as a browser does."""
    with index.connect() as db:
        row = queries.episodes(db, Filter(), 0, 1).rows[0]
        middle = queries.episodes(db, Filter(), queries.totals(db)["episodes"] // 2, 1).rows[0]
    one = f"split={row['split']}&step={row['step']}&task={row['task']}"
    far = "&".join(f"{key}={middle[key]}" for key in ("split", "step", "task", "sample"))
    run = f"/r/{folder.name}"
    pages = {
        "overview": "/overview",
        "tasks": f"{run}/tasks",
        "episodes": f"{run}/episodes",
        "search, a common word": f"{run}/episodes?q=reasoning",
        "search, a rare phrase": f"{run}/episodes?q=%22bababa+cocodi%22",
        "search, a word's beginning": f"{run}/episodes?q=baco",
        "filter: failed, a tool, steps": f"{run}/episodes?passed=no&tool=add&step_from=3",
        "filter: label, sorted by tokens": f"{run}/episodes?label=Travel&sort=longest",
        "search and filter": f"{run}/episodes?q=baco&passed=no&stop=token_limit",
        "failures": f"{run}/failures",
        "an episode": f"{run}/episode?{one}&sample={row['sample']}",
        "another's tokens": f"{run}/episode?{far}&view=tokens",
        "group": f"{run}/group?{one}",
        "before and after": f"{run}/task?task={row['task']}",
    }
    command = [sys.executable, "-m", "jaxgrpo.viewer", str(folder), "--port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAXGRPO_CACHE": str(cache)}
    ) as server:
        try:
            assert server.stdout is not None
            base = server.stdout.readline().strip().rstrip("/")
            fetch(base + "/overview")
            show("start to first page", time.perf_counter() - began)
            for name, path in pages.items():
                times, used = [], processor_seconds(server.pid)
                for _ in range(REPEATS):
                    times.append(fetch(base + path))
                used = (processor_seconds(server.pid) - used) / REPEATS
                show(
                    name,
                    statistics.median(times),
                    f"first {times[0]:.3f} s; processor {used:.3f} s",
                )
            print(f"the server's memory: {memory(server.pid)}; {fetch_state(base)}")
        finally:
            server.terminate()


def fetch(url: str) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=120) as answer:
        answer.read()
    return time.perf_counter() - began


def fetch_state(base: str) -> str:
    with urllib.request.urlopen(base + "/state") as answer:
        return json.dumps(json.load(answer))


def processor_seconds(process: int) -> float:
    """What a process has used of the processor: on a busy machine it says more than the clock."""
    tasks = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def memory(process: int) -> str:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return ", ".join(
        " ".join(line.split()) for line in lines if line.startswith(("VmHWM", "VmRSS"))
    )


if __name__ == "__main__":
    main()

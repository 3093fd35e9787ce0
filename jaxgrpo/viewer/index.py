"""The index of a run: what can be asked of its episodes without reading them all, in a SQLite file
of the user's cache.

It never writes into the run. It grows with it: only files that are new or have changed are read.
It can be thrown away at any time; the next start builds it again.
"""

import contextlib
import hashlib
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from jaxgrpo.paths import cache_root
from jaxgrpo.viewer.reader import Lines, integer, number, parsed, text
from jaxgrpo.viewer.rows import FileRows, read_rows
from jaxgrpo.viewer.truth import stamp_of

VERSION = 6
"""Of the tables and of what is put into them; an index of another version is built again."""
SEVERAL = 16 << 20
"""Bytes of new files from which on other processes help to read."""
AT_ONCE = 16 << 20
"""Characters that are put into the full-text index at once. FTS5 writes what it has gathered to
disk whenever another table is written to, and merges these pieces later: one piece per file took
half of the time of storing."""
_SCHEMA = (Path(__file__).parent / "schema.sql").read_text()
_INSERT = f"INSERT INTO episodes VALUES (NULL, ?, {', '.join('?' * 19)})"
Progress = Callable[[int, int], None]


class Index:
    """The index of one run folder. `refresh` brings it up to date; `connect` opens it for
    reading, at the same time too."""

    def __init__(self, run: Path, folder: Path | None = None):
        self.run = run
        name = hashlib.sha256(str(run.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[
            :20
        ]
        self.path = (folder or cache_root() / "viewer") / f"{name}.sqlite"
        self._writing = threading.Lock()
        self.version = 0
        self._open()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with closing(sqlite3.connect(self.path)) as db:
                if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
                    return
        except sqlite3.DatabaseError:
            pass  # damaged: it is built again
        self.throw_away()
        with closing(sqlite3.connect(self.path)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def throw_away(self) -> None:
        """Remove the index; nothing is lost but the time to build it."""
        for ending in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        """A connection that reads."""
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            yield db

    def refresh(self, progress: Progress = lambda done, total: None) -> bool:
        """Read what is new; returns whether anything was. One refresh runs at a time."""
        with self._writing, closing(sqlite3.connect(self.path, timeout=30)) as db:
            db.execute("PRAGMA synchronous = OFF")  # after a loss of power it is built again
            changed = self._metrics(db)
            changed |= self._records(db, progress)
            db.commit()
        self.version += changed
        return changed

    def _records(self, db: sqlite3.Connection, progress: Progress) -> bool:
        self._truths(db)
        known = {
            row[0]: row[1:]
            for row in db.execute("SELECT name, size, mtime, done, mark, id FROM files")
        }
        found = record_files(self.run)
        gone = [known[name][4] for name in known.keys() - found.keys()]
        for file in gone:
            self._forget(db, file)
            db.execute("DELETE FROM files WHERE id = ?", (file,))
        new = [
            (name, *stat) for name, stat in sorted(found.items()) if known.get(name, ())[:2] != stat
        ]
        starts = {name: self._start(name, known.get(name)) for name, *_ in new}
        said, characters = list[tuple[int, str]](), 0
        for count, (name, size, mtime, read) in enumerate(self._read(new, starts), 1):
            first = self._store(db, name, (size, mtime), read, starts[name])
            said += enumerate(read.words, first)
            characters += sum(map(len, read.words))
            if characters > AT_ONCE or count == len(new):
                db.executemany("INSERT INTO said (rowid, words) VALUES (?, ?)", said)
                db.commit()
                said, characters = [], 0
            progress(count, len(new))
        return bool(new or gone)

    def _truths(self, db: sqlite3.Connection) -> None:
        """Have all files read again if the tasks' ground truths have changed: kinds of failure
        depend on them."""
        stamp = stamp_of(self.run)
        known = db.execute("SELECT value FROM state WHERE key = 'truths'").fetchone()
        if known != (stamp,):
            db.execute("UPDATE files SET size = -2, done = 0, mark = -1")
            db.execute("INSERT OR REPLACE INTO state VALUES ('truths', ?)", (stamp,))

    def _start(self, name: str, known: tuple[Any, ...] | None) -> int:
        """Where to read on: after what is known of a plain file that has only grown, else at its
        beginning."""
        if known is None or name.endswith(".gz"):
            return 0
        _, _, done, mark, _ = known
        return done if last_mark(self.run / name, done) == mark else 0

    def _read(
        self, new: list[Any], starts: dict[str, int]
    ) -> Iterator[tuple[str, int, int, FileRows]]:
        workers = min(4, os.cpu_count() or 1)  # four read as fast as one can store
        if sum(size for _, size, _ in new) < SEVERAL:
            for name, size, mtime in new:
                yield name, size, mtime, read_file(self.run / name, starts[name], size)
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), _as_helper) as pool:
            waiting: list[Future[FileRows]] = []
            for place, (name, size, mtime) in enumerate(new):
                while len(waiting) < len(new) and len(waiting) < place + 4 * workers:
                    ahead, there, _ = new[len(waiting)]
                    waiting.append(pool.submit(read_file, self.run / ahead, starts[ahead], there))
                result = waiting[place].result()
                waiting[place] = Future()  # its rows are not kept
                yield name, size, mtime, result

    def _store(
        self, db: sqlite3.Connection, name: str, stat: tuple[int, int], read: FileRows, start: int
    ) -> int:
        """Store all of a file but its words. Return the number of its first row."""
        if not db.in_transaction:  # another viewer may be writing: from here on it waits
            db.execute("BEGIN IMMEDIATE")
        row = db.execute("SELECT id FROM files WHERE name = ?", (name,)).fetchone()
        if row is None:
            row = (
                db.execute(
                    "INSERT INTO files VALUES (NULL, ?, 0, 0, 0, 0, 0, '')", (name,)
                ).lastrowid,
            )
        elif start == 0:
            self._forget(db, row[0])
        file = row[0]
        touched = {(r[2], r[3]) for r in read.rows}
        first = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'episodes'").fetchone()
        first = first[0] + 1 if first else 1
        db.executemany(_INSERT, ((file, *r) for r in read.rows))
        db.executemany(
            "INSERT INTO tasks VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET labels = excluded.labels,"
            " truth = coalesce(excluded.truth, truth), query = excluded.query",
            ((k, *v) for k, v in read.tasks.items()),
        )
        _sum_up(db, touched)
        mark = (
            last_mark(self.run / name, read.done) if read.done and not name.endswith(".gz") else 0
        )
        db.execute(
            "UPDATE files SET size = ?, mtime = ?, done = ?, mark = ?, fault = ?,"
            " episodes = (SELECT count(*) FROM episodes WHERE file = ?) WHERE id = ?",
            (*stat, read.done, mark, read.fault, file, file),
        )
        return first

    def _forget(self, db: sqlite3.Connection, file: int) -> None:
        """Leave out the episodes of a file that was replaced or is gone. Their words stay:
        numbers of rows are never used again, so they find nothing."""
        touched = set(
            db.execute("SELECT DISTINCT split, step FROM episodes WHERE file = ?", (file,))
        )
        db.execute("DELETE FROM episodes WHERE file = ?", (file,))
        _sum_up(db, touched)

    def _metrics(self, db: sqlite3.Connection) -> bool:
        path = self.run / "metrics.jsonl"
        try:
            stat = path.stat()
        except OSError:
            return False
        stamp = f"{stat.st_size} {stat.st_mtime_ns}"
        if db.execute("SELECT value FROM state WHERE key = 'metrics'").fetchone() == (stamp,):
            return False
        values, fault = read_metrics(path)
        db.execute("DELETE FROM metrics")
        db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", values)
        db.executemany(
            "INSERT OR REPLACE INTO state VALUES (?, ?)",
            [("metrics", stamp), ("metrics_fault", fault)],
        )
        return True


def record_files(run: Path) -> dict[str, tuple[int, int]]:
    """The record files of a run, by their path within it: size and time of change. A link that
    leads out of the folder has the size -1: it is named, not read."""
    found: dict[str, tuple[int, int]] = {}
    inside, folder = run.resolve(), run / "trajectories"
    if not folder.is_dir():
        return found
    linked = not folder.resolve().is_relative_to(inside)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith((".jsonl", ".jsonl.gz")):
                continue
            with contextlib.suppress(OSError):  # it was removed meanwhile
                name, stat = f"trajectories/{entry.name}", entry.stat()
                leads_out = linked or (
                    entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside)
                )
                if leads_out:
                    found[name] = (-1, 0)
                elif entry.is_file():
                    found[name] = (stat.st_size, stat.st_mtime_ns)
    return found


def _as_helper() -> None:
    """A process that helps to read: Ctrl-C is for the viewer, and it ends when the viewer does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    viewer = parent_process()

    def follow() -> None:
        if viewer is not None:
            viewer.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def read_file(path: Path, start: int, size: int) -> FileRows:
    """The rows of a record file; of a link out of the folder only that it is one."""
    if size < 0:
        return FileRows([], [], {}, 0, "it leads out of the run's folder and is not read")
    return read_rows(path, start)


def last_mark(path: Path, end: int) -> int:
    """A checksum of the bytes before `end`, by which a file that grew is told from one that was
    replaced."""
    with path.open("rb") as file:
        file.seek(max(0, end - 4096))
        return int.from_bytes(hashlib.sha256(file.read(min(end, 4096))).digest()[:6], "big")


def read_metrics(path: Path) -> tuple[list[tuple[str, str, int, float | None]], str]:
    """The numbers of metrics.jsonl as (split of an evaluation or "", key, step, value), and what
    could not be read. A value that is no number is left out; null, which stands for one that was
    not finite, is kept."""
    values, bad = [], 0
    lines = Lines(path)
    for line in lines:
        try:
            fields = parsed(line.data)
        except ValueError:
            bad += 1
            continue
        step, split = number(fields.pop("step", None)), text(fields.pop("eval/split", ""))
        if step is None:
            bad += 1
            continue
        for key, value in fields.items():
            if value is None or number(value) is not None:
                values.append((split, key, integer(step), number(value)))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                values.append((split, key, integer(step), None))
    fault = f"{bad} lines of metrics.jsonl are not metrics" if bad else ""
    return values, "; ".join(
        filter(None, (fault, f"metrics.jsonl: {lines.fault}" if lines.fault else ""))
    )


def _sum_up(db: sqlite3.Connection, places: set[tuple[str, int]]) -> None:
    """Count the pass rates and failures of these steps again."""
    for place in places:
        db.execute("DELETE FROM cells WHERE split = ? AND step = ?", place)
        db.execute("DELETE FROM kinds WHERE split = ? AND step = ?", place)
        db.execute(
            "INSERT INTO cells"
            " SELECT split, task, step, count(passed), total(passed), avg(reward) FROM episodes"
            " WHERE split = ? AND step = ? GROUP BY split, task, step",
            place,
        )
        db.execute(
            "INSERT INTO kinds SELECT split, step, failure, count(*) FROM episodes"
            " WHERE split = ? AND step = ? GROUP BY split, step, failure",
            place,
        )


def config_of(run: Path) -> dict[str, Any]:
    """What config.json says, nothing where it cannot be read."""
    try:
        found = json.loads((run / "config.json").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

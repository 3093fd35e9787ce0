"""Run folders as the viewer opens them: their index, their settings, their tokenizer."""

import dataclasses
import functools
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.viewer.episode import Episode, from_fields, from_line
from jaxgrpo.viewer.index import Index, config_of
from jaxgrpo.viewer.reader import Store, head, mapping, text
from jaxgrpo.viewer.rows import searched
from jaxgrpo.viewer.truth import ground_truths
from jaxgrpo.viewer.visible import plain


class RunError(Exception):
    """A folder that cannot be opened as a run; the message is for the person who named it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: `name` stands for it in addresses, `path` is its folder."""

    name: str
    path: Path
    index: Index
    store: Store = dataclasses.field(default_factory=Store)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return config_of(self.path)

    @functools.cached_property
    def tokenizer(self) -> "Tokens":
        return Tokens(_tokenizer_file(self.path, self.config))

    def line(self, row: sqlite3.Row, ahead: bool = True) -> bytes:
        """The line of an episode that the index names. Raises LookupError where it is gone."""
        with self.index.connect() as db:
            found = db.execute("SELECT name FROM files WHERE id = ?", (row["file"],)).fetchone()
        if found is None:
            raise LookupError("its file is gone; reload the page")
        return self.store.line(self.path / found["name"], row["offset"], row["length"], ahead)

    def words(self, row: sqlite3.Row) -> str:
        """The text by which the index finds a row's episode. Raises LookupError where it can no
        longer be read."""
        try:
            return searched(from_fields(head(self.line(row, ahead=False))[0]))
        except ValueError as error:
            raise LookupError(f"its line has changed: {error}") from error

    def episode(self, row: sqlite3.Row) -> Episode:
        """The whole episode of a row. Raises LookupError where it can no longer be read."""
        try:
            return from_line(self.line(row), ground_truths(self.path))
        except ValueError as error:
            raise LookupError(f"its line has changed: {error}") from error


class Tokens:
    """Token ids as text, one by one; without a tokenizer the ids themselves."""

    def __init__(self, file: Path | None):
        self.file = file
        self._tokenizer: Any = None
        self.why = "" if file else "no tokenizer was found; token ids are shown"
        if file is None:
            return
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions for damaged files
            self.why = f"the tokenizer cannot be read ({error}); token ids are shown"

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id. A token that is part of a character gives a replacement mark."""
        return [self._piece(each) for each in ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of all ids together."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        known = [each for each in ids if each >= 0]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    def _piece(self, token: int) -> str:
        if self._tokenizer is None or token < 0:
            return f"{token} "
        found = self._tokenizer.decode([token], skip_special_tokens=False)
        return found or f"<{token}>"


def open_runs(paths: Sequence[Path], cache: Path | None = None) -> list[Run]:
    """The runs of these folders. Raises RunError for what is no run folder, naming it and what
    is missing."""
    runs: list[Run] = []
    for path in paths:
        check(path)
        name = base = plain(path.resolve().name) or "run"
        count = 2
        while any(run.name == name for run in runs):
            name, count = f"{base}-{count}", count + 1
        if any(run.path.resolve() == path.resolve() for run in runs):
            raise RunError(f"{path} is given twice; give each run folder once")
        try:
            runs.append(Run(name, path, Index(path, cache)))
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"the index of {path} cannot be kept: {error}; "
                "name a folder for it in JAXGRPO_CACHE"
            ) from error
    return runs


def check(path: Path) -> None:
    """Raise RunError unless this is a run folder."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunError(
            f"{path} {what}; give the folder of a run, as `--run-dir` of jaxgrpo.train names it"
        )
    if not any((path / name).exists() for name in ("trajectories", "metrics.jsonl")):
        inside = sorted(child for child in path.glob("*/") if (child / "metrics.jsonl").exists())
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise RunError(
            f"{path} is no run folder: it has neither trajectories/ nor metrics.jsonl{hint}"
        )


def _tokenizer_file(run: Path, config: dict[str, Any]) -> Path | None:
    source = text(mapping(config.get("model")).get("source"))
    folders = [run / "hf", run / "adapter"]
    if source and "\0" not in source:
        folders.append(Path(source).expanduser())
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return folder / "tokenizer.json"
    return _in_hub_cache(source, mapping(config.get("model")).get("revision"))


def _in_hub_cache(source: str, revision: object) -> Path | None:
    """The tokenizer of a hub name, where it was fetched before; nothing is fetched."""
    if source.count("/") != 1 or source.startswith(("/", ".", "~")):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            source, "tokenizer.json", revision=revision if isinstance(revision, str) else None
        )
    except (ImportError, ValueError):
        return None
    return Path(found) if isinstance(found, str) else None


def parts_of(row: sqlite3.Row) -> dict[str, float | None]:
    """The reward's parts of an index row."""
    return dict(json.loads(row["parts"]))

"""Read record files as they are found: growing, torn, damaged or of another format. What cannot be
read is named, never raised.

A line is found again by its file and the place where it begins in the file's text (inflated,
where the file is gzipped).
"""

import dataclasses
import importlib
import json
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def _faster(name: str, otherwise: Any) -> Any:
    """Return a module of the extra `viewer` that does the same in less time, if it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return otherwise


fast_zlib = _faster("isal.isal_zlib", zlib)
"""It inflates about twice as fast as zlib."""
fast_json = _faster("orjson", json)
"""It parses about twice as fast as json, and refuses some lines that json reads."""
KNOWN_FORMAT = 1
CHUNK = 1 << 17
"""Bytes that are read at once. Larger blocks leave the processor's cache."""
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, fast_zlib.error)
"""What reading a damaged file raises."""
_LISTS = b',"prompt_ids":['
_COMPLETION = b',"completion_ids":['
_LAST = b',"weight_versions":['


@dataclasses.dataclass(frozen=True)
class Line:
    """One whole line: where it begins in the file's text, and its bytes without the newline."""

    offset: int
    data: bytes


class Lines:
    """The whole lines of a record file from `start` on, in order. After the loop `end` is where
    the last of them ends, and `fault` says what is wrong with the rest ("" where nothing is)."""

    def __init__(self, path: Path, start: int = 0):
        self.path, self.end, self.fault = path, start, ""

    def __iter__(self) -> Iterator[Line]:
        rest = b""
        try:
            for block in self._blocks():
                *whole, rest = (rest + block).split(b"\n")
                for data in whole:
                    yield Line(self.end, data)
                    self.end += len(data) + 1
        except UNREADABLE as error:
            self.fault = f"cannot be read further: {error}"
        if rest and not self.fault:
            self.fault = f"its last line is not finished ({len(rest)} bytes)"

    def _blocks(self) -> Iterator[bytes]:
        if self.path.suffix == ".gz":
            yield from inflated(self.path, self.end)
            return
        with self.path.open("rb") as file:
            file.seek(self.end)
            while block := file.read(CHUNK):
                yield block


def inflated(path: Path, start: int = 0) -> Iterator[bytes]:
    """The text of a gzipped file from `start` on, in blocks; members that were joined are one text.
    Raises zlib.error where it is damaged, EOFError where it ends too early, OSError."""
    skip = start
    inflate = fast_zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            while data:
                if inflate.eof:
                    inflate = fast_zlib.decompressobj(wbits=31)
                text = inflate.decompress(data)
                data = inflate.unused_data
                if skip < len(text):
                    yield text[skip:]
                skip = max(0, skip - len(text))
    if not inflate.eof and path.stat().st_size:
        raise EOFError("the gzipped data end too early")


class Store:
    """Lines by place. The texts of the files used last stay in memory (at most `most` bytes)."""

    def __init__(self, most: int = 64 << 20):
        self._most, self._lock = most, threading.Lock()
        self._texts: OrderedDict[tuple[Path, int, int], bytes] = OrderedDict()

    def line(self, path: Path, offset: int, length: int, ahead: bool = True) -> bytes:
        """The bytes of a line; a gzipped file is read further, `ahead`, for the lines after it.
        Raises LookupError where the file no longer holds them."""
        try:
            data = (
                self._plain(path, offset, length)
                if path.suffix != ".gz"
                else self._gzipped(path, offset, length, ahead)
            )
        except UNREADABLE as error:
            raise LookupError(f"{path.name} cannot be read: {error}") from error
        if len(data) != length:
            raise LookupError(f"{path.name} has changed; reload the page")
        return data

    def _plain(self, path: Path, offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _gzipped(self, path: Path, offset: int, length: int, ahead: bool) -> bytes:
        found = path.stat()
        key = (path, found.st_size, found.st_mtime_ns)
        with self._lock:
            text = self._texts.pop(key, b"")
            self._texts[key] = text
        if len(text) >= offset + length:
            return text[offset : offset + length]
        kept = bytearray()
        try:
            for block in inflated(path):
                kept += block
                if len(kept) >= max(self._most if ahead else 0, offset + length):
                    break
        except UNREADABLE:
            if len(kept) < offset + length:
                raise
        text = bytes(kept)
        self._keep(key, text)
        return text[offset : offset + length]

    def _keep(self, key: tuple[Path, int, int], text: bytes) -> None:
        with self._lock:
            self._texts[key] = text
            while len(self._texts) > 1 and sum(map(len, self._texts.values())) > self._most:
                self._texts.popitem(last=False)


def head(data: bytes) -> tuple[dict[str, Any], int]:
    """The fields of a line before its token lists, and how many completion tokens it has. The
    lists are most of a line: they are counted, not parsed. Raises ValueError for what is no JSON
    object."""
    cut = data.find(_LISTS)  # a quote within a text is escaped: this can only be the key
    if cut < 0 or data.find(_COMPLETION, cut) < 0:
        fields = parsed(data)
        return fields, len(listed(fields.get("completion_ids")))
    fields = parsed(data[:cut] + b"}")
    begin = data.find(_COMPLETION, cut) + len(_COMPLETION)
    end = data.find(b"]", begin)
    tokens = data.count(b",", begin, end) + 1 if end > begin else 0
    after = data.find(b"]", data.rfind(_LAST, end)) + 1
    if any(key in data[after:] for key in (b'"advantage":', b'"check":')):
        return parsed(data), tokens
    return fields, tokens


def parsed(data: bytes) -> dict[str, Any]:
    """A line as an object. Raises ValueError for anything else."""
    try:
        fields = fast_json.loads(data)
    except (ValueError, RecursionError):  # orjson refuses NaN, half a surrogate pair, wrong UTF-8
        fields = _leniently(data)
    if not isinstance(fields, dict):
        raise ValueError(f"it is a {type(fields).__name__}, not an object")
    return fields


def _leniently(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def integer(value: object, otherwise: int = 0) -> int:
    found = number(value)
    return otherwise if found is None or abs(found) > 2**53 else int(found)


def text(value: object) -> str:
    """A text as it is, nothing for None, anything else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=str)


def listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

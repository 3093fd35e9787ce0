"""Ways to break the folder of a published version (7), and what the reader says of each."""

import json
import shutil
from pathlib import Path
from typing import Any

BIAS = "layers.attention.q.bias"


def edit(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def chunk(folder: Path, array: str = BIAS) -> Path:
    return next(path for path in (folder / "params" / array / "c").rglob("*") if path.is_file())


def flip(folder: Path) -> None:
    data = bytearray(chunk(folder).read_bytes())
    data[3] ^= 1
    chunk(folder).write_bytes(data)


def shorten(folder: Path) -> None:
    chunk(folder).write_bytes(chunk(folder).read_bytes()[:-2])


def exchange(folder: Path) -> None:
    a, b = (chunk(folder, f"layers.mlp.{name}.kernel") for name in ("up", "gate"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def compress(folder: Path) -> None:
    file = folder / "params" / BIAS / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"].append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    file.write_text(json.dumps(metadata))


def rename_tensor(manifest: dict) -> None:
    manifest["tensors"]["model.norms.weight"] = manifest["tensors"].pop("model.norm.weight")


def other_shape(manifest: dict) -> None:
    manifest["tensors"]["model.norm.weight"]["shape"] = [6]


DAMAGES = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no manifest": (
        lambda f: (f / "manifest.json").unlink(),
        "has no manifest.json: its weights are not published",
    ),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:200]),
        "is damaged: JSONDecodeError",
    ),
    "another format": (
        lambda f: edit(f, lambda m: m.update(format=2)),
        "it is of format 2, this program reads format 1",
    ),
    "another version": (
        lambda f: edit(f, lambda m: m.update(version=6)),
        "holds version 6, version 7 was asked for",
    ),
    "a tensor of another name": (
        lambda f: edit(f, rename_tensor),
        r"missing: model\.norm\.weight; unknown: model\.norms\.weight",
    ),
    "a tensor less": (
        lambda f: edit(f, lambda m: m["tensors"].pop("model.norm.weight")),
        r"missing: model\.norm\.weight",
    ),
    "another shape": (
        lambda f: edit(f, other_shape),
        r"of another shape: model\.norm\.weight \(6,\) for \(7,\)",
    ),
    "another type": (
        lambda f: edit(f, lambda m: m["arrays"]["norm.scale"].update(dtype="float32")),
        r"not bfloat16: model\.norm\.weight",
    ),
    "no array": (lambda f: shutil.rmtree(f / "params" / BIAS), f"{BIAS} in .* cannot be opened"),
    "no chunk": (lambda f: chunk(f).unlink(), f"{BIAS} in .* cannot be read"),
    "a short chunk": (shorten, f"{BIAS} in .* cannot be read"),
    "no metadata of an array": (
        lambda f: (f / "params" / BIAS / "zarr.json").unlink(),
        f"{BIAS} in .* cannot be opened: FileNotFound",
    ),
    "a compressed array": (
        compress,
        f"{BIAS} in .* jaxgrpo.storage.publish writes bare values in equal chunks",
    ),
    "a bit": (flip, rf"{BIAS} in .* is damaged: the checksum of elements 0:4 of a row"),
    "two arrays exchanged": (exchange, r"layers\.mlp\.\w+\.kernel in .* is damaged"),
}

"""Finds models on disk, reads their weights into the logical tree, and writes them.

A model is a folder in one of two layouts, and everything that takes a model accepts either. Both
have config.json, the tokenizer and its chat template:

    Hugging Face   model.safetensors, or shards and model.safetensors.index.json
    orbax          params/, an orbax checkpoint of the logical tree (tools/convert_hf_to_orbax.py)
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from jaxgrpo.json_files import is_lfs_pointer, read_object
from jaxgrpo.models.model_config import ModelConfig, eos_token_ids
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.paths import absolute
from jaxgrpo.storage import hf_mapping, orbax_io, safetensors_io
from jaxgrpo.storage.hf_mapping import HFTensor
from jaxgrpo.storage.new_folder import UNFINISHED, new_folder

ORBAX_SUBFOLDER = "params"
_COMPANION_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".md"}
_HUB_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]
_WEIGHT_PATTERNS = ["*.safetensors"]
_TOKENIZER_OBJECTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_TOKENIZER_TEXTS = ("merges.txt", "chat_template.jinja")


def locate(model: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Find the folder of a model, or fetch the model from the hub; return an absolute path.

    `model` is a folder, or a hub name whose `revision` is a commit, tag or branch. Without
    `weights`, only the small files are fetched. Raise FileNotFoundError that says what to put where
    if there is no such model, ValueError for a revision of a folder.
    """
    folder = absolute(model)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{folder} is a folder, and a folder has no revision: drop the revision"
                f" {revision!r}"
            )
        return folder
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder {name}: name a model by an existing folder, or by its hub name"
            " (Qwen/Qwen2.5-0.5B-Instruct)"
        )
    import huggingface_hub  # takes a second, and only hub names need it

    try:
        patterns = [*_HUB_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())]
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns)
        )
    except (
        OSError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.HFValidationError,
    ) as error:
        raise FileNotFoundError(
            f"{name} (revision {revision or 'main'}) is not a folder, is not in the Hugging Face"
            " cache, and cannot be fetched"
            f" ({type(error).__name__}: {str(error).strip().splitlines()[0]}). Put config.json, the"
            " *.safetensors (with their index) and the tokenizer files into a folder and name the"
            f" model by it, or run `hf download {name}` where the hub can be reached"
        ) from error


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a model folder through transformers.

    Raise FileNotFoundError that says what is missing, ValueError that says what is damaged.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: put tokenizer.json and tokenizer_config.json (or"
            " vocab.json, merges.txt) there"
        )
    for name in _TOKENIZER_OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name)
    for name in _TOKENIZER_TEXTS:
        if (folder / name).is_file() and is_lfs_pointer((folder / name).read_bytes()):
            raise ValueError(
                f"{folder / name} is a Git LFS pointer, not the file itself: fetch that "
                "(git lfs pull)"
            )
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.encode("text", add_special_tokens=False)  # reads settings that loading does not
    except Exception as error:  # tokenizers raises even plain Exception for broken files
        raise ValueError(
            f"the tokenizer files in {folder} cannot be read by transformers: {error}"
        ) from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template: use an Instruct model, or add"
            " chat_template.jinja there"
        )
    return tokenizer


def generation_ends(folder: str | Path) -> tuple[int, ...]:
    """Return the tokens at which transformers and vLLM end a generation, by generation_config.json.

    Empty if the folder has no such file. Raise ValueError that names the file.
    """
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        return eos_token_ids(read_object(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class WeightSource(Protocol):
    """The weights of a model folder, read one tensor at a time."""

    @property
    def folder(self) -> Path:
        """Where config.json and the tokenizer are."""

    @property
    def config(self) -> ModelConfig:
        """The model config that the weights were checked against."""

    @property
    def dtypes(self) -> Mapping[hf_mapping.Path, np.dtype]:
        """The stored type of each leaf."""

    def read(self, tensor: HFTensor) -> np.ndarray:
        """Return one tensor, or one layer of a stacked leaf, in the layout of the logical tree."""


class HFWeights:
    """Weights in safetensors.

    Opening checks names and shapes, that each leaf has one type, and that a tied head equals the
    embedding.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = folder
        self.config = config
        self._stored = safetensors_io.read_folder(folder)
        hf_mapping.check_shapes(
            config, {name: stored.shape for name, stored in self._stored.items()}, folder
        )
        self.dtypes: dict[hf_mapping.Path, np.dtype] = {}
        for tensor in hf_mapping.hf_tensors(config):
            dtype = self._stored[tensor.name].dtype
            if self.dtypes.setdefault(tensor.path, dtype) != dtype:
                others = self.dtypes[tensor.path]
                raise ValueError(
                    f"{tensor.name} in {folder} is {dtype}, other layers have {others}: cast them"
                    " to one type"
                )
        if config.tied_embeddings and hf_mapping.HEAD in self._stored:
            head, table = self._stored[hf_mapping.HEAD], self._stored[hf_mapping.EMBEDDING]
            if head.dtype != table.dtype or not hf_mapping.same_bits(head.map(), table.map()):
                raise ValueError(hf_mapping.differing_head(folder))

    def read(self, tensor: HFTensor) -> np.ndarray:
        array: np.ndarray = tensor.turn(self._stored[tensor.name].map())
        return array


class OrbaxWeights:
    """Weights in an orbax folder (tools/convert_hf_to_orbax.py).

    Opening checks names and shapes.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder = folder
        self.config = config
        try:
            self._leaves: dict[hf_mapping.Path, ts.TensorStore] = orbax_io.open_leaves(
                folder / ORBAX_SUBFOLDER
            )
        except ValueError as error:
            raise ValueError(f"{error}: convert the model again") from error
        hf_mapping.check_leaves(
            config, {path: leaf.shape for path, leaf in self._leaves.items()}, folder
        )
        self.dtypes = {path: leaf.dtype.numpy_dtype for path, leaf in self._leaves.items()}
        for path, dtype in self.dtypes.items():
            if dtype not in safetensors_io.WEIGHT_DTYPES:
                raise ValueError(
                    f"{'/'.join(path)} in {folder} is {dtype}; allowed are "
                    f"{', '.join(map(str, safetensors_io.WEIGHT_DTYPES))}: convert the model again"
                )

    def read(self, tensor: HFTensor) -> np.ndarray:
        leaf = self._leaves[tensor.path]
        return orbax_io.read_values(leaf if tensor.layer is None else leaf[tensor.layer])


def is_orbax(folder: Path) -> bool:
    """Return whether tools/convert_hf_to_orbax.py wrote this folder."""
    return (folder / ORBAX_SUBFOLDER / "_METADATA").is_file()


def open_weights(folder: str | Path, config: ModelConfig | None = None) -> WeightSource:
    """Open the weights of a folder of either layout. `config` defaults to the folder's own.

    Raise ValueError for an unfinished folder and for missing, extra or misshapen tensors,
    FileNotFoundError if there are no weights.
    """
    folder = Path(folder)
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"{folder} is unfinished: its writer was interrupted, or is still at work. Run the"
            " conversion again"
        )
    config = config or ModelConfig.from_folder(folder)
    return OrbaxWeights(folder, config) if is_orbax(folder) else HFWeights(folder, config)


def read_leaves(
    source: WeightSource, dtype: Any = None
) -> Iterator[tuple[hf_mapping.Path, np.ndarray]]:
    """Read the leaves of the logical tree one by one, stacked over the layers.

    They are cast to `dtype` (default: as stored). Peak memory: one leaf and one tensor.
    """
    shapes = hf_mapping.leaf_shapes(source.config)
    tensors: dict[hf_mapping.Path, list[HFTensor]] = {}
    for tensor in hf_mapping.hf_tensors(source.config):
        tensors.setdefault(tensor.path, []).append(tensor)
    for path, parts in tensors.items():
        leaf = np.empty(shapes[path], source.dtypes[path] if dtype is None else np.dtype(dtype))
        for tensor in parts:
            _copy(leaf if tensor.layer is None else leaf[tensor.layer], source.read(tensor))
        yield path, leaf


def load_params(folder: str | Path, config: ModelConfig | None = None, dtype: Any = None) -> Params:
    """Load the logical tree of a folder of either layout as NumPy arrays.

    They are cast to `dtype` (default: as stored). Raises what `open_weights` raises.
    """
    return hf_mapping.unflatten(dict(read_leaves(open_weights(folder, config), dtype)))


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    if target.dtype == values.dtype:  # copying integers is much faster than ml_dtypes' own types
        bits = f"u{values.dtype.itemsize}"
        target.view(bits)[...] = values.view(bits)
    else:
        target[...] = values.astype(target.dtype)


def write_orbax(source: WeightSource, destination: str | Path) -> None:
    """Write a model folder of either layout as an orbax folder, bit for bit.

    Peak memory: about one layer of the largest leaf.
    """
    by_place = {
        (tensor.path, tensor.layer): tensor for tensor in hf_mapping.hf_tensors(source.config)
    }

    def leaf(path: hf_mapping.Path, shape: tuple[int, ...]) -> orbax_io.StreamedLeaf:
        def read(start: int, stop: int) -> np.ndarray:
            if (path, None) in by_place:
                return source.read(by_place[path, None])[start:stop]
            rows = [source.read(by_place[path, layer])[None] for layer in range(start, stop)]
            return rows[0] if len(rows) == 1 else np.concatenate(rows)

        return orbax_io.StreamedLeaf(shape, source.dtypes[path], read)

    with new_folder(destination) as folder:
        copy_companions(source.folder, folder)
        orbax_io.write(
            folder / ORBAX_SUBFOLDER,
            {p: leaf(p, shape) for p, shape in hf_mapping.leaf_shapes(source.config).items()},
        )


def write_hf(
    source: WeightSource,
    destination: str | Path,
    shard_bytes: int = safetensors_io.SHARD_BYTES,
    dtype_in_config: str | None = None,
) -> None:
    """Write a model folder of either layout as a Hugging Face folder, bit for bit.

    config.json is copied; only its dtype is changed if `dtype_in_config` is given. Peak memory:
    about two tensors.
    """

    def outgoing(tensor: HFTensor) -> safetensors_io.Outgoing:
        return safetensors_io.Outgoing(
            tensor.name,
            tensor.shape,
            source.dtypes[tensor.path],
            lambda: tensor.turn(source.read(tensor)),
        )

    with new_folder(destination) as folder:
        copy_companions(source.folder, folder)
        if dtype_in_config is not None:
            _write_dtype(folder / "config.json", dtype_in_config)
        safetensors_io.write_folder(
            folder, [outgoing(t) for t in hf_mapping.hf_tensors(source.config)], shard_bytes
        )


@dataclasses.dataclass(frozen=True)
class _TreeWeights:
    """A tree in memory (NumPy or JAX arrays, sharded or not) as a source.

    It is cast to one type, one layer at a time.
    """

    folder: Path
    config: ModelConfig
    leaves: Mapping[hf_mapping.Path, Any]
    dtype: np.dtype

    @property
    def dtypes(self) -> Mapping[hf_mapping.Path, np.dtype]:
        return dict.fromkeys(self.leaves, self.dtype)

    def read(self, tensor: HFTensor) -> np.ndarray:
        leaf = self.leaves[tensor.path]
        return np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]).astype(self.dtype)


def save_hf(
    params: Params,
    source_folder: str | Path,
    destination: str | Path,
    dtype: Any = "bfloat16",
    shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> None:
    """Write a logical tree as a Hugging Face folder.

    The config, tokenizer and chat template are those of `source_folder`. Raise ValueError if the
    tree does not fit that config, FileExistsError if the destination exists.
    """
    source_folder = Path(source_folder)
    config = ModelConfig.from_folder(source_folder)
    leaves = hf_mapping.flatten(params)
    hf_mapping.check_leaves(
        config, {path: leaf.shape for path, leaf in leaves.items()}, "the given tree"
    )
    source = _TreeWeights(source_folder, config, leaves, np.dtype(dtype))
    write_hf(source, destination, shard_bytes, source.dtype.name)


def _write_dtype(path: Path, dtype: str) -> None:
    """Write the type of the weights to config.json; transformers and vLLM load them as that type.

    It is written under each of the old and the new key that is there, because readers differ in
    which one they use.
    """
    config = read_object(path)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    said: dict[str, Any] = {**config, **dict.fromkeys(keys, dtype)}
    if said != config:
        path.write_text(json.dumps(said, indent=2) + "\n")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy a model's files other than weights: config, tokenizer, chat template, license, ..."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        if (
            path.is_file()
            and wanted
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path, destination / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(
            source / "additional_chat_templates", destination / "additional_chat_templates"
        )

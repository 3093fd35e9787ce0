"""Hugging Face folder -> orbax folder -> Hugging Face folder: every bit, what is refused, and what an interruption leaves."""

import json
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors

from jaxgrpo import hf_mapping, pretrained, safetensors_io
from jaxgrpo.model import ModelConfig
from tests.byte_chat import byte_tokenizer
from tools import convert_hf_to_orbax, convert_orbax_to_hf, verify_conversion

SIZES = {
    "vocab_size": 264,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
INFINITIES_AND_NANS = {2: [0x7FC1, 0xFF81, 0x8000, 0x0001], 4: [0x7FC00001, 0xFF800001, 0x80000000, 0x00000001]}


def config_of(tied: bool) -> dict:
    return {"model_type": "qwen2", "tie_word_embeddings": tied, "hidden_act": "silu", "rope_theta": 1e4, "rms_norm_eps": 1e-6, **SIZES}


def random_tensors(tied: bool, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, with NaN payloads, a negative zero and a subnormal in the embedding, and biases of nothing but zeros in layer 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in hf_mapping.hf_tensors(ModelConfig.from_hf(config_of(tied))):
        values = rng.standard_normal(tensor.shape).astype(dtype)
        tensors[tensor.name] = np.zeros_like(values) if re.search(r"layers\.1\..*bias", tensor.name) else values
    bits = tensors["model.embed_tokens.weight"].view(f"u{np.dtype(dtype).itemsize}")
    bits[0, :4] = INFINITIES_AND_NANS[bits.itemsize]
    return tensors


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Written out here, so that our reader is not tested by our writer (the library's NumPy side knows no bfloat16)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in sorted(tensors.items()):
        header[name] = {"dtype": TYPES[t.dtype.name], "shape": t.shape, "data_offsets": [len(data), len(data) + t.nbytes]}
        data += t.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> type, shape, bytes of all files of a folder, with the library, so that our writer is not tested by our reader."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def make_folder(folder: Path, tensors: dict[str, np.ndarray], *, tied: bool = False, shards: int = 1) -> Path:
    """A Hugging Face folder with config, tokenizer and weights in as many shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(tied)))
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    byte_tokenizer().save_pretrained(folder)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        write_safetensors(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def hf_folder(tmp_path):
    return make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"))


@pytest.fixture
def orbax_folder(hf_folder, tmp_path):
    pretrained.write_orbax(pretrained.open_weights(hf_folder), tmp_path / "orbax")
    return tmp_path / "orbax"


def command(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 1), (False, 3)])
    def test_every_bit(self, monkeypatch, capsys, tmp_path, dtype, tied, shards):
        source = make_folder(tmp_path / "hf", random_tensors(tied, dtype), tied=tied, shards=shards)
        command(monkeypatch, convert_hf_to_orbax, source, tmp_path / "orbax")
        command(monkeypatch, verify_conversion, source, tmp_path / "orbax")
        command(monkeypatch, convert_orbax_to_hf, tmp_path / "orbax", tmp_path / "back")
        command(monkeypatch, verify_conversion, source, tmp_path / "back")
        assert f"{38 if tied else 39} tensors" in capsys.readouterr().out
        assert read_safetensors(tmp_path / "back") == read_safetensors(source)

    def test_the_export_needs_only_the_orbax_folder(self, hf_folder, orbax_folder, tmp_path):
        expected, files = read_safetensors(hf_folder), {p.name for p in hf_folder.iterdir()}
        originals = {p.name: p.read_bytes() for p in hf_folder.iterdir() if p.suffix != ".safetensors"}
        for path in hf_folder.iterdir():
            path.unlink()
        pretrained.write_hf(pretrained.open_weights(orbax_folder), tmp_path / "back")
        assert {p.name for p in (tmp_path / "back").iterdir()} == files
        assert {name: (tmp_path / "back" / name).read_bytes() for name in originals} == originals
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
        assert read_safetensors(tmp_path / "back") == expected

    def test_shards_and_their_index(self, hf_folder, orbax_folder, tmp_path):
        pretrained.write_hf(pretrained.open_weights(orbax_folder), tmp_path / "back", shard_bytes=4300)
        files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
        assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        expected = read_safetensors(hf_folder)
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in expected.values())
        assert index["weight_map"].keys() == expected.keys()
        for name, file in index["weight_map"].items():
            assert name in dict(safetensors.deserialize((tmp_path / "back" / file).read_bytes()))
        sizes = [sum(len(entry["data"]) for _, entry in safetensors.deserialize((tmp_path / "back" / file).read_bytes())) for file in files]
        assert sizes == [4240, 3072, 4224]
        assert read_safetensors(tmp_path / "back") == expected

    def test_transformers_loads_a_sharded_export(self, orbax_folder, hf_folder, tmp_path):
        torch = pytest.importorskip("torch")
        from transformers import AutoModelForCausalLM

        pretrained.write_hf(pretrained.open_weights(orbax_folder), tmp_path / "back", shard_bytes=4300)
        state = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16).state_dict()
        for name, (_, shape, data) in read_safetensors(hf_folder).items():
            assert tuple(state[name].shape) == shape
            assert state[name].contiguous().view(torch.int16).numpy().tobytes() == data


class TestOrbax:
    def test_orbax_restores_it_unaided(self, hf_folder, orbax_folder):
        restored = ocp.StandardCheckpointer().restore((orbax_folder / "params").absolute())
        flat = hf_mapping.flatten(restored)
        config = ModelConfig.from_folder(hf_folder)
        assert {path: leaf.shape for path, leaf in flat.items()} == hf_mapping.leaf_shapes(config)
        stored = read_safetensors(hf_folder)
        for tensor in hf_mapping.hf_tensors(config):
            values = hf_mapping.hf_tensor_of(flat, tensor)
            assert values.dtype == ml_dtypes.bfloat16
            assert np.ascontiguousarray(values).tobytes() == stored[tensor.name][2]

    def test_orbax_restores_it_sharded(self, orbax_folder):
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
        config = ModelConfig.from_folder(orbax_folder)
        shapes = hf_mapping.leaf_shapes(config)
        abstract = hf_mapping.unflatten(
            {
                path: jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
                for path, s in shapes.items()
            }
        )
        abstract["embed"]["embedding"] = jax.ShapeDtypeStruct(shapes["embed", "embedding"], jnp.bfloat16, sharding=sharding)
        restored = ocp.StandardCheckpointer().restore((orbax_folder / "params").absolute(), abstract)
        ours = hf_mapping.flatten(pretrained.load_params(orbax_folder))
        assert all(hf_mapping.same_bits(np.asarray(leaf), ours[path]) for path, leaf in hf_mapping.flatten(restored).items())

    def test_a_layer_is_a_chunk(self, orbax_folder):
        meta = json.loads((orbax_folder / "params/layers.mlp.up.kernel/zarr.json").read_text())
        assert meta["shape"] == [3, 8, 12]
        assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [1, 8, 12]

    def test_chunks_are_cut_to_size(self):
        leaf = pretrained.orbax_io.StreamedLeaf
        bf16 = np.dtype("bfloat16")
        assert leaf((80, 8192, 29568), bf16, np.zeros).chunk == (1, 1024, 29568)
        assert leaf((152064, 8192), bf16, np.zeros).chunk == (3456, 8192)
        assert leaf((80, 8192), bf16, np.zeros).chunk == (80, 8192)

    def test_pieces_cover_a_leaf(self, monkeypatch):
        monkeypatch.setattr(pretrained.orbax_io, "CHUNK_BYTES", 4 * 3 * 5)
        for shape in [(2, 6, 5), (12, 5), (2, 7, 5)]:
            values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            pieces = list(pretrained.orbax_io.StreamedLeaf(shape, values.dtype, lambda a, b, v=values: v[a:b]).pieces())
            out = np.full(shape, -1, np.float32)
            for where, piece in pieces:
                assert (out[where] == -1).all()
                out[where] = piece
            assert np.array_equal(out, values)
            assert len(pieces) == {(2, 6, 5): 4, (12, 5): 4, (2, 7, 5): 14}[shape]

    def test_a_lost_chunk_is_an_error(self, orbax_folder):
        (orbax_folder / "params/layers.mlp.up.kernel/c/1/0/0").unlink()
        with pytest.raises(ValueError, match=r"layers\.mlp\.up\.kernel"):
            pretrained.load_params(orbax_folder)

    def test_a_lost_leaf_is_named(self, orbax_folder):
        (orbax_folder / "params/norm.scale/zarr.json").unlink()
        with pytest.raises(ValueError, match="missing: norm/scale"):
            pretrained.load_params(orbax_folder)


class TestLoadParams:
    def test_both_kinds_of_folder_give_the_same(self, hf_folder, orbax_folder):
        a, b = hf_mapping.flatten(pretrained.load_params(hf_folder)), hf_mapping.flatten(pretrained.load_params(orbax_folder))
        assert a.keys() == b.keys()
        assert all(hf_mapping.same_bits(a[path], b[path]) for path in a)

    @pytest.mark.parametrize("dtype", ["float32", np.float32, jnp.bfloat16])
    def test_dtype(self, hf_folder, dtype):
        flat = hf_mapping.flatten(pretrained.load_params(hf_folder, dtype=dtype))
        assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}
        assert all(leaf.flags.c_contiguous and leaf.flags.writeable for leaf in flat.values())
        expected = random_tensors(False, "bfloat16")["model.layers.2.mlp.down_proj.weight"].T.astype(dtype)
        assert hf_mapping.same_bits(flat["layers", "mlp", "down", "kernel"][2], np.ascontiguousarray(expected))

    def test_another_config_is_refused(self, hf_folder):
        other = ModelConfig.from_hf({**config_of(False), "num_hidden_layers": 2})
        with pytest.raises(ValueError, match=r"model\.layers\.2\."):
            pretrained.load_params(hf_folder, other)

    def test_memory_stays_near_a_tensor(self, tmp_path, monkeypatch):
        config = {**config_of(False), "num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 512}
        monkeypatch.setitem(globals(), "SIZES", {**SIZES, **config})
        tensors = random_tensors(False, "float32")
        folder = make_folder(tmp_path / "hf", tensors)
        largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
        del tensors
        assert (largest, total // 2**20) == (262144, 22)
        peaks = {}
        tracemalloc.start()
        for name, run in (
            ("orbax", lambda: pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax")),
            ("hf", lambda: pretrained.write_hf(pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back")),
        ):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            run()
            peaks[name] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert max(peaks.values()) < 3 * 2**20, peaks


class TestRefusals:
    def refused(self, folder: Path, tmp_path: Path, match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    def test_missing_tensor(self, tmp_path):
        tensors = random_tensors(False, "bfloat16")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, r"missing: model\.layers\.1\.mlp\.up_proj\.weight")

    def test_extra_tensor(self, tmp_path):
        tensors = {**random_tensors(False, "bfloat16"), "model.layers.0.self_attn.q_norm.weight": np.zeros(4, "bfloat16")}
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, r"q_norm")

    def test_misshapen_tensor(self, tmp_path):
        tensors = {**random_tensors(False, "bfloat16"), "model.norm.weight": np.zeros(9, "bfloat16")}
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, r"model\.norm\.weight has shape \(9,\)")

    def test_unsupported_type(self, tmp_path):
        tensors = {**random_tensors(False, "bfloat16"), "model.norm.weight": np.zeros(8, "int8")}
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, "I8")

    def test_layers_of_two_types(self, tmp_path):
        tensors = random_tensors(False, "bfloat16")
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(8, np.float32)
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, r"model\.layers\.2\.input_layernorm\.weight .*float32")

    def test_a_type_for_each_leaf_is_kept(self, tmp_path):
        tensors = {**random_tensors(False, "bfloat16"), "model.norm.weight": np.ones(8, np.float32)}
        source = make_folder(tmp_path / "hf", tensors)
        pretrained.write_orbax(pretrained.open_weights(source), tmp_path / "orbax")
        pretrained.write_hf(pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back")
        assert read_safetensors(tmp_path / "back") == read_safetensors(source)

    def test_no_weights(self, tmp_path):
        folder = make_folder(tmp_path / "hf", {})
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(folder, tmp_path, r"pytorch_model\.bin: save the model as safetensors", FileNotFoundError)

    def test_missing_shard(self, tmp_path):
        folder = make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"), shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        self.refused(folder, tmp_path, "model-00002-of-00003", FileNotFoundError)

    def test_an_index_that_lies(self, tmp_path):
        folder = make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"), shards=3)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
        index["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, tmp_path, r"model\.norm\.weight|lm_head\.weight")

    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_truncated_file(self, hf_folder, tmp_path, kept):
        file = hf_folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        self.refused(hf_folder, tmp_path, "fetch it again")

    def test_a_file_that_is_a_pointer(self, hf_folder, tmp_path):
        (hf_folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        self.refused(hf_folder, tmp_path, "fetch it again")

    def test_an_orbax_folder_is_not_converted_again(self, orbax_folder, tmp_path, monkeypatch):
        with pytest.raises(SystemExit, match="orbax folder already"):
            command(monkeypatch, convert_hf_to_orbax, orbax_folder, tmp_path / "out")

    def test_a_hf_folder_is_not_exported(self, hf_folder, tmp_path, monkeypatch):
        with pytest.raises(SystemExit, match="no orbax folder"):
            command(monkeypatch, convert_orbax_to_hf, hf_folder, tmp_path / "out")


class TestTiedHead:
    def test_the_same_bits_are_accepted_and_dropped(self, tmp_path):
        tensors = random_tensors(True, "bfloat16")
        folder = make_folder(tmp_path / "hf", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, tied=True)
        pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax")
        pretrained.write_hf(pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back")
        assert read_safetensors(tmp_path / "back").keys() == tensors.keys()

    def test_one_different_bit_is_refused(self, tmp_path):
        tensors = random_tensors(True, "bfloat16")
        head = tensors["model.embed_tokens.weight"].copy()
        head.view(np.uint16)[200, 7] ^= 1
        folder = make_folder(tmp_path / "hf", {**tensors, "lm_head.weight": head}, tied=True)
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            pretrained.open_weights(folder)


def test_rotary_buffers_are_ignored(tmp_path):
    tensors = random_tensors(False, "bfloat16")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(3)}
    folder = make_folder(tmp_path / "hf", {**tensors, **buffers})
    pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax")
    assert verify_conversion.differing_tensors(pretrained.open_weights(folder), pretrained.open_weights(tmp_path / "orbax")) == []


class TestVerify:
    @pytest.mark.parametrize(
        "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.bias", "model.embed_tokens.weight"]
    )
    def test_one_bit_is_found_and_named(self, hf_folder, orbax_folder, tmp_path, monkeypatch, name):
        tensors = random_tensors(False, "bfloat16")
        tensors[name].view(np.uint16).flat[-1] ^= 1
        write_safetensors(hf_folder / "model.safetensors", tensors)
        with pytest.raises(SystemExit, match=f"1 of 39 tensors differ: {re.escape(name)}$") as error:
            command(monkeypatch, verify_conversion, hf_folder, orbax_folder)
        assert isinstance(error.value.code, str)  # a message: the process exits with 1

    def test_another_size_is_refused(self, hf_folder, tmp_path, monkeypatch):
        other = make_folder(tmp_path / "other", random_tensors(True, "bfloat16"), tied=True)
        with pytest.raises(SystemExit, match="not models of one size"):
            command(monkeypatch, verify_conversion, hf_folder, other)

    def test_another_type_is_different(self, hf_folder, tmp_path):
        other = make_folder(tmp_path / "other", random_tensors(False, "float32"))
        assert len(verify_conversion.differing_tensors(pretrained.open_weights(hf_folder), pretrained.open_weights(other))) == 39

    def test_logits(self, hf_folder, orbax_folder, monkeypatch, capsys):
        pytest.importorskip("torch")
        tensors = {name: np.nan_to_num(t.astype(np.float32)).astype(t.dtype) for name, t in random_tensors(False, "bfloat16").items()}
        write_safetensors(hf_folder / "model.safetensors", tensors)
        pretrained.write_orbax(pretrained.open_weights(hf_folder), orbax_folder.with_name("clean"))
        command(monkeypatch, verify_conversion, hf_folder, orbax_folder.with_name("clean"), "--logits", "--logits-bound", "1e-4")
        assert "largest absolute difference" in capsys.readouterr().out


class TestSaveHF:
    @pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
    @pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
    def test_float32_masters_as_bfloat16(self, hf_folder, tmp_path, as_array):
        params = jax.tree.map(as_array, pretrained.load_params(hf_folder, dtype="float32"))
        pretrained.save_hf(params, hf_folder, tmp_path / "saved")
        saved = read_safetensors(tmp_path / "saved")
        assert saved.keys() == read_safetensors(hf_folder).keys()
        for name, tensor in random_tensors(False, "bfloat16").items():
            expected = tensor.astype(np.float32).astype(ml_dtypes.bfloat16)
            assert saved[name][2] == expected.tobytes(), name
        assert json.loads((tmp_path / "saved/config.json").read_text()) == {**config_of(False), "dtype": "bfloat16"}
        assert (tmp_path / "saved/chat_template.jinja").read_text() == (hf_folder / "chat_template.jinja").read_text()

    def test_dtype_goes_where_the_config_has_it(self, hf_folder, tmp_path):
        (hf_folder / "config.json").write_text(json.dumps({**config_of(False), "torch_dtype": "bfloat16"}))
        pretrained.save_hf(pretrained.load_params(hf_folder), hf_folder, tmp_path / "saved", dtype="float32")
        assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "float32"
        assert {entry[0] for entry in read_safetensors(tmp_path / "saved").values()} == {"F32"}

    def test_beside_an_orbax_source(self, orbax_folder, tmp_path):
        pretrained.save_hf(pretrained.load_params(orbax_folder), orbax_folder, tmp_path / "saved")
        assert pretrained.open_weights(tmp_path / "saved").config == ModelConfig.from_folder(orbax_folder)

    def test_a_tree_that_does_not_fit(self, hf_folder, tmp_path):
        params = pretrained.load_params(hf_folder)
        del params["lm_head"]
        with pytest.raises(ValueError, match="missing: lm_head/embedding"):
            pretrained.save_hf(params, hf_folder, tmp_path / "saved")
        assert not list(tmp_path.glob("saved*"))


HOLD = """
import sys, time
from jaxgrpo import pretrained
with pretrained.new_folder(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


class TestUnfinished:
    def test_an_existing_destination_is_kept(self, hf_folder, orbax_folder):
        before = sorted(p.name for p in orbax_folder.iterdir())
        with pytest.raises(FileExistsError, match="exists: remove it, or give another destination"):
            pretrained.write_orbax(pretrained.open_weights(hf_folder), orbax_folder)
        assert sorted(p.name for p in orbax_folder.iterdir()) == before

    def test_an_error_leaves_nothing(self, tmp_path):
        def fill_and_fail() -> None:
            with pretrained.new_folder(tmp_path / "out") as folder:
                (folder / "half").write_text("half")
                assert not (tmp_path / "out").exists()
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fill_and_fail()
        assert list(tmp_path.iterdir()) == []

    def test_success_leaves_what_was_written(self, tmp_path):
        with pretrained.new_folder(tmp_path / "deep/out") as folder:
            (folder / "whole").write_text("whole")
        assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["deep", "deep/out", "deep/out/whole"]

    def test_a_killed_writer_is_recognised(self, tmp_path):
        """While it lives its folder is refused; once it is dead the folder is refused as a model, and replaced by the next writer."""
        with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            with pytest.raises(FileExistsError, match="being written by another process"), pretrained.new_folder(tmp_path / "out"):
                pass
            assert (tmp_path / "out.partial/half").is_file()
            process.kill()
        assert not (tmp_path / "out").exists()
        with pytest.raises(ValueError, match="unfinished"):
            pretrained.open_weights(tmp_path / "out.partial")
        with pretrained.new_folder(tmp_path / "out") as folder:
            (folder / "whole").write_text("whole")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
        assert not (tmp_path / "out.partial").exists()

    def test_a_strangers_folder_is_kept(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/thesis.tex").write_text("\\section{}")
        with pytest.raises(FileExistsError, match="was not made by this program"), pretrained.new_folder(tmp_path / "out"):
            pass
        assert (tmp_path / "out.partial/thesis.tex").is_file()


LOCATE = "import sys; from jaxgrpo import pretrained; print(pretrained.locate(*sys.argv[1:]))"


class TestLocate:
    def offline(self, cache: Path, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
        return subprocess.run([sys.executable, "-c", LOCATE, *arguments], env=environment, capture_output=True, text=True, check=False)

    def test_a_folder(self, hf_folder):
        assert pretrained.locate(str(hf_folder)) == hf_folder

    def test_a_folder_has_no_revision(self, hf_folder):
        with pytest.raises(ValueError, match="no revision"):
            pretrained.locate(hf_folder, "main")

    @pytest.mark.parametrize("name", ["/no/such/folder", "./nothing/here", "nothing", "a/b/c"])
    def test_no_such_folder(self, name):
        with pytest.raises(FileNotFoundError, match=r"no folder .*hub name"):
            pretrained.locate(name)

    def test_a_hub_name_offline(self, tmp_path):
        done = self.offline(tmp_path, "Qwen/Qwen2.5-0.5B-Instruct", "abc123")
        assert done.returncode == 1
        assert "FileNotFoundError: Qwen/Qwen2.5-0.5B-Instruct (revision abc123)" in done.stderr
        assert "Put config.json, the *.safetensors" in done.stderr

    def test_a_hub_name_in_the_cache(self, tmp_path):
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = tmp_path / "models--Qwen--Tiny" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        done = self.offline(tmp_path, "Qwen/Tiny", commit)
        assert done.stdout.strip() == str(snapshot), done.stderr


class TestTokenizer:
    def test_loads_from_both_kinds_of_folder(self, hf_folder, orbax_folder):
        for folder in (hf_folder, orbax_folder):
            tokenizer = pretrained.load_tokenizer(folder)
            assert tokenizer("ab")["input_ids"] == [256]
            assert tokenizer.chat_template == byte_tokenizer().chat_template

    def test_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
            pretrained.load_tokenizer(tmp_path)

    def test_broken(self, hf_folder):
        (hf_folder / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be read"):
            pretrained.load_tokenizer(hf_folder)

    def test_without_a_chat_template(self, hf_folder):
        (hf_folder / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="no chat template"):
            pretrained.load_tokenizer(hf_folder)


def test_our_files_are_read_by_the_library(tmp_path):
    arrays = {
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
        "fortran": np.asfortranarray(np.eye(3, 2, dtype=np.float32)),
    }
    outgoing = [safetensors_io.Outgoing(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
    safetensors_io.write_folder(tmp_path, outgoing)
    found = read_safetensors(tmp_path)
    assert found == {name: ({2: "F16", 4: "F32"}[a.itemsize], a.shape, a.tobytes()) for name, a in arrays.items()}
    assert (tmp_path / "model.safetensors").read_bytes()[0] % 8 == 0  # the header's length: the data begins aligned
    assert {name: stored.map().tolist() for name, stored in safetensors_io.read_folder(tmp_path).items()} == {
        n: a.tolist() for n, a in arrays.items()
    }

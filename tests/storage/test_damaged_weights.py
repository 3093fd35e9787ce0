"""Weight files that are damaged, or something else: each is refused by one line that names it."""

import json
import struct
from pathlib import Path

import pytest
import safetensors

from jaxgrpo.storage import pretrained, safetensors_io

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}


def write(file: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def refused(read, argument: Path, file: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read(argument)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


HEADERS = {
    "a list": ([A], "holds a list"),
    "null": (None, "holds a NoneType"),
    "a text": ("tensors", "holds a str"),
    "not UTF-8": (b'{"\xff": 1}', "is not JSON"),
    "a key twice": (b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2), "'a' is there twice"),
    "an entry that is null": ({"a": A, "b": None}, "describes b by None"),
    "an entry that is a list": ({"a": A, "b": [8, 16]}, "describes b by"),
    "an entry without a type": (
        {"a": A, "b": {"shape": [4], "data_offsets": [8, 16]}},
        "describes b by",
    ),
    "a type that is a list": ({"a": A, "b": {**B, "dtype": ["BF16"]}}, "describes b by"),
    "a shape that is a text": (
        {"a": A, "b": {**B, "shape": "4"}},
        "the shape of b must be a list of whole numbers",
    ),
    "a shape of texts": ({"a": A, "b": {**B, "shape": ["2", "2"]}}, "the shape of b must be"),
    "a shape below zero": ({"a": A, "b": {**B, "shape": [-2, -2]}}, "the shape of b must be"),
    "offsets that are null": (
        {"a": A, "b": {**B, "data_offsets": None}},
        "the data_offsets of b must be a list",
    ),
    "one offset": (
        {"a": A, "b": {**B, "data_offsets": [8]}},
        "the data_offsets of b must be its begin and end",
    ),
    "three offsets": (
        {"a": A, "b": {**B, "data_offsets": [8, 16, 16]}},
        "the data_offsets of b must be its begin and end",
    ),
    "offsets turned round": (
        {"a": A, "b": {**B, "data_offsets": [16, 8]}},
        "the data_offsets of b must be its begin and end",
    ),
    "a fraction": (
        {"a": A, "b": {**B, "data_offsets": [8, 16.0]}},
        "the data_offsets of b must be a list",
    ),
    "a shape of another size": ({"a": A, "b": {**B, "shape": [3]}}, "b has 8 bytes, which is not"),
    "two at one place": (
        {"a": A, "b": {**B, "data_offsets": [0, 8]}},
        "b begins at byte 0 of the data, the tensor before it ends at 8",
    ),
    "two that overlap": ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, "b begins at byte 4"),
    "a hole": ({"a": A, "b": {**B, "data_offsets": [10, 18]}}, "b begins at byte 10"),
    "beyond the end": (
        {"a": A, "b": {**B, "shape": [4, 2], "data_offsets": [8, 24]}},
        "has .* bytes, its header says",
    ),
    "less than the file": ({"a": A}, "has .* bytes, its header says"),
    "nothing": ({}, "has .* bytes, its header says"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_damaged_header(tmp_path, what):
    header, said = HEADERS[what]
    file = write(tmp_path / "model.safetensors", header)
    with pytest.raises(
        (safetensors.SafetensorError, UnicodeDecodeError)
    ):  # the library refuses it as well
        safetensors.deserialize(file.read_bytes())
    refused(safetensors_io.read_header, file, file, said)


def test_a_sound_file_is_read(tmp_path):
    empty = {"dtype": "F16", "shape": [0, 3], "data_offsets": [8, 8]}
    file = write(
        tmp_path / "model.safetensors",
        {"b": B, "empty": empty, "a": A, "__metadata__": {"format": "pt"}},
    )
    assert {name for name, _ in safetensors.deserialize(file.read_bytes())} == {"a", "b", "empty"}
    found = safetensors_io.read_header(file)
    start = file.stat().st_size - 16
    assert {name: (t.offset - start, t.shape, t.dtype_name) for name, t in found.items()} == {
        "a": (0, (2,), "F32"),
        "b": (8, (2, 2), "BF16"),
        "empty": (8, (0, 3), "F16"),
    }


@pytest.mark.parametrize("name", ["BF17", "F64", "I8", "f32"])
def test_a_type_that_is_not_read(tmp_path, name):
    file = write(tmp_path / "model.safetensors", {"a": {**A, "dtype": name}}, bytes(8))
    tensor = safetensors_io.read_header(file)["a"]
    refused(lambda _: tensor.dtype, file, file, f"holds tensors of type {name}; allowed are")


@pytest.mark.parametrize("kept", [0, 7, 8, 30])
def test_a_file_that_was_cut(tmp_path, kept):
    file = write(tmp_path / "model.safetensors", {"a": A, "b": B})
    file.write_bytes(file.read_bytes()[:kept])
    refused(safetensors_io.read_header, file, file, "is no whole safetensors file")


def test_a_pointer_in_place_of_a_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text(POINTER)
    refused(safetensors_io.read_folder, tmp_path, file, "is a Git LFS pointer, not the file")


class TestIndex:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[1]", "holds a list"),
            ("null", "holds a NoneType"),
            ('"model.safetensors"', "holds a str"),
            ("{", "is not JSON"),
            (POINTER, "is a Git LFS pointer"),
            ('{"metadata": {}}', "must hold a weight_map of tensor names to files, got None"),
            ('{"weight_map": ["one.safetensors"]}', "must hold a weight_map"),
            ('{"weight_map": {}}', "must hold a weight_map"),
            (
                '{"weight_map": {"a": ["one.safetensors"]}}',
                "places a in .'one.safetensors'., which names no file",
            ),
            ('{"weight_map": {"a": null}}', "places a in None"),
            ('{"weight_map": {"a": ""}}', "places a in ''"),
            ('{"weight_map": {"a": "/one.safetensors"}}', "places a in '/one.safetensors'"),
            ('{"weight_map": {"a": "../one.safetensors"}}', "places a in '../one.safetensors'"),
            (
                '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
                "'a' is there twice",
            ),
            (
                '{"weight_map": {"c": "one.safetensors"}}',
                "places tensors in shards that do not hold them: c",
            ),
        ],
    )
    def test_a_damaged_one(self, tmp_path, text, said):
        write(tmp_path / "one.safetensors", {"a": A, "b": B})
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        refused(safetensors_io.read_folder, tmp_path, index, said)

    def test_one_name_in_two_shards(self, tmp_path):
        for name in ("one", "two"):
            write(tmp_path / f"{name}.safetensors", {"a": A, "b": B})
        places = {"a": "one.safetensors", "b": "two.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        refused(
            safetensors_io.read_folder,
            tmp_path,
            tmp_path,
            "a is in two shards of .*: one.safetensors and two.safetensors",
        )

    def test_shards_in_a_folder(self, tmp_path):
        (tmp_path / "parts").mkdir()
        write(tmp_path / "parts/one.safetensors", {"a": A, "b": B})
        places = dict.fromkeys("ab", "parts/one.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        assert safetensors_io.read_folder(tmp_path).keys() == {"a", "b"}


class TestOrbax:
    @pytest.mark.parametrize("text", ["[1]", "null", '"x"', "{", "{}", POINTER])
    def test_what_describes_a_leaf(self, orbax_folder, text):
        file = orbax_folder / "params/norm.scale/zarr.json"
        file.write_text(text)
        refused(
            pretrained.open_weights, orbax_folder, file, "is damaged .*: convert the model again"
        )

    @pytest.mark.parametrize(
        ("name", "said"),
        [("uint16", "norm/scale in .* is uint16; allowed are"), ("bfloat17", "is damaged ")],
    )
    def test_a_type_that_no_weight_has(self, orbax_folder, name, said):
        file = orbax_folder / "params/norm.scale/zarr.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "data_type": name, "fill_value": 0})
        )
        refused(pretrained.open_weights, orbax_folder, orbax_folder, said)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: b"",
            lambda data: data[:-1],
            lambda data: bytes([data[0] ^ 1]) + data[1:],
            lambda data: POINTER.encode(),
        ],
    )
    def test_values(self, orbax_folder, change):
        file = orbax_folder / "params/norm.scale/c/0"
        file.write_bytes(change(file.read_bytes()))
        refused(pretrained.load_params, orbax_folder, file, "is damaged ")

"""Hugging Face folder -> orbax folder -> Hugging Face folder: every bit, and what is refused."""

import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors

from jaxgrpo.storage import pretrained
from jaxgrpo.tools import convert_hf_to_orbax, convert_orbax_to_hf, verify_conversion
from tests.model_folders import (
    command,
    config_of,
    make_folder,
    random_tensors,
    read_safetensors,
    write_safetensors,
)
from tests.reference_model import float32_error, qwen2_logits

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a tool says on stderr, ending with that status."""

    def refused(module: ModuleType, *arguments: object, status: int = 2) -> str:
        with pytest.raises(SystemExit) as end:
            command(monkeypatch, module, *arguments)
        assert end.value.code == status
        return capsys.readouterr().err

    return refused


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 1), (False, 3)])
    def test_every_bit(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        dtype: str,
        tied: bool,
        shards: int,
    ) -> None:
        source = make_folder(tmp_path / "hf", random_tensors(tied, dtype), tied=tied, shards=shards)
        command(monkeypatch, convert_hf_to_orbax, source, tmp_path / "orbax")
        command(monkeypatch, verify_conversion, source, tmp_path / "orbax")
        command(monkeypatch, convert_orbax_to_hf, tmp_path / "orbax", tmp_path / "back")
        command(monkeypatch, verify_conversion, source, tmp_path / "back")
        assert f"{38 if tied else 39} tensors" in capsys.readouterr().out
        assert read_safetensors(tmp_path / "back") == read_safetensors(source)

    def test_folders_named_by_way_of_the_folder_above(
        self, hf_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Orbax itself takes no path with `..`."""
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        command(monkeypatch, convert_hf_to_orbax, "../hf", "../here/../orbax")
        command(monkeypatch, verify_conversion, "../hf", "../orbax")
        command(monkeypatch, convert_orbax_to_hf, "../orbax", "../back")
        assert read_safetensors(tmp_path / "back") == read_safetensors(hf_folder)

    def test_the_export_needs_only_the_orbax_folder(
        self, hf_folder: Path, orbax_folder: Path, tmp_path: Path
    ) -> None:
        expected, files = read_safetensors(hf_folder), {p.name for p in hf_folder.iterdir()}
        originals = {
            p.name: p.read_bytes() for p in hf_folder.iterdir() if p.suffix != ".safetensors"
        }
        for path in hf_folder.iterdir():
            path.unlink()
        pretrained.write_hf(pretrained.open_weights(orbax_folder), tmp_path / "back")
        assert {p.name for p in (tmp_path / "back").iterdir()} == files
        assert {name: (tmp_path / "back" / name).read_bytes() for name in originals} == originals
        assert {
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        } <= files
        assert read_safetensors(tmp_path / "back") == expected

    def test_shards_and_their_index(
        self, hf_folder: Path, orbax_folder: Path, tmp_path: Path
    ) -> None:
        pretrained.write_hf(
            pretrained.open_weights(orbax_folder), tmp_path / "back", shard_bytes=4300
        )
        files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
        assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
        index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
        expected = read_safetensors(hf_folder)
        assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in expected.values())
        assert index["weight_map"].keys() == expected.keys()
        for name, file in index["weight_map"].items():
            assert name in dict(safetensors.deserialize((tmp_path / "back" / file).read_bytes()))
        sizes = [
            sum(
                len(entry["data"])
                for _, entry in safetensors.deserialize((tmp_path / "back" / file).read_bytes())
            )
            for file in files
        ]
        assert sizes == [4240, 3072, 4224]
        assert read_safetensors(tmp_path / "back") == expected

    @pytest.mark.torch
    def test_transformers_loads_a_sharded_export(
        self, orbax_folder: Path, hf_folder: Path, tmp_path: Path
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        pretrained.write_hf(
            pretrained.open_weights(orbax_folder), tmp_path / "back", shard_bytes=4300
        )
        state = AutoModelForCausalLM.from_pretrained(
            tmp_path / "back", dtype=torch.bfloat16
        ).state_dict()
        for name, (_, shape, data) in read_safetensors(hf_folder).items():
            assert tuple(state[name].shape) == shape
            assert state[name].contiguous().view(torch.int16).numpy().tobytes() == data


class TestRefusals:
    def refused(
        self, folder: Path, tmp_path: Path, match: str, error: type[Exception] = ValueError
    ) -> None:
        with pytest.raises(error, match=match):
            pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "out")
        assert not list(tmp_path.glob("out*"))

    def test_missing_tensor(self, tmp_path: Path) -> None:
        tensors = random_tensors(False, "bfloat16")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        self.refused(
            make_folder(tmp_path / "hf", tensors),
            tmp_path,
            r"missing: model\.layers\.1\.mlp\.up_proj\.weight",
        )

    def test_extra_tensor(self, tmp_path: Path) -> None:
        tensors = {
            **random_tensors(False, "bfloat16"),
            "model.layers.0.self_attn.q_norm.weight": np.zeros(4, "bfloat16"),
        }
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, r"q_norm")

    def test_misshapen_tensor(self, tmp_path: Path) -> None:
        tensors = {
            **random_tensors(False, "bfloat16"),
            "model.norm.weight": np.zeros(9, "bfloat16"),
        }
        self.refused(
            make_folder(tmp_path / "hf", tensors), tmp_path, r"model\.norm\.weight has shape \(9,\)"
        )

    def test_unsupported_type(self, tmp_path: Path) -> None:
        tensors = {**random_tensors(False, "bfloat16"), "model.norm.weight": np.zeros(8, "int8")}
        self.refused(make_folder(tmp_path / "hf", tensors), tmp_path, "I8")

    def test_layers_of_two_types(self, tmp_path: Path) -> None:
        tensors = random_tensors(False, "bfloat16")
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(8, np.float32)
        self.refused(
            make_folder(tmp_path / "hf", tensors),
            tmp_path,
            r"model\.layers\.2\.input_layernorm\.weight .*float32",
        )

    def test_a_type_for_each_leaf_is_kept(self, tmp_path: Path) -> None:
        tensors = {**random_tensors(False, "bfloat16"), "model.norm.weight": np.ones(8, np.float32)}
        source = make_folder(tmp_path / "hf", tensors)
        pretrained.write_orbax(pretrained.open_weights(source), tmp_path / "orbax")
        pretrained.write_hf(pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back")
        assert read_safetensors(tmp_path / "back") == read_safetensors(source)

    def test_no_weights(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "hf", {})
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(
            folder,
            tmp_path,
            r"pytorch_model\.bin: save the model as safetensors",
            FileNotFoundError,
        )

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"), shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        self.refused(folder, tmp_path, "model-00002-of-00003", FileNotFoundError)

    def test_an_index_that_lies(self, tmp_path: Path) -> None:
        folder = make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"), shards=3)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
        index["weight_map"]["lm_head.weight"] = "model-00002-of-00003.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, tmp_path, r"model\.norm\.weight|lm_head\.weight")

    @pytest.mark.parametrize("kept", [0, 5, 100, -1])
    def test_truncated_file(self, hf_folder: Path, tmp_path: Path, kept: int) -> None:
        file = hf_folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        self.refused(hf_folder, tmp_path, "fetch it again")

    def test_a_file_that_is_a_pointer(self, hf_folder: Path, tmp_path: Path) -> None:
        (hf_folder / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        )
        self.refused(hf_folder, tmp_path, "is a Git LFS pointer")

    def test_an_orbax_folder_is_not_converted_again(
        self, orbax_folder: Path, tmp_path: Path, refused: Refused
    ) -> None:
        said = refused(convert_hf_to_orbax, orbax_folder, tmp_path / "out")
        assert said.endswith(
            "is already an orbax folder: jaxgrpo.tools.convert_orbax_to_hf converts it back\n"
        )

    def test_a_hf_folder_is_not_exported(
        self, hf_folder: Path, tmp_path: Path, refused: Refused
    ) -> None:
        assert "is not an orbax folder" in refused(convert_orbax_to_hf, hf_folder, tmp_path / "out")

    def test_a_destination_that_is_there(self, hf_folder: Path, refused: Refused) -> None:
        said = refused(convert_hf_to_orbax, hf_folder, hf_folder)
        assert f"{hf_folder} exists: remove it" in said

    @pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "much"])
    def test_a_shard_size_that_is_none(
        self, orbax_folder: Path, tmp_path: Path, refused: Refused, size: str
    ) -> None:
        out = tmp_path / "out"
        said = refused(convert_orbax_to_hf, orbax_folder, out, f"--shard-gb={size}")
        assert f"argument --shard-gb: must be a number above 0, got {size!r}" in said

    def test_a_disk_that_takes_no_more_ends_with_one(
        self, orbax_folder: Path, tmp_path: Path, refused: Refused
    ) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            said = refused(convert_orbax_to_hf, orbax_folder, tmp_path / "out", status=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert said.startswith("error: ") and "File too large" in said


class TestTiedHead:
    def test_the_same_bits_are_accepted_and_dropped(self, tmp_path: Path) -> None:
        tensors = random_tensors(True, "bfloat16")
        folder = make_folder(
            tmp_path / "hf",
            {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()},
            tied=True,
        )
        pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax")
        pretrained.write_hf(pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back")
        assert read_safetensors(tmp_path / "back").keys() == tensors.keys()

    def test_one_different_bit_is_refused(self, tmp_path: Path) -> None:
        tensors = random_tensors(True, "bfloat16")
        head = tensors["model.embed_tokens.weight"].copy()
        head.view(np.uint16)[200, 7] ^= 1
        folder = make_folder(tmp_path / "hf", {**tensors, "lm_head.weight": head}, tied=True)
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            pretrained.open_weights(folder)


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(False, "bfloat16")
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for i in range(3)
    }
    folder = make_folder(tmp_path / "hf", {**tensors, **buffers})
    pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax")
    assert (
        verify_conversion.differing_tensors(
            pretrained.open_weights(folder), pretrained.open_weights(tmp_path / "orbax")
        )
        == []
    )


class TestVerify:
    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.1.self_attn.k_proj.bias",
            "model.embed_tokens.weight",
        ],
    )
    def test_one_bit_is_found_and_named(
        self,
        hf_folder: Path,
        orbax_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        tensors = random_tensors(False, "bfloat16")
        tensors[name].view(np.uint16).flat[-1] ^= 1
        write_safetensors(hf_folder / "model.safetensors", tensors)
        with pytest.raises(
            SystemExit, match=f"1 of 39 tensors differ: {re.escape(name)}$"
        ) as error:
            command(monkeypatch, verify_conversion, hf_folder, orbax_folder)
        assert isinstance(error.value.code, str)  # a message: the process exits with 1

    def test_another_size_is_refused(
        self, hf_folder: Path, tmp_path: Path, refused: Refused
    ) -> None:
        other = make_folder(tmp_path / "other", random_tensors(True, "bfloat16"), tied=True)
        assert "not models of one size" in refused(verify_conversion, hf_folder, other)

    def test_another_type_is_different(self, hf_folder: Path, tmp_path: Path) -> None:
        other = make_folder(tmp_path / "other", random_tensors(False, "float32"))
        assert (
            len(
                verify_conversion.differing_tensors(
                    pretrained.open_weights(hf_folder), pretrained.open_weights(other)
                )
            )
            == 39
        )

    @pytest.fixture
    def finite(self, hf_folder: Path, tmp_path: Path) -> tuple[Path, Path, np.ndarray, float]:
        """One model without NaNs as a folder of either kind; its logits in float64, and how far
        float32 may be off."""
        found = random_tensors(False, "bfloat16").items()
        tensors = {name: np.nan_to_num(t.astype(np.float32)).astype(t.dtype) for name, t in found}
        write_safetensors(hf_folder / "model.safetensors", tensors)
        pretrained.write_orbax(pretrained.open_weights(hf_folder), tmp_path / "finite")
        config, ids_T = config_of(False), verify_conversion.prompt_ids(hf_folder)
        exact, error = qwen2_logits(config, tensors, ids_T), float32_error(config, tensors, ids_T)
        for fault, at_least in (({"rope_theta": 1.01e4}, 100), ({"rms_norm_eps": 1e-4}, 5)):
            wrong = qwen2_logits({**config, **fault}, tensors, ids_T)
            assert np.abs(wrong - exact).max() > at_least * error
        return hf_folder, tmp_path / "finite", exact, error

    def test_our_logits(self, finite: tuple[Path, Path, np.ndarray, float]) -> None:
        _, folder, exact, error = finite
        ids_T = verify_conversion.prompt_ids(folder)
        assert np.abs(verify_conversion.our_logits(folder, ids_T) - exact).max() < error

    @pytest.mark.torch
    def test_logits(
        self,
        finite: tuple[Path, Path, np.ndarray, float],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder, converted, exact, error = finite
        ids_T = verify_conversion.prompt_ids(folder)
        assert np.abs(verify_conversion.their_logits(folder, ids_T) - exact).max() < error
        bound = ("--logits", "--logits-bound", 2 * error)
        command(monkeypatch, verify_conversion, folder, converted, *bound)
        assert "largest absolute difference" in capsys.readouterr().out

    def test_logits_without_pytorch(
        self, hf_folder: Path, orbax_folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
        said = refused(verify_conversion, hf_folder, orbax_folder, "--logits")
        assert said.startswith("error: --logits needs PyTorch, which is not installed")

    def test_logits_of_an_orbax_folder_are_not_asked_of_transformers(
        self, hf_folder: Path, orbax_folder: Path, refused: Refused
    ) -> None:
        said = refused(verify_conversion, orbax_folder, hf_folder, "--logits")
        assert said.startswith("error: --logits loads the first folder with transformers, but")
        assert said.endswith(f"{orbax_folder} is an orbax folder: name it second\n")

"""Models on disk: found, loaded, exported, and what an interruption leaves."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from transformers import AutoConfig

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.storage import hf_mapping, pretrained, safetensors_io
from tests import model_folders
from tests.byte_chat import byte_tokenizer
from tests.model_folders import config_of, make_folder, random_tensors, read_safetensors


class TestLoadParams:
    def test_both_kinds_of_folder_give_the_same(self, hf_folder, orbax_folder):
        a, b = (
            hf_mapping.flatten(pretrained.load_params(hf_folder)),
            hf_mapping.flatten(pretrained.load_params(orbax_folder)),
        )
        assert a.keys() == b.keys()
        assert all(hf_mapping.same_bits(a[path], b[path]) for path in a)

    @pytest.mark.parametrize("dtype", ["float32", np.float32, jnp.bfloat16])
    def test_dtype(self, hf_folder, dtype):
        flat = hf_mapping.flatten(pretrained.load_params(hf_folder, dtype=dtype))
        assert {leaf.dtype for leaf in flat.values()} == {np.dtype(dtype)}
        assert all(leaf.flags.c_contiguous and leaf.flags.writeable for leaf in flat.values())
        expected = random_tensors(False, "bfloat16")[
            "model.layers.2.mlp.down_proj.weight"
        ].T.astype(dtype)
        assert hf_mapping.same_bits(
            flat["layers", "mlp", "down", "kernel"][2], np.ascontiguousarray(expected)
        )

    def test_another_config_is_refused(self, hf_folder):
        other = ModelConfig.from_hf({**config_of(False), "num_hidden_layers": 2})
        with pytest.raises(ValueError, match=r"model\.layers\.2\."):
            pretrained.load_params(hf_folder, other)

    def test_memory_stays_near_a_tensor(self, tmp_path, monkeypatch):
        config = {
            **config_of(False),
            "num_hidden_layers": 24,
            "hidden_size": 128,
            "intermediate_size": 512,
        }
        monkeypatch.setattr(model_folders, "SIZES", {**model_folders.SIZES, **config})
        tensors = random_tensors(False, "float32")
        folder = make_folder(tmp_path / "hf", tensors)
        largest, total = (
            max(t.nbytes for t in tensors.values()),
            sum(t.nbytes for t in tensors.values()),
        )
        del tensors
        assert (largest, total // 2**20) == (262144, 22)
        peaks = {}
        tracemalloc.start()
        for name, run in (
            (
                "orbax",
                lambda: pretrained.write_orbax(pretrained.open_weights(folder), tmp_path / "orbax"),
            ),
            (
                "hf",
                lambda: pretrained.write_hf(
                    pretrained.open_weights(tmp_path / "orbax"), tmp_path / "back"
                ),
            ),
        ):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            run()
            peaks[name] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert max(peaks.values()) < 3 * 2**20, peaks


BOTH = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


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
        assert json.loads((tmp_path / "saved/config.json").read_text()) == {
            **config_of(False),
            "dtype": "bfloat16",
        }
        assert (tmp_path / "saved/chat_template.jinja").read_text() == (
            hf_folder / "chat_template.jinja"
        ).read_text()

    def test_dtype_goes_where_the_config_has_it(self, hf_folder, tmp_path):
        (hf_folder / "config.json").write_text(
            json.dumps({**config_of(False), "torch_dtype": "bfloat16"})
        )
        pretrained.save_hf(
            pretrained.load_params(hf_folder), hf_folder, tmp_path / "saved", dtype="float32"
        )
        assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "float32"
        assert {entry[0] for entry in read_safetensors(tmp_path / "saved").values()} == {"F32"}

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ({"dtype": "float16", "torch_dtype": "bfloat16"}, BOTH),
            ({"dtype": "bfloat16", "torch_dtype": "float16"}, BOTH),
            ({"dtype": None, "torch_dtype": "float16"}, BOTH),
            ({"torch_dtype": "float16"}, {"torch_dtype": "bfloat16"}),
            ({"dtype": "float16"}, {"dtype": "bfloat16"}),
            ({}, {"dtype": "bfloat16"}),
        ],
    )
    def test_transformers_reads_the_type_that_was_written(
        self, hf_folder, tmp_path, said, expected
    ):
        (hf_folder / "config.json").write_text(json.dumps({**config_of(False), **said}))
        pretrained.save_hf(pretrained.load_params(hf_folder), hf_folder, tmp_path / "saved")
        written = json.loads((tmp_path / "saved/config.json").read_text())
        assert written == {**config_of(False), **expected}
        read = AutoConfig.from_pretrained(tmp_path / "saved").dtype  # where PyTorch is, its type
        assert str(read).removeprefix("torch.") == "bfloat16"

    def test_beside_an_orbax_source(self, orbax_folder, tmp_path):
        pretrained.save_hf(pretrained.load_params(orbax_folder), orbax_folder, tmp_path / "saved")
        assert pretrained.open_weights(tmp_path / "saved").config == ModelConfig.from_folder(
            orbax_folder
        )

    def test_a_tree_that_does_not_fit(self, hf_folder, tmp_path):
        params = pretrained.load_params(hf_folder)
        del params["lm_head"]
        with pytest.raises(ValueError, match="missing: lm_head/embedding"):
            pretrained.save_hf(params, hf_folder, tmp_path / "saved")
        assert not list(tmp_path.glob("saved*"))


HOLD = """
import sys, time
from jaxgrpo.storage import pretrained
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
        assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
            "deep",
            "deep/out",
            "deep/out/whole",
        ]

    def test_a_killed_writer_is_recognised(self, tmp_path):
        """While it lives its folder is refused; once it is dead the folder is refused as a model, and replaced by the next writer."""
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            with (
                pytest.raises(FileExistsError, match="being written by another process"),
                pretrained.new_folder(tmp_path / "out"),
            ):
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
        with (
            pytest.raises(FileExistsError, match="was not made by this program"),
            pretrained.new_folder(tmp_path / "out"),
        ):
            pass
        assert (tmp_path / "out.partial/thesis.tex").is_file()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
LOCATE = (
    "import sys; from jaxgrpo.storage import pretrained; print(pretrained.locate(*sys.argv[1:]))"
)


class TestLocate:
    def offline(self, cache: Path, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
        return subprocess.run(
            [sys.executable, "-c", LOCATE, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

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

    @pytest.mark.parametrize(
        "name",
        ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
    )
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "is not JSON"),
            ("[1]", "holds a list"),
            ("null", "holds a NoneType"),
            (POINTER, "is a Git LFS pointer"),
        ],
    )
    def test_a_damaged_file_is_named(self, hf_folder, name, text, said):
        (hf_folder / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} {said}"):
            pretrained.load_tokenizer(hf_folder)

    def test_a_pointer_in_place_of_the_chat_template(self, hf_folder):
        (hf_folder / "chat_template.jinja").write_text(POINTER)
        with pytest.raises(ValueError, match=r"chat_template\.jinja is a Git LFS pointer"):
            pretrained.load_tokenizer(hf_folder)

    @pytest.mark.parametrize(
        "change", [{"pad_token": 3}, {"model_max_length": "long"}, {"added_tokens_decoder": [1]}]
    )
    def test_settings_of_the_wrong_type(self, hf_folder, change):
        file = hf_folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ValueError, match="cannot be read by transformers"):
            pretrained.load_tokenizer(hf_folder)

    def test_without_a_chat_template(self, hf_folder):
        (hf_folder / "chat_template.jinja").unlink()
        with pytest.raises(ValueError, match="no chat template"):
            pretrained.load_tokenizer(hf_folder)


class TestGenerationEnds:
    @pytest.mark.parametrize(
        ("given", "ids"),
        [({}, ()), ({"eos_token_id": 3}, (3,)), ({"eos_token_id": [4, 3]}, (4, 3))],
    )
    def test_read(self, tmp_path, given, ids):
        assert pretrained.generation_ends(tmp_path) == ()
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
        assert pretrained.generation_ends(tmp_path) == ids

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('{"eos_token_id": "3"}', "eos_token_id must be a whole number"),
            ("[3]", "holds a list"),
            (POINTER, "is a Git LFS pointer"),
        ],
    )
    def test_refused(self, tmp_path, text, said):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"generation_config\.json.*{said}"):
            pretrained.generation_ends(tmp_path)


def test_our_files_are_read_by_the_library(tmp_path):
    arrays = {
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
        "fortran": np.asfortranarray(np.eye(3, 2, dtype=np.float32)),
    }
    outgoing = [
        safetensors_io.Outgoing(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()
    ]
    safetensors_io.write_folder(tmp_path, outgoing)
    found = read_safetensors(tmp_path)
    assert found == {
        name: ({2: "F16", 4: "F32"}[a.itemsize], a.shape, a.tobytes()) for name, a in arrays.items()
    }
    assert (tmp_path / "model.safetensors").read_bytes()[
        0
    ] % 8 == 0  # the header's length: the data begins aligned
    assert {
        name: stored.map().tolist() for name, stored in safetensors_io.read_folder(tmp_path).items()
    } == {n: a.tolist() for n, a in arrays.items()}

"""Configs: loading, overrides, errors, and that every setting is read somewhere."""

import ast
import dataclasses
import json
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.load import apply_override, check, incompatible_changes, load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.learner.optimizer import make_optimizer
from tests.training import Letters, small_config, write_config

SMALL = small_config("model")


def refused(*overrides: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(write_config(folder, Path("model")), overrides)
    return str(error.value)


def test_override_of_each_kind_of_value() -> None:
    config = dataclasses.replace(SMALL, environment=Bfcl())
    for override, expected in {
        "rollout.group_size=16": 16,
        "rollout.temperature=2": 2.0,
        "training.devices=None": None,
        "training.reference_every=none": None,
        "recording.trajectories=false": False,
        "evaluation.splits=train,test": ("train", "test"),
        "evaluation.splits=('train',)": ("train",),
        "evaluation.splits=test": ("test",),
        "model.revision=12e45": "12e45",
        "model.source='a b'": "a b",
        "model.revision=None": None,
        "loss.tis_cap = 2": 2.0,
        "environment.protocol=native": "native",
        "environment.categories=base,miss_func": ("base", "miss_func"),
        "environment.examples=2": 2,
        "seed=7": 7,
    }.items():
        changed = apply_override(config, override)
        key = override.partition("=")[0].strip()
        value = changed
        for name in key.split("."):
            value = getattr(value, name)
        assert value == expected and type(value) is type(expected), override


def test_an_int_in_the_file_is_stored_as_the_float_that_the_field_is(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\nfrom tests.training import small_config\n"
        "from jaxgrpo.config.settings import EvaluationSettings\n"
        "def get_config():\n"
        "    evaluation = EvaluationSettings(temperature=1, splits=['train'])\n"
        "    return dataclasses.replace(small_config('m'), evaluation=evaluation)\n"
    )
    evaluation = load_config(path).evaluation
    assert type(evaluation.temperature) is float and evaluation.splits == ("train",)


def test_overrides_of_one_section_are_checked_together(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\nfrom jaxgrpo.envs.procedural import Warehouse\n"
        "from tests.training import small_config\n"
        "def get_config():\n"
        "    warehouse = Warehouse(train_size=500, test_size=70)\n"
        "    return dataclasses.replace(small_config('m'), environment=warehouse)\n"
    )
    assert load_config(
        path, ["environment.test_size=300", "environment.train_size=200"]
    ).environment == Warehouse(train_size=200, test_size=300)
    with pytest.raises(ConfigError, match="environment: train_size"):
        load_config(path, ["environment.test_size=300"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.stepz=3", "Did you mean 'training.steps'?"),
        ("group_size=4", "Did you mean 'rollout.group_size'?"),
        ("rolout.group_size=4", "Did you mean 'rollout.group_size'?"),
        ("environment.train_sise=4", "Did you mean 'environment.train_size'?"),
        ("training.steps.more=3", "unknown setting 'training.steps.more'"),
        ("training=3", "'training' is a section"),
        ("training.steps", "--set takes key=value"),
        ("=3", "--set takes key=value"),
        ("training.steps=many", "training.steps must be of type int, got 'many'"),
        ("training.steps=2.0", "training.steps must be of type int, got 2.0"),
        ("training.steps=True", "training.steps must be of type int, got True"),
        ("recording.trajectories=1", "recording.trajectories must be of type bool, got 1"),
        ("training.devices=two", "training.devices must be of type int or None, got 'two'"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate must be finite"),
        ("evaluation.splits=(1,)", "evaluation.splits must be of type str, got 1"),
        ("environment.bonus=x", "environment.bonus must be of type float"),
        ("rollout.group_size=1", "rollout.group_size must be at least 2, got 1"),
        ("rollout.temperature=0", "rollout.temperature must be at least 0.01 (vLLM"),
        ("evaluation.top_p=1.5", "evaluation.top_p must be at most 1"),
        ("optimizer.b2=1", "optimizer.b2 must be in [0, 1)"),
        ("seed=-1", "seed must be at least 0"),
        ("batching.aggregation=tokens", "Did you mean 'token'?"),
        ("sampler=nativ", "Did you mean 'native'?"),
        (
            "lora.targets=q,upp",
            "lora.targets must be one of q, k, v, o, gate, up, down; got 'upp'. Did you mean 'up'?",
        ),
        ("evaluation.splits=test,test", "name 'test' twice"),
        (
            "training.iterations=4",
            "training.steps (6) must be a multiple of training.iterations (4)",
        ),
        (
            "training.groups_per_device=4",
            "must be a multiple of training.devices x training.groups_per_device (1 x 4)",
        ),
        ("training.remat=all", "training.remat must be one of full, attention, none; got 'all'"),
        ("training.attention=cudn", "Did you mean 'cudnn'?"),
        ("native.max_cache_tokens=64", "native.max_cache_tokens (64) cannot hold one episode"),
        ("loss.kl_beta=0", "training.reference_every has no effect when loss.kl_beta is 0"),
        ("recording.wandb_project=p", "wandb is not installed"),
        ("name=a/b", "name must be letters"),
        ("sampler=vlm", "Did you mean 'vllm'?"),
        ("vllm.gpu_memory=1.5", "vllm.gpu_memory must be at most 1"),
        ("vllm.max_mismatch=0", "vllm.max_mismatch must be above 0"),
        ("vllm.gpus=(1,1)", "vllm.gpus must be different indices"),
        ("training.gpus=()", "training.devices is 1, but training.gpus names 0"),
        ("training.max_staleness=-1", "training.max_staleness must be at least 0"),
        (
            "training.max_staleness=1",
            "needs importance sampling: set loss.tis_cap, e.g. to 2.0",
        ),
        ("seed=99999999999999999999999", "seed must be below 2^63 = 9223372036854775808, got 99"),
        ("seed=9223372036854775808", "seed must be below 2^63"),
        (
            "optimizer.warmup_steps=2147483648",
            "optimizer.warmup_steps must be below 2^31 = 21474836",
        ),
        ("native.decode_chunk=1000000000000000000000", "native.decode_chunk must be below 2^31"),
        ("training.gpus=(10000000000,)", "training.gpus must be below 2^31"),
        ("vllm.cache_bytes=9223372036854775808", "vllm.cache_bytes must be below 2^63"),
        (f"optimizer.learning_rate=1{'0' * 400}", "optimizer.learning_rate must be finite"),
        (f"recording.trajectories=0x1{'0' * 4000}", "must be of type bool, got an object of int"),
        (
            f"training.steps=0x1{'0' * 4000}",
            "training.steps must be below 2^31 = 2147483648, got an",
        ),
        ("optimizer.learning_rate=1e39", "size that float32 has, 1.18e-38 to 3.4e+38, got 1e+39"),
        ("optimizer.epsilon=1e-60", "optimizer.epsilon must be of a size that float32 has"),
        ("rollout.temperature=1e-300", "rollout.temperature must be of a size that float32 has"),
        ("rollout.temperature=0.001", "rollout.temperature must be at least 0.01 (vLLM"),
        ("evaluation.temperature=0.001", "evaluation.temperature must be 0, or at least 0.01"),
        ("optimizer.b2=0.99999999999", "optimizer.b2 must be in [0, 1) and in float32 below 1"),
        ("vllm.request_seconds=1e10", "vllm.request_seconds must be at most 1000000000"),
        ("rollout.step_deadline_seconds=1e12", "step_deadline_seconds must be at most 1000000000"),
    ],
)
def test_each_error_names_the_key_and_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setattr("jaxgrpo.config.checks.importlib.util.find_spec", lambda name: None)
    assert said in refused(override, folder=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.gpus=(0,1)", "vllm.gpus=(1,)"), "training.gpus and vllm.gpus share GPU 1"),
        (("vllm.gpus=(1,)",), "vllm.gpus is set and training.gpus is not"),
        (("vllm.urls=http://a:1", "vllm.port=5"), "leave out one or the other"),
        (("vllm.urls=http://a:1", "vllm.servers=2"), "leave out one or the other"),
        (
            ("vllm.gpus=(1,2,3)", "training.gpus=(0,)", "vllm.servers=2"),
            "vllm.servers (2) must divide the 3 GPU(s) of vllm.gpus",
        ),
        (("vllm.urls=a:8000",), "vllm.urls must be like http://host:8000, got 'a:8000'"),
    ],
)
def test_conflicts_between_vllm_and_the_trainer(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    assert said in refused("sampler=vllm", *overrides, folder=tmp_path)


def test_the_largest_allowed_numbers_work(tmp_path: Path) -> None:
    path = write_config(tmp_path, Path("model"))
    largest = ["seed=9223372036854775807", "vllm.cache_bytes=9223372036854775807"]
    largest += ["optimizer.warmup_steps=2147483647", "optimizer.b2=0.9999999"]
    config = load_config(path, [*largest, "evaluation.temperature=0"])
    assert jax.random.key_data(jax.random.key(config.seed)).tolist() == [0, 2**32 - 1]
    optimizer = make_optimizer(config.optimizer)
    ones = {"w": jnp.ones(2)}
    updates, _ = optimizer.update(ones, optimizer.init(ones), ones)
    assert np.isfinite(np.asarray(updates["w"])).all()


def test_numbers_of_an_environment_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\nfrom tests.training import Letters, small_config\n"
        "def get_config():\n"
        "    letters = Letters(train_size=10**30, bonus=1e-300)\n"
        "    return dataclasses.replace(small_config('m'), environment=letters)\n"
    )
    assert load_config(path).environment.train_size == 10**30


def test_fields_that_a_class_fills_in_itself_are_not_settings(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\nfrom tests.training import Letters, small_config\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n"
        "    kind: type = Letters\n"
        "    made: int = dataclasses.field(init=False, default=0)\n"
        "    once: dataclasses.InitVar[int] = 1\n"
        "    def __post_init__(self, once): object.__setattr__(self, 'made', once)\n"
        "def get_config():\n"
        "    return dataclasses.replace(small_config('m'), environment=Mine(once=3))\n"
    )
    config = load_config(path)
    assert (config.environment.made, config.environment.kind) == (3, Letters)
    assert "made" not in json.loads(to_json(config))["environment"]
    with pytest.raises(ConfigError, match=r"unknown setting 'environment\.made'"):
        load_config(path, ["environment.made=4"])


def test_paths_are_absolute_and_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder is the one before the config file runs, which may change it."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = write_config(tmp_path, Path("../here/model"))
    path.write_text("import os\nos.chdir('/')\n" + path.read_text())
    given = ["vllm.weights_folder=../w", "vllm.python=.venv/bin/python"]
    config = load_config("../small.py", given)
    assert config.model.source == f"{tmp_path}/here/model"
    assert config.vllm.weights_folder == f"{tmp_path}/w"
    assert config.vllm.python == f"{tmp_path}/here/.venv/bin/python"
    kept = load_config(path, ["model.source=Qwen/Qwen2.5-0.5B", "vllm.python=python3"])
    assert (kept.model.source, kept.vllm.python) == ("Qwen/Qwen2.5-0.5B", "python3")


def test_all_contradictions_are_listed_at_once(tmp_path: Path) -> None:
    said = refused(
        "foo=1",
        "training.steps=5",
        "rollout.group_size=1",
        "evaluation.splits=",
        "evaluation.after=True",
        folder=tmp_path,
    )
    for part in ("foo", "training.steps (5)", "rollout.group_size", "evaluation.splits is empty"):
        assert part in said
    assert said.count("\n- ") == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n    pass\n", "c.py, line 1: SyntaxError"),
        ("\nx = 1 / 0\n", "c.py, line 2: ZeroDivisionError"),
        (
            "def get_config():\n    a = 1\n    raise KeyError('gone')\n",
            "c.py, line 3: KeyError: 'gone'",
        ),
        ("import sys\nsys.exit(3)\n", "c.py, line 2: SystemExit: 3"),
        ("x = '\0'\n", "c.py: SyntaxError: source code string cannot contain null bytes"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n    return 3\n", "returned int, not a jaxgrpo.config.settings.Config"),
        (
            "from jaxgrpo.envs.procedural import Warehouse\nWarehouse(\n    kinds=('walk',))\n",
            "line 2: ValueError: kinds must be",
        ),
        (
            "from jaxgrpo.config.settings import RolloutSettings\nRolloutSettings(group_sice=3)\n",
            "unexpected keyword argument 'group_sice'. Did you mean 'group_size'?",
        ),
    ],
)
def test_an_error_in_a_file_names_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert said in str(error.value)


def test_a_missing_file_and_an_environment_of_the_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "none.py")
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / ("long" * 1000))
    assert load_config(write_config(tmp_path, Path("long" * 1000))).model.source == "long" * 1000
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\nfrom tests.training import small_config\n"
        "from jaxgrpo.envs.procedural import Warehouse\n"
        "def get_config():\n"
        "    return dataclasses.replace(small_config('m'), environment=Warehouse)\n"
    )
    with pytest.raises(ConfigError, match="must be an instance of a dataclass"):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rollout=RolloutSettings", "rollout must be of type RolloutSettings, got <class"),
        (
            "rollout=TrainingSettings()",
            "rollout must be of type RolloutSettings, got TrainingSettings(",
        ),
        ("model='m'", "model must be of type ModelSettings, got 'm'"),
        (
            "environment=RolloutSettings()",
            "must be an instance of a dataclass with tasks() and create(), got RolloutSettings(",
        ),
    ],
)
def test_a_section_of_the_wrong_type(tmp_path: Path, change: str, said: str) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "import dataclasses\n"
        "from jaxgrpo.config.settings import RolloutSettings, TrainingSettings\n"
        "from tests.training import small_config\n"
        f"def get_config():\n    return dataclasses.replace(small_config('m'), {change})\n"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(path, ["rollout.group_size=4"])


def test_json_names_the_environment_and_tells_what_changed() -> None:
    saved = to_json(SMALL)
    assert json.loads(saved)["environment"]["class"] == "tests.training:Letters"
    check(SMALL)
    same = apply_override(apply_override(SMALL, "training.steps=8"), "evaluation.splits=train")
    assert incompatible_changes(saved, same) == []
    other = apply_override(apply_override(SMALL, "rollout.group_size=8"), "environment.good=abc")
    changes = incompatible_changes(saved, other)
    assert [line.split(" was ")[0] for line in changes] == [
        "environment.good",
        "rollout.group_size",
    ]
    assert changes[1] == "rollout.group_size was 4 and is now 8"
    warehouse = dataclasses.replace(SMALL, environment=Warehouse())
    assert any(
        line.startswith("environment.class") for line in incompatible_changes(saved, warehouse)
    )


def test_every_setting_is_read_outside_its_definition() -> None:
    """A setting that nothing reads has no effect."""
    read = set()
    for path in Path("jaxgrpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    sections = [
        kind
        for kind in typing.get_type_hints(Config).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]
    assert len(sections) == 12
    unread = {
        f"{kind.__name__}.{field.name}"
        for kind in (Config, *sections)
        for field in dataclasses.fields(kind)
        if field.name not in read
    }
    assert unread == set()

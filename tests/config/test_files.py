"""Config files as modules: annotations, pickling, imports from beside them, and users' folders with
the names of this project's."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxgrpo.config.files import same_label
from jaxgrpo.config.load import load_config
from jaxgrpo.config.overrides import leaves
from jaxgrpo.config.settings import ConfigError

ROOT = Path(__file__).parents[2]
CONFIG = """from __future__ import annotations

import dataclasses
import typing

from tests.training import Letters, small_config

if typing.TYPE_CHECKING:
    from collections import OrderedDict

Size = int


@dataclasses.dataclass(frozen=True)
class Mine(Letters):
    size: Size = 3
    only_for_type_checkers: OrderedDict | None = None

    def twice(self) -> int:
        return 2 * self.size


def get_config():
    return dataclasses.replace(small_config("m"), environment=Mine(), name="here")
"""


def config_in(folder: Path, text: str = CONFIG, name: str = "mine_to_test.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_annotations_in_quotes_are_read(tmp_path: Path) -> None:
    path = config_in(tmp_path)
    environment = load_config(path, ["environment.size=5", "environment.good=xyz"]).environment
    assert (environment.size, environment.good, environment.twice()) == (5, "xyz", 10)
    with pytest.raises(ConfigError, match=r"environment.size must be of type int, got 'many'"):
        load_config(path, ["environment.size=many"])


def test_each_of_two_files_of_one_name_keeps_its_own_names(tmp_path: Path) -> None:
    first = load_config(config_in(tmp_path / "a"))
    second = load_config(config_in(tmp_path / "b", CONFIG.replace("Size = int", "Size = float")))
    kinds = [{key: kind for key, _, kind in leaves(c)} for c in (first, second)]
    assert [kind["environment.size"] for kind in kinds] == [int, float]


def test_a_file_loads_although_another_of_its_name_was_loaded_and_renamed(tmp_path: Path) -> None:
    first = config_in(tmp_path / "a", name="renamed_to_test.py")
    load_config(first)
    first.rename(tmp_path / "a" / "gone_to_test.py")
    second = config_in(tmp_path / "b", CONFIG.replace("= 3", "= 4"), "renamed_to_test.py")
    assert load_config(second).environment.size == 4


def test_objects_of_a_config_file_can_be_unpickled_in_another_process(tmp_path: Path) -> None:
    config = load_config(config_in(tmp_path, name="spawned-to-test.py"))
    assert pickle.loads(pickle.dumps(config)) == config
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(config.environment.twice) == 6


def test_modules_beside_the_file_and_in_its_package_are_found_from_anywhere(tmp_path: Path) -> None:
    config_in(tmp_path / "plain", "SIZE = 7\n", "helper_to_test.py")
    text = CONFIG.replace("Size = int", "Size = int\nfrom helper_to_test import SIZE")
    path = config_in(tmp_path / "plain", text.replace("= 3", "= SIZE"), "beside_to_test.py")
    assert load_config(path).environment.size == 7

    package = tmp_path / "within" / "package_to_test"
    config_in(package, "", "__init__.py")
    config_in(package, "SIZE = 8\n", "sizes.py")
    text = CONFIG.replace("Size = int", "Size = int\nfrom .sizes import SIZE")
    assert load_config(config_in(package, text.replace("= 3", "= SIZE"))).environment.size == 8


def test_a_file_knows_its_place_and_is_read_anew_within_a_second(tmp_path: Path) -> None:
    """Cached bytecode would count as current if size and second of the source are the same."""
    path = config_in(tmp_path, CONFIG.replace('name="here"', 'name=__file__[-4:-3] + "1"'), "a.py")
    os.utime(path, (1e9, 1e9))
    assert load_config(path).name == "a1"
    path.write_text(path.read_text().replace('"1"', '"2"'))
    os.utime(path, (1e9, 1e9))
    assert load_config(path).name == "a2"


def test_a_file_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = config_in(tmp_path, "x = 1\n1 / 0\n", "failing_to_test.py")
    with pytest.raises(ConfigError, match=r"failing_to_test.py, line 2: ZeroDivisionError"):
        load_config(path)
    assert "failing_to_test" not in sys.modules
    config_in(tmp_path, CONFIG, "failing_to_test.py")
    assert load_config(path).environment.size == 3


@pytest.mark.parametrize("name", ["json", "pytest", "random"])
def test_a_file_with_the_name_of_another_module_does_not_replace_it(
    tmp_path: Path, name: str
) -> None:
    before = sys.modules[name]
    assert load_config(config_in(tmp_path, name=f"{name}.py")).environment.twice() == 6
    assert sys.modules[name] is before


def test_names_of_classes_do_not_hold_the_name_of_the_config_file() -> None:
    assert same_label("<config>:Mine", "<config>:Mine")
    assert same_label("jaxgrpo_config_small.Mine", "<config>:Mine")  # of version 0.1.0
    assert same_label("jaxgrpo.envs.bfcl.suite.Bfcl", "jaxgrpo.envs.bfcl.suite:Bfcl")
    assert same_label("guess:Game", "<config>:Game") and same_label("<config>:Game", "guess:Game")
    assert not same_label("guess:Game", "<config>:ame")
    assert not same_label("guess:Game", "other:Game")
    assert not same_label("<config>:Game", "<config>:Other")


OF_USER = """from envs.of_user import Mine
from tools.of_user import Size
from tests.training import small_config


def get_config():
    import dataclasses

    return dataclasses.replace(small_config("m"), environment=Mine(size=Size(4)))
"""


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("command", ["jaxgrpo.train", "jaxgrpo.evaluate"])
def test_a_users_own_envs_and_tools_are_found_in_a_checkout_too(
    tmp_path: Path, command: str, regular: bool
) -> None:
    """The config loads, so that the error is about the missing model."""
    for name in ("envs", "tools"):
        config_in(tmp_path / name, CONFIG, "of_user.py")
        if regular:
            (tmp_path / name / "__init__.py").touch()
    path = config_in(tmp_path / "elsewhere", OF_USER)
    done = subprocess.run(
        [sys.executable, "-m", command, "--config", str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "error: model.source 'm': no folder m" in done.stderr
    assert done.returncode == 2


# Configs that come with jaxgrpo, and imports by the names of earlier versions.


def test_a_config_of_jaxgrpo_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("procedural")
    assert config.name == "procedural"
    assert Path(config.model.source, "model.safetensors").is_file()
    assert load_config("article/no_kl").loss.kl_beta == 0
    config_in(tmp_path, CONFIG, "procedural")
    assert load_config("procedural").name == "here"  # a file of the user's comes first


def test_an_unknown_config_is_told_which_there_are(tmp_path: Path) -> None:
    wanted = r"no config file cpu_dmo: .* article/final, .* cpu_demo, .* Did you mean 'cpu_demo'\?"
    with pytest.raises(ConfigError, match=wanted):
        load_config("cpu_dmo")


def test_a_config_of_jaxgrpo_has_one_module_whatever_it_is_called() -> None:
    by_name, by_file = load_config("procedural"), load_config(ROOT / "configs" / "procedural.py")
    assert by_name == by_file
    assert "jaxgrpo.configs.procedural" in sys.modules and "configs.procedural" not in sys.modules


OLD = "from configs.procedural import get_config\n"
ADVICE = "configs.procedural, which is now called jaxgrpo.configs.procedural: change the import"


@pytest.fixture
def configs_forgotten() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]


@pytest.mark.usefixtures("configs_forgotten")
def test_an_import_by_an_old_name_in_a_checkout_is_told_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_in(tmp_path, OLD)
    monkeypatch.syspath_prepend(ROOT)
    for _ in range(2):
        with pytest.raises(ConfigError, match=ADVICE):
            load_config(path)


@pytest.mark.usefixtures("configs_forgotten")
def test_an_import_by_an_old_name_beside_a_users_package_is_told_the_new_one(
    tmp_path: Path,
) -> None:
    path = config_in(tmp_path, OLD)
    config_in(tmp_path / "configs", "", "__init__.py")
    wanted = "line 1: .* It is now called jaxgrpo.configs.procedural"
    with pytest.raises(ConfigError, match=wanted):
        load_config(path)

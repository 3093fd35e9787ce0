"""What the command line of a run says, and what it refuses."""

import resource
import shutil
import signal
import threading
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import jax
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.run.learner import Learner
from jaxgrpo.train import main
from tests.training import metric_lines, write_config


class TestCommandLine:
    def call(self, capsys, *arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    def test_dry_run_needs_no_weights(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
        status, out, err = self.call(
            capsys,
            "--config",
            write_config(tmp_path, bare),
            "--dry-run",
            "--run-dir",
            tmp_path / "run",
        )
        assert status == 0 and err.startswith("\nwarning  every scripted episode gets reward 0")
        assert not (tmp_path / "run").exists()
        for line in (
            '"group_size": 4',
            "rollouts per batch        2 tasks x 4 samples = 8",
            "micro-batches per step    2 of 1 groups",
            "an epoch                  6 tasks = 3 batches = 6 steps",
            "the run                   6 steps = 3 batches = 1.0 epochs",
            "parameters                27,040 (2 layers of width 32)",
        ):
            assert line in out
        status, _, err = self.call(
            capsys, "--config", write_config(tmp_path, bare), "--run-dir", tmp_path / "run"
        )
        assert status == 2 and "the weights in" in err

    def test_a_dry_run_needs_no_devices_and_a_run_does(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--config", write_config(tmp_path, model), "--run-dir", tmp_path / "run"]
        for setting in (
            "training.devices=64",
            "rollout.tasks_per_step=64",
            "environment.train_size=64",
        ):
            arguments += ["--set", setting]
        status, out, _ = self.call(capsys, *arguments, "--dry-run")
        assert status == 0 and "devices                   64: this machine has 4 of kind cpu" in out
        assert "micro-batches per step    1 of 64 groups" in out
        status, _, err = self.call(capsys, *arguments)
        assert status == 2 and "training.devices is 64, but jax sees 4 device(s)" in err

    def test_a_dry_run_fetches_a_models_small_files_only(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fetched = []

        def snapshot_download(name, revision, allow_patterns):
            fetched.append(
                [
                    path.name
                    for path in model.iterdir()
                    if any(fnmatch(path.name, pattern) for pattern in allow_patterns)
                ]
            )
            return str(model)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        arguments = (
            "--config",
            write_config(tmp_path, model),
            "--set",
            "model.source=Qwen/Tiny",
            "--run-dir",
            tmp_path / "run",
        )
        assert self.call(capsys, *arguments, "--dry-run")[0] == 0
        assert self.call(capsys, *arguments, "--set", "training.steps=2")[0] == 0
        assert [("config.json" in names, "model.safetensors" in names) for names in fetched] == [
            (True, False),
            (True, True),
        ]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("model.source=/no/such/folder",), "no folder /no/such/folder"),
            (("model.revision=main",), "a folder has no revision"),
            (("rollout.max_completion_tokens=2000",), "exceeds the 1024 tokens of context"),
            (("rollout.max_prompt_tokens=8",), "has 41 tokens"),
            (("rollout.tasks_per_step=64",), "the train split holds 6 tasks"),
            (("training.devices=None",), "must be a multiple of the 4 groups of a micro-batch"),
            (("environment.train_size=0",), "the train split holds 0 tasks"),
            (
                ("evaluation.before=True", "environment.test_size=0"),
                "the test split of the environment is empty",
            ),
            (("trainingsteps=3",), "Did you mean 'training.steps'?"),
        ],
    )
    def test_user_errors_end_with_two_and_one_message(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: tuple[str, ...],
        said: str,
    ) -> None:
        config = write_config(tmp_path, model)
        sets = [part for option in options for part in ("--set", option)]
        for more in ((), ("--dry-run",)):
            status, _, err = self.call(
                capsys, "--config", config, *sets, "--run-dir", tmp_path / "run", *more
            )
            assert status == 2 and err.startswith("error: ") and said in err
            assert "Traceback" not in err
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    @pytest.mark.parametrize(
        ("file", "text", "said"),
        [
            ("config.json", "[]", "config.json holds a list"),
            ("config.json", '{"model_type": "qwen2"', "config.json is not JSON"),
            ("tokenizer.json", '{"version": "1.0", "model": 3}', "cannot be read by transformers"),
            ("tokenizer_config.json", "[]", "tokenizer_config.json holds a list"),
            ("chat_template.jinja", "{% for x in %}", "the chat template cannot render messages"),
        ],
    )
    def test_a_damaged_model_folder_is_refused(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        file: str,
        text: str,
        said: str,
    ) -> None:
        damaged = tmp_path / "damaged"
        shutil.copytree(model, damaged)
        (damaged / file).write_text(text)
        status, _, err = self.call(capsys, "--config", write_config(tmp_path, damaged), "--dry-run")
        assert status == 2 and err.startswith("error: model.source") and said in err

    @pytest.mark.parametrize(
        ("method", "said"),
        [
            (
                "tasks(self, split): raise KeyError('lost')",
                "error: KeyError: 'lost' ({file}, line 6, in tasks): tasks('train') failed",
            ),
            ("tasks(self, split): return None", "must be a list of jaxgrpo.types.Task, got None"),
            (
                "tasks(self, split): return ['a', 'b']",
                "must be a list of jaxgrpo.types.Task, got ['a', 'b']",
            ),
            ("tasks(self, split): return [Task('a')] * 4", "tasks('train') gives task 'a' twice"),
        ],
    )
    def test_an_environment_whose_tasks_are_none_is_refused(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        method: str,
        said: str,
    ) -> None:
        config = write_config(tmp_path, model)
        imports = (
            "import dataclasses\n"
            "from jaxgrpo.types import Task\n"
            "from tests.training import Letters, small_config\n"
        )
        suite = f"@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n    def {method}\n\n\n"
        made = (
            f"def get_config():\n"
            f"    return dataclasses.replace(small_config({str(model)!r}), "
            f"environment=Mine())\n"
        )
        config.write_text(imports + suite + made)
        status, _, err = self.call(capsys, "--config", config, "--dry-run")
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert (
            said.format(file=config) in err
            and "the environment gives no tasks of the train split" in err
        )

    @pytest.mark.parametrize("more", [(), ("--dry-run",)])
    def test_an_environment_that_observes_nonsense_is_refused(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
    ) -> None:
        config = write_config(tmp_path, model)
        config.write_text(
            "import dataclasses\n"
            "from tests.training import Letters, LettersEnvironment, small_config\n"
            "class Silent(LettersEnvironment):\n    def observe(self): return 'hello'\n\n"
            "@dataclasses.dataclass(frozen=True)\n"
            "class Mine(Letters):\n"
            "    def create(self, task): return Silent(self, 'a', False)\n\n"
            f"def get_config():\n"
            f"    return dataclasses.replace(small_config({str(model)!r}), "
            f"environment=Mine())\n"
        )
        status, _, err = self.call(capsys, "--config", config, "--run-dir", tmp_path / "run", *more)
        place = f"({config}, line 4)"
        assert (status, err) == (
            2,
            (
                f"error: observe() of task 'train_0' returned str, not Observation "
                f"{place}; of 6 tasks none opens\n"
            ),
        )

    def test_a_run_folder_that_cannot_be_written_to_is_refused(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "run"):
            status, _, err = self.call(
                capsys, "--config", write_config(tmp_path, model), "--run-dir", folder
            )
            assert (
                status == 2
                and f"the run folder {folder} cannot be written to (" in err
                and "--run-dir" in err
            )

    def test_a_run_that_ended_before_its_first_checkpoint_is_not_written_over_unasked(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "eval/split": "test"}\n')
        status, _, err = self.call(
            capsys, "--config", write_config(tmp_path, model), "--run-dir", tmp_path / "run"
        )
        assert (
            status == 2
            and "ended before its first checkpoint: pass --resume to start it again" in err
        )

    @pytest.mark.parametrize(
        ("file", "said"),
        [
            ("config.json", "config.json is no longer what the run wrote"),
            ("checkpoints/2/policy/embed.embedding/zarr.json", "cannot resume"),
            ("checkpoints/2/policy/embed.embedding/c/0", "cannot resume"),
        ],
    )
    def test_a_run_that_was_damaged_is_not_gone_on_with(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, said: str
    ) -> None:
        arguments = (
            "--config",
            write_config(tmp_path, model),
            "--run-dir",
            tmp_path / "run",
            "--set",
        )
        assert self.call(capsys, *arguments, "training.steps=2")[0] == 0
        (tmp_path / "run" / file).write_text("{")
        status, _, err = self.call(capsys, *arguments, "training.steps=4", "--resume")
        assert status == 2 and err.startswith("error: ") and said in err

    @pytest.mark.parametrize(
        ("before", "at", "said"),
        [
            ("make_micro_batches", 2, "File too large"),
            ("evaluate_if_due", 4, "the checkpoint of step 4 cannot be written: "),
        ],
    )
    def test_a_disk_that_takes_no_more_ends_the_run_and_what_was_saved_stays(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        before: str,
        at: int,
        said: str,
    ) -> None:
        """A limit on the size of files stands for a full disk.

        First the metrics, then the checkpoint do not fit.
        """
        limits, method = (
            resource.getrlimit(resource.RLIMIT_FSIZE),
            getattr(train_module.Training, before),
        )

        def fill(self, *arguments):
            if self.learner.state.step == at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            return method(self, *arguments)

        monkeypatch.setattr(train_module.Training, before, fill)
        arguments = (
            "--config",
            write_config(tmp_path, model),
            "--set",
            "recording.checkpoint_every=2",
            "--run-dir",
            tmp_path / "run",
        )
        try:
            status, _, err = self.call(capsys, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 1 and said in err and "--resume continues from step 2" in err
        monkeypatch.undo()
        assert self.call(capsys, *arguments, "--resume")[0] == 0
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == [2, 4, 6]

    def test_memory_that_runs_out_is_told_with_what_needs_less(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def grow(self, batches):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\n"
                "BufferAssignment: ..."
            )

        monkeypatch.setattr(Learner, "learn", grow)
        status, _, err = self.call(
            capsys, "--config", write_config(tmp_path, model), "--run-dir", tmp_path / "run"
        )
        assert (
            status == 1
            and (
                "error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating "
                "8589934592 bytes.; no check"
            )
            in err
        )
        assert "jaxgrpo.tools.plan_memory" in err and "BufferAssignment" not in err

    def test_sigterm_ends_the_run_and_says_how_to_go_on(
        self,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def stop(self):
            if self.learner.state.step == 4:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(train_module.Training, "evaluate_if_due", stop)
        arguments = (
            "--config",
            write_config(tmp_path, model),
            "--set",
            "recording.checkpoint_every=2",
            "--run-dir",
            tmp_path / "run",
        )
        before, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
        status, _, err = self.call(capsys, *arguments)
        assert status == 130
        assert "interrupted: --resume continues from step 2" in err
        assert signal.getsignal(signal.SIGTERM) is before
        assert threading.active_count() <= threads + 2
        monkeypatch.undo()
        status, out, _ = self.call(capsys, *arguments, "--resume")
        assert status == 0 and "step 6/6" in out
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == [2, 4, 6]

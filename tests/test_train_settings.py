"""What settings change in a run of a tiny model on a rigged environment, and what the command line says and refuses."""

import platform
import re
import resource
import shutil
import signal
import threading
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import jax
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.config.settings import ConfigError, LoraSettings, NativeSamplerSettings
from jaxgrpo.learner.update import ComputeOptions
from jaxgrpo.models.attention import XLA
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import task_batch
from jaxgrpo.run import records, samplers, setup
from jaxgrpo.run.learner import Learner, crossed_interval
from jaxgrpo.run.weights import WholeWeights
from jaxgrpo.train import main, train
from jaxgrpo.types import Task
from tests.training import changed, make_model, metric_lines, small_config, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return make_model(tmp_path_factory.mktemp("model"))


class TestOptions:
    """Each changes what a run does. Those of loss and batching have unit tests of their own."""

    def run(self, folder, model, *options):
        state = train(changed(folder, model, "training.steps=2", *options), folder / "run")
        return metric_lines(folder / "run"), state

    def test_temperature_zero_in_evaluation_is_greedy_and_seeds_matter_in_training(
        self, model: Path, tmp_path: Path
    ) -> None:
        greedy = (
            "evaluation.before=True",
            "evaluation.temperature=0",
            "evaluation.samples=3",
            "evaluation.tasks=2",
        )
        lines, _ = self.run(tmp_path, model, *greedy)
        assert lines[0]["eval/tasks"] == 2
        read = records.read_records(
            tmp_path / "run" / "trajectories" / "eval-test-000000.jsonl.gz"
        ).records
        for task in ("test_0", "test_1"):
            assert (
                len(
                    {
                        tuple(r.trajectory.completion_ids_C)
                        for r in read
                        if r.trajectory.task_id == task
                    }
                )
                == 1
            )

    def test_a_low_temperature_narrows_what_is_sampled_and_trained(
        self, model: Path, tmp_path: Path
    ) -> None:
        lines, _ = self.run(tmp_path, model, "rollout.temperature=0.25")
        assert lines[0]["train/entropy"] < 5.45  # 5.55 at temperature 1
        assert lines[0]["train/mismatch_max"] < 1e-5

    def test_recording_options(self, model: Path, tmp_path: Path) -> None:
        self.run(tmp_path, model, "recording.trajectories=False")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            ".lock",
            "checkpoints",
            "config.json",
            "metrics.jsonl",
        ]

    def test_so_many_checkpoints_stay(self, model: Path, tmp_path: Path) -> None:
        train(
            changed(tmp_path, model, "recording.checkpoint_every=2", "recording.keep=1"),
            tmp_path / "run",
        )
        assert [
            path.name
            for path in (tmp_path / "run" / "checkpoints").iterdir()
            if path.name.isdecimal()
        ] == ["6"]

    def test_limits_and_patience_reach_the_rollout(self, model: Path, tmp_path: Path) -> None:
        options = {
            "max_prompt_tokens": 90, "max_completion_tokens": 7, "max_turns": 3, "max_in_flight": 5, "environment_threads": 2,
            "step_deadline_seconds": 1.5, "max_retries": 4,
        }  # fmt: skip
        config = changed(
            tmp_path, model, *(f"rollout.{key}={value}" for key, value in options.items())
        )
        rollout = setup.build_rollout(
            config, setup.open_model_assets(config), None, SamplingParams(0.5, 0.9)
        )
        assert {key: getattr(rollout.settings, key) for key in options} == options
        assert rollout.context_length == 1024
        assert (rollout.sampling, rollout.suite) == (SamplingParams(0.5, 0.9), config.environment)

    def test_sizes_reach_the_sampler_and_the_update(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {}
        monkeypatch.setattr(
            samplers,
            "NativeSampler",
            lambda *args, **options: given.update(sampler={"settings": args[3], **options}),
        )
        monkeypatch.setattr(
            setup,
            "Update",
            lambda *args, **options: given.update(
                update=options, compute=args[4], devices=args[1].size
            ),
        )
        native = ("native.max_rows=3", "native.decode_chunk=5", "native.max_cache_tokens=4096")
        update = (
            "training.head_chunk=32",
            "rollout.temperature=0.5",
            "model.compute_dtype=bfloat16",
            "training.devices=2",
            "lora.rank=2",
        )
        config = changed(
            tmp_path, model, *native, *update, "training.remat=none", "training.attention=xla"
        )
        policy = setup.open_model_assets(config)
        with EventLoopThread() as loop:
            samplers.open_sampler(
                config, policy, WholeWeights({}, policy.config, 3), loop, tmp_path, ExitStack()
            )
        setup.build_update(config, policy.config)
        sampler = {
            "version": 3,
            "settings": NativeSamplerSettings(3, 5, 4096),
            "compute_dtype": "bfloat16",
        }
        assert {key: given["sampler"][key] for key in sampler} == sampler
        update = {
            "head_chunk": 32,
            "temperature": 0.5,
            "compute_dtype": "bfloat16",
            "remat": "none",
            "kernel": XLA,
            "served_dtype": None,
        }
        assert given["update"] == {"lora": LoraSettings(2)}
        assert (given["compute"], given["devices"]) == (ComputeOptions(**update), 2)

    def test_the_reference_follows_the_policy_every_so_many_steps(
        self, model: Path, tmp_path: Path
    ) -> None:
        kls = {}
        for every in ("2", "None"):
            train(
                changed(tmp_path, model, f"training.reference_every={every}", "training.steps=4"),
                tmp_path / every,
            )
            kls[every] = metric_lines(tmp_path / every)[1]["train/kl"]
        assert kls["2"] == 0 and kls["None"] > 0

    def test_iterations_take_that_many_steps_on_a_batch(self, model: Path, tmp_path: Path) -> None:
        train(changed(tmp_path, model, "training.iterations=3"), tmp_path / "run")
        lines = metric_lines(tmp_path / "run")
        assert [line["step"] for line in lines] == [3, 6]

    @pytest.mark.slow
    def test_devices_and_groups_per_device_leave_the_result_as_it_is(
        self, model: Path, tmp_path: Path
    ) -> None:
        losses = []
        for options in (
            ("training.devices=1",),
            ("training.devices=2",),
            ("training.devices=1", "training.groups_per_device=2"),
        ):
            folder = tmp_path / str(len(losses))
            state = train(changed(tmp_path, model, "training.steps=2", *options), folder)
            losses.append((metric_lines(folder)[0]["train/loss"], state))
        assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
        assert losses[2][0] == pytest.approx(losses[0][0], rel=1e-5)
        assert jax.tree.leaves(losses[1][1].params)[0].sharding.num_devices == 2


def test_every_epoch_is_a_fresh_shuffle_into_whole_batches() -> None:
    tasks = [Task(str(i)) for i in range(7)]
    epochs = [
        [t.id for i in (2 * e, 2 * e + 1) for t in task_batch(tasks, 3, 5, i)] for e in (0, 1)
    ]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [t.id for t in task_batch(tasks, 3, 5, 0)] == epochs[0][:3]
    assert [t.id for t in task_batch(tasks, 3, 6, 0)] != epochs[0][:3]
    with pytest.raises(ConfigError, match="tasks_per_step is 8, but the train split holds 7"):
        task_batch(tasks, 8, 5, 0)


def test_tasks_in_the_given_order_are_the_same_in_every_epoch() -> None:
    tasks = [Task(str(i)) for i in range(7)]
    batches = [[t.id for t in task_batch(tasks, 3, 5, i, order="as_given")] for i in range(3)]
    assert batches == [["0", "1", "2"], ["3", "4", "5"], ["0", "1", "2"]]


def test_passed_a_multiple() -> None:
    assert [crossed_interval(4, step, 3) for step in (3, 6, 9, 12, 15)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert crossed_interval(2, 7, 3) and not crossed_interval(None, 4, 2)


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
        assert (status, err) == (0, "")
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
        imports = "import dataclasses\nfrom jaxgrpo.types import Task\nfrom tests.training import Letters, small_config\n"
        suite = f"@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n    def {method}\n\n\n"
        made = f"def get_config():\n    return dataclasses.replace(small_config({str(model)!r}), environment=Mine())\n"
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
            "import dataclasses\nfrom tests.training import Letters, LettersEnvironment, small_config\n"
            "class Silent(LettersEnvironment):\n    def observe(self): return 'hello'\n\n"
            "@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n    def create(self, task): return Silent(self, 'a', False)\n\n"
            f"def get_config():\n    return dataclasses.replace(small_config({str(model)!r}), environment=Mine())\n"
        )
        status, _, err = self.call(capsys, "--config", config, "--run-dir", tmp_path / "run", *more)
        place = f"({config}, line 4)"
        assert (status, err) == (
            2,
            f"error: observe() of task 'train_0' returned str, not Observation {place}; of 6 tasks none opens\n",
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
        """A limit on the size of files stands for a full disk: first the metrics, then the checkpoint do not fit."""
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
                "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nBufferAssignment: ..."
            )

        monkeypatch.setattr(Learner, "learn", grow)
        status, _, err = self.call(
            capsys, "--config", write_config(tmp_path, model), "--run-dir", tmp_path / "run"
        )
        assert (
            status == 1
            and "error: out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.; no check"
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


def test_compiled_programs_are_kept_in_the_projects_cache_when_so_set(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}
    monkeypatch.setattr(setup.jax.config, "update", given.__setitem__)
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
    setup.enable_compilation_cache(small_config(model))
    assert given == {}  # the user's own folder stands: the tests have one
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    setup.enable_compilation_cache(changed(tmp_path, model, "training.compilation_cache=False"))
    assert given == {}
    setup.enable_compilation_cache(small_config(model))
    folder = given["jax_compilation_cache_dir"]
    assert re.fullmatch(re.escape(f"{tmp_path}/xla/{platform.machine()}-") + "[0-9a-f]{8}", folder)


def test_cudnn_on_a_cpu_is_refused_and_a_dry_run_says_what_computes_attention(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(write_config(tmp_path, model)), "--dry-run", "--set"]
    assert main([*arguments, "training.attention=cudnn"]) == 2
    assert (
        "training.attention is 'cudnn', but it needs an NVIDIA GPU, and jax computes on cpu"
        in capsys.readouterr().err
    )
    assert main([*arguments, "training.attention=auto"]) == 0
    assert (
        "attention                 plain XLA and not cuDNN: it needs an NVIDIA GPU"
        in capsys.readouterr().out
    )

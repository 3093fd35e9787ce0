"""What settings change in a run of a tiny model."""

import platform
import re
from contextlib import ExitStack
from pathlib import Path

import jax
import pytest

from jaxgrpo.config.settings import ConfigError, LoraSettings, NativeSamplerSettings
from jaxgrpo.learner.update import ComputeOptions
from jaxgrpo.models.attention import XLA
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import task_batch
from jaxgrpo.run import records, samplers, setup
from jaxgrpo.run.learner import crossed_interval
from jaxgrpo.run.weights import LogicalWeights
from jaxgrpo.train import main, train
from jaxgrpo.types import Task
from tests.training import changed, metric_lines, small_config, write_config


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
            "max_prompt_tokens": 90, "max_completion_tokens": 7, "max_turns": 3, "max_in_flight": 5,
            "environment_threads": 2,
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
                config, policy, LogicalWeights({}, policy.config, 3), loop, tmp_path, ExitStack()
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

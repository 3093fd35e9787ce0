"""Compile and run the sharded train step.

A batch is a list of micro-batches, on which `mu` optimizer steps are taken. Each step adds up the
gradients of all micro-batches and applies them once. The log-probabilities of the first step's
forward pass are kept as the old policy's for the later steps.

With LoRA the trained parameters are the adapters, and the model's own weights are frozen.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxgrpo.config.settings import (
    NO_LORA,
    Config,
    LoraSettings,
    LossSettings,
    OptimizerSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.learner.adapters import merge_stored
from jaxgrpo.learner.device_step import DeviceStep, StepInputs, TokenFigures
from jaxgrpo.learner.losses import Head, LossSums
from jaxgrpo.learner.optimizer import apply_gradients, make_optimizer, optimizer_specs
from jaxgrpo.learner.sharding import AXIS, Layout, Sharded, layout_of, make_layout, specs, store
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.models.attention import XLA, Kernel
from jaxgrpo.models.lora import combine
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import ForwardOptions, Params, init_adapters, trained_shapes
from jaxgrpo.types import MicroBatch

_DATA, _REPLICATED = PartitionSpec(AXIS), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """How an Update computes.

    - `compute_dtype` is the dtype of the forward and backward pass.
    - `served_dtype` is the dtype of the sampler's weights, if it is not `compute_dtype`. The
      forward pass rounds its weights to it, so that the policy in training is the one that samples.
      The master weights stay exact.
    - `temperature` is the sampling temperature.
    - `head_chunk` is the number of tokens for which the output head computes logits at a time.
    - `kernel` computes attention, and `remat` says what the backward pass recomputes.
    """

    compute_dtype: Any
    served_dtype: Any = None
    temperature: float = RolloutSettings.temperature
    head_chunk: int = TrainingSettings.head_chunk
    kernel: Kernel = XLA
    remat: str = TrainingSettings.remat


class LoweredStep(NamedTuple):
    """The programs of a step, lowered but not compiled.

    - `score` computes the reference's log-probabilities of a micro-batch (None without one).
    - `accumulate` adds a micro-batch's gradient to the accumulator.
    - `apply` is the optimizer.
    """

    score: Lowered | None
    accumulate: Lowered
    apply: Lowered


class Update:
    """The compiled functions of the train step for one model on one mesh.

    A new shape of micro-batches is compiled when it is first used. `compilations` counts the
    distinct shapes over all functions.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        loss: LossSettings,
        optimizer: OptimizerSettings,
        compute: ComputeOptions,
        lora: LoraSettings = NO_LORA,
    ):
        self.config, self.mesh, self.loss, self.lora = config, mesh, loss, lora
        self.compute_dtype = jnp.dtype(compute.compute_dtype)
        self.optimizer = make_optimizer(optimizer)
        self.model_layout: Layout = make_layout(config, mesh.size)
        self.layout: Layout = layout_of(trained_shapes(config, lora), mesh.size)
        self.frozen_layout: Layout | None = self.model_layout if lora.rank else None
        self._whole_layout = combine(self.layout, self.frozen_layout)
        self._optimizer_specs = optimizer_specs(self.optimizer, self.layout)
        self._shapes: set[tuple[Any, ...]] = set()
        self._jit_step(self._device_step(compute))
        self._jit_state()

    def _device_step(self, compute: ComputeOptions) -> DeviceStep:
        same = compute.served_dtype == self.compute_dtype
        rounded_to = None if same else compute.served_dtype
        head = Head(
            (self.config.vocab_size, self.config.hidden_size),
            Sharded(self.mesh.size, self.compute_dtype, rounded_to),
            compute.head_chunk,
            compute.temperature,
            trained=not self.lora.rank,
        )
        options = ForwardOptions(compute.kernel, compute.remat, self.lora)
        return DeviceStep(self.config, self._whole_layout, head, options, self.loss)

    def _place(self, spec: Any) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, self.mesh), spec)

    def _jit_step(self, step: DeviceStep) -> None:
        """Jit the functions of a step, with a sharding for each output.

        The outputs of one function are inputs of the next. Without named shardings, zeros would be
        whole on one device, and one shape would be compiled once for each layout that XLA chooses.
        """
        trained, frozen, whole = map(specs, (self.layout, self.frozen_layout, self._whole_layout))
        sums = LossSums._make([_REPLICATED] * len(LossSums._fields))
        figures = TokenFigures._make((_DATA, _DATA))
        shard = functools.partial(jax.shard_map, mesh=self.mesh)
        inputs = StepInputs._make((_DATA, _DATA, _DATA, _REPLICATED))
        self._score = jax.jit(
            shard(step.score, in_specs=(whole, _DATA), out_specs=_DATA),
            out_shardings=self._place(_DATA),
        )
        self._accumulate = jax.jit(
            shard(
                step.accumulate,
                in_specs=(trained, trained, inputs, frozen),
                out_specs=(trained, figures, sums),
            ),
            donate_argnums=1,
            out_shardings=self._place((trained, figures, sums)),
        )
        self._apply = jax.jit(
            functools.partial(apply_gradients, self.optimizer),
            donate_argnums=(0, 1),
            out_shardings=self._place((trained, self._optimizer_specs, _REPLICATED)),
        )
        self._finite = jax.jit(_finite, out_shardings=self._place(_REPLICATED))

    def _jit_state(self) -> None:
        """Jit the functions that make parts of a state, each stored as its layout says."""
        params_at = self._place(specs(self.layout))
        dtype = self.compute_dtype
        self._init_optimizer = jax.jit(
            self.optimizer.init, out_shardings=self._place(self._optimizer_specs)
        )
        self._zeros = jax.jit(
            functools.partial(jax.tree.map, jnp.zeros_like), out_shardings=params_at
        )
        self._copy_as_reference = jax.jit(
            functools.partial(jax.tree.map, lambda x: x.astype(dtype)), out_shardings=params_at
        )

    @property
    def compilations(self) -> int:
        return len(self._shapes)

    def init(self, params: Params, seed: int = Config.seed) -> TrainState:
        """Return the state of step 0 from the model's whole logical weights (NumPy or jax arrays).

        `seed` determines the initial values of adapters.
        """
        frozen = self.freeze(params)
        trained = params
        if frozen is not None:
            trained = init_adapters(self.config, self.lora, jax.random.key(seed))
        stored = store(trained, self.layout, self.mesh)
        reference = self._copy_as_reference(stored) if self.loss.kl_beta else None
        return TrainState(stored, self._init_optimizer(stored), reference, 0, frozen)

    def freeze(self, params: Params) -> Params | None:
        """Store the model's weights if they are not trained, as with LoRA; otherwise None."""
        if self.frozen_layout is None:
            return None
        return store(params, self.frozen_layout, self.mesh, self.compute_dtype)

    def policy(self, state: TrainState) -> Params:
        """Return the stored weights of the policy in training, as `logprobs` takes them."""
        policy: Params = combine(state.params, state.frozen)
        return policy

    def merged(self, state: TrainState) -> Params:
        """Return the policy as stored weights of a model without adapters (in `model_layout`)."""
        if state.frozen is None:
            return state.params
        return merge_stored(
            state.frozen, state.params, self.model_layout, self.layout, self.mesh, self.lora.scale
        )

    def replace_reference(self, state: TrainState) -> TrainState:
        """Make the policy the reference, if there is one."""
        if state.reference is None:
            return state
        return state._replace(reference=self._copy_as_reference(state.params))

    def logprobs(self, params: Params, micro_batch: MicroBatch) -> Array:
        """Return log-probabilities of the completions [N, G, C] under the stored weights of
        `policy`."""
        self._count("score", micro_batch, tuple(leaf.dtype for leaf in jax.tree.leaves(params)))
        logprobs_NGC: Array = self._score(params, self._put(micro_batch))
        return logprobs_NGC

    def reference_logprobs(
        self, state: TrainState, micro_batches: Sequence[MicroBatch]
    ) -> list[Array | None]:
        """Return the reference's log-probabilities of each micro-batch, or None without a KL
        term."""
        if state.reference is None:
            return [None] * len(micro_batches)
        reference = combine(state.reference, state.frozen)
        return [self.logprobs(reference, micro_batch) for micro_batch in micro_batches]

    def optimizer_step(
        self,
        state: TrainState,
        micro_batches: Sequence[MicroBatch],
        old: Sequence[TokenFigures] | None,
        reference: Sequence[Array | None],
    ) -> tuple[TrainState, list[TokenFigures], StepReport]:
        """Take one optimizer step on all micro-batches. `old` are the figures of the first step on
        the batch, and None on that step.

        Returns the new state (the buffers of the old one are donated), the figures of the tokens of
        each micro-batch under the weights before the step, and the report. If the gradient is not
        finite, the step is not taken, and the state is the given one to the last bit.
        """
        gradients = self._zeros(state.params)
        figures, sums = [], []
        for i, micro_batch in enumerate(micro_batches):
            self._count("accumulate", micro_batch)
            placed = self._put(micro_batch)
            # The first step has no old log-probabilities yet. A dummy of their shape takes their
            # place, unread, so that one compiled program serves all steps.
            given = placed.sampler_logprobs_NGC if old is None else old[i].logprobs_NGC
            inputs = StepInputs(placed, given, reference[i], old is None)
            gradients, micro_figures, micro_sums = self._accumulate(
                state.params, gradients, inputs, state.frozen
            )
            figures.append(micro_figures)
            sums.append(micro_sums)
        params, opt_state, grad_norm = self._apply(state.params, state.opt_state, gradients)
        on_host = [LossSums._make(map(float, s)) for s in jax.device_get(sums)]
        report = StepReport(functools.reduce(LossSums.add, on_host), float(grad_norm))
        step = state.step + report.taken
        return state._replace(params=params, opt_state=opt_state, step=step), figures, report

    def has_finite_logprobs(self, state: TrainState, probe: MicroBatch) -> bool:
        """Return whether the weights, and their log-probabilities of `probe`'s completions, are
        finite."""
        logprobs = self.logprobs(self.policy(state), probe)
        return bool(self._finite(state.params, logprobs, self._put(probe).completion_lengths_NG))

    def lower(self, groups: int, group_size: int, prompt: int, completion: int) -> LoweredStep:
        """Lower the programs of a step for micro-batches of one shape. Nothing is computed.

        The devices of the mesh may be only described (`jax.experimental.topologies`).
        """
        float32, with_reference = jnp.float32, bool(self.loss.kl_beta)
        micro_batch = self._batch_shapes(groups, group_size, prompt, completion)
        params = self._stored_shapes(self.layout, float32)
        frozen = self._stored_shapes(self.frozen_layout, self.compute_dtype)
        whole = self._stored_shapes(self._whole_layout, self.compute_dtype)
        opt_state = jax.tree.map(
            lambda leaf, spec: self._shape(leaf.shape, leaf.dtype, spec),
            jax.eval_shape(self.optimizer.init, params),
            self._optimizer_specs,
        )
        logprobs = self._shape((groups, group_size, completion), float32, _DATA)
        on_policy: Any = jax.ShapeDtypeStruct((), bool)  # without a sharding, as a step passes it
        inputs = StepInputs(micro_batch, logprobs, logprobs if with_reference else None, on_policy)
        return LoweredStep(
            score=self._score.lower(whole, micro_batch) if with_reference else None,
            accumulate=self._accumulate.lower(params, params, inputs, frozen),
            apply=self._apply.lower(params, opt_state, params),
        )

    def _shape(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _stored_shapes(self, layout: Layout | None, dtype: Any) -> Params:
        shapes: Params = jax.tree.map(
            lambda leaf: self._shape(leaf.stored_shape, dtype, leaf.spec), layout
        )
        return shapes

    def _batch_shapes(self, n: int, g: int, p: int, c: int) -> MicroBatch:
        data = functools.partial(self._shape, spec=_DATA)
        return MicroBatch(
            prompt_NP=data((n, p), jnp.int32),
            prompt_lengths_N=data((n,), jnp.int32),
            completions_NGC=data((n, g, c), jnp.int32),
            completion_lengths_NG=data((n, g), jnp.int32),
            action_mask_NGC=data((n, g, c), bool),
            loss_weights_NGC=data((n, g, c), jnp.float32),
            advantages_NG=data((n, g), jnp.float32),
            sampler_logprobs_NGC=data((n, g, c), jnp.float32),
        )

    def _put(self, micro_batch: MicroBatch) -> MicroBatch:
        """Split the groups over the devices."""
        groups, devices = micro_batch.prompt_NP.shape[0], self.mesh.size
        if groups % devices:
            raise ValueError(
                f"{groups} groups in a micro-batch do not divide over {devices} devices"
            )
        sharding = NamedSharding(self.mesh, _DATA)

        def put(x: Any) -> Array:
            # Each process gives its own devices their groups. jax.device_put would first compare
            # the arrays of all processes.
            array = np.asarray(x)
            return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

        on_devices: MicroBatch = jax.tree.map(put, micro_batch)
        return on_devices

    def _count(self, function: str, micro_batch: MicroBatch, *more: Any) -> None:
        self._shapes.add(
            (function, micro_batch.prompt_NP.shape, micro_batch.completions_NGC.shape, *more)
        )


def _finite(params: Params, logprobs_NGC: Array, lengths_NG: Array) -> Array:
    """Return whether all weights, and the log-probabilities of real tokens, are finite."""
    real_NGC = jnp.arange(logprobs_NGC.shape[-1]) < lengths_NG[..., None]
    return (
        jnp.isfinite(optax.tree.norm(params))
        & jnp.isfinite(jnp.where(real_NGC, logprobs_NGC, 0.0)).all()
    )

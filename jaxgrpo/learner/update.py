"""TrainState, the optimizer, and the jitted, sharded train step.

A batch is a list of micro-batches, on which `mu` optimizer steps are taken. Each step adds up the
gradients of all micro-batches and applies them once. On the first step the ratio is one: the
log-probabilities of its own forward pass are kept as the old policy's for the later steps.

With LoRA the parameters are the adapters, and the model's own weights are frozen beside them; nothing else differs.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxgrpo.config.settings import NO_LORA, LoraSettings, LossSettings, OptimizerSettings
from jaxgrpo.learner.accumulation import accumulating_scan
from jaxgrpo.learner.adapters import merge_stored
from jaxgrpo.learner.losses import Head, LossSums, grpo_loss, token_logprobs
from jaxgrpo.learner.sharding import (
    AXIS,
    Layout,
    Sharded,
    embed,
    layout_of,
    make_layout,
    specs,
    store,
)
from jaxgrpo.models.attention import XLA, Kernel
from jaxgrpo.models.lora import combine
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import (
    Params,
    ScanLayers,
    forward_shared_prompt,
    head_table,
    init_adapters,
    scan_stack,
    trained_shapes,
)
from jaxgrpo.types import GroupBatch

_BATCH_FIELDS = tuple(field.name for field in dataclasses.fields(GroupBatch))


class DivergedError(RuntimeError):
    """The weights that a step made are of no use: says so, and what helps."""


class TrainState(NamedTuple):
    """Everything that training changes, in the flat layout: float32 master weights, the optimizer's state, the reference policy in
    the compute dtype, that is bfloat16 on accelerators (None when there is no KL term), and the number of optimizer steps taken.

    With LoRA, `params` and `reference` are adapters, and `frozen` holds the model's weights in the compute dtype, which never change."""

    params: Params
    opt_state: Any
    reference: Params | None
    step: int
    frozen: Params | None = None


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The first of `warmup_steps` steps has 1 / warmup_steps of the learning rate."""
    warmup = max(settings.warmup_steps, 1)
    schedule = optax.linear_schedule(
        settings.learning_rate / warmup, settings.learning_rate, warmup - 1 if warmup > 1 else 1
    )
    if warmup == 1:
        schedule = optax.constant_schedule(settings.learning_rate)
    adamw = optax.adamw(
        schedule, settings.b1, settings.b2, settings.epsilon, weight_decay=settings.weight_decay
    )
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step: the sums of its micro-batches and the gradient's global norm before
    clipping. Where that is not finite the step was not taken."""

    sums: LossSums
    grad_norm: float

    @property
    def taken(self) -> bool:
        return math.isfinite(self.grad_norm)


class LoweredStep(NamedTuple):
    """What a step runs, lowered but not compiled: the reference's log-probabilities of a micro-batch (None without a reference), a
    micro-batch's gradient added to the accumulator, and the optimizer."""

    score: Lowered | None
    accumulate: Lowered
    apply: Lowered


class Update:
    """The compiled functions of the train step for one model on one mesh.

    `served_dtype` is that of the weights that the sampler holds, where it is not `compute_dtype`: the policy in training is the one that
    samples, so its weights are rounded as theirs are. The master weights keep what a step adds to them.
    Shapes are compiled as they come; `compilations` counts the distinct ones over all functions.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        loss: LossSettings,
        optimizer: OptimizerSettings,
        *,
        compute_dtype: Any,
        served_dtype: Any = None,
        temperature: float = 1.0,
        head_chunk: int = 1024,
        kernel: Kernel = XLA,
        remat: str = "full",
        lora: LoraSettings = NO_LORA,
    ):
        self.config = config
        self.mesh = mesh
        self.loss = loss
        self.lora = lora
        self.model_layout: Layout = make_layout(config, mesh.size)
        self.layout: Layout = layout_of(trained_shapes(config, lora), mesh.size)
        self.frozen_layout: Layout | None = self.model_layout if lora.rank else None
        self._whole_layout = combine(self.layout, self.frozen_layout)
        self.optimizer = make_optimizer(optimizer)
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.kernel, self.remat = kernel, remat
        rounded_to = None if served_dtype == self.compute_dtype else served_dtype
        storage = Sharded(mesh.size, self.compute_dtype, rounded_to)
        self._head = Head(
            (config.vocab_size, config.hidden_size),
            storage,
            head_chunk,
            temperature,
            trained=not lora.rank,
        )
        self._shapes: set[tuple] = set()
        specification, frozen, whole = (
            specs(self.layout),
            specs(self.frozen_layout),
            specs(self._whole_layout),
        )
        data, replicated = PartitionSpec(AXIS), PartitionSpec()
        sums = LossSums._make([replicated] * len(LossSums._fields))
        shard = functools.partial(jax.shard_map, mesh=mesh)
        # What a function returns is fed to the next one: each output's sharding is named, or zeros would land whole on one device and
        # one shape would be compiled once for every way that XLA chose to lay its inputs out.
        place = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
        params_at, data_at, opt_state_at = (
            place(specification),
            NamedSharding(mesh, data),
            place(self._optimizer_specs()),
        )
        self._score = jax.jit(
            shard(self._local_score, in_specs=(whole, data), out_specs=data), out_shardings=data_at
        )
        self._accumulate = jax.jit(
            shard(
                self._local_accumulate,
                in_specs=(specification, specification, data, data, data, replicated, frozen),
                out_specs=(specification, data, sums),
            ),
            donate_argnums=1,
            out_shardings=(params_at, data_at, place(sums)),
        )
        self._apply = jax.jit(
            self._apply_gradients,
            donate_argnums=(0, 1),
            out_shardings=(params_at, opt_state_at, NamedSharding(mesh, replicated)),
        )
        self._finite = jax.jit(_finite, out_shardings=NamedSharding(mesh, replicated))
        self._init_optimizer = jax.jit(self.optimizer.init, out_shardings=opt_state_at)
        self._zeros = jax.jit(
            functools.partial(jax.tree.map, jnp.zeros_like), out_shardings=params_at
        )
        self._copy_as_reference = jax.jit(
            functools.partial(jax.tree.map, lambda x: x.astype(storage.dtype)),
            out_shardings=params_at,
        )

    @property
    def compilations(self) -> int:
        return len(self._shapes)

    def init(self, params: Params, seed: int = 0) -> TrainState:
        """The state of step 0 from the model's logical weights (NumPy or jax arrays, whole); `seed` is for the adapters' first values."""
        frozen = self.freeze(params)
        trained = (
            params
            if frozen is None
            else init_adapters(self.config, self.lora, jax.random.key(seed))
        )
        stored = store(trained, self.layout, self.mesh)
        reference = self._copy_as_reference(stored) if self.loss.kl_beta else None
        return TrainState(stored, self._init_optimizer(stored), reference, 0, frozen)

    def freeze(self, params: Params) -> Params | None:
        """What of the model's logical weights is not trained, stored: with LoRA all of them."""
        return (
            None
            if self.frozen_layout is None
            else store(params, self.frozen_layout, self.mesh, self.compute_dtype)
        )

    def policy(self, state: TrainState) -> Params:
        """The stored weights that the state's policy computes with, in training: what `logprobs` takes."""
        return combine(state.params, state.frozen)

    def merged(self, state: TrainState) -> Params:
        """The policy as stored weights of a model (in `model_layout`) that knows no adapters."""
        if state.frozen is None:
            return state.params
        return merge_stored(
            state.frozen, state.params, self.model_layout, self.layout, self.mesh, self.lora.scale
        )

    def replace_reference(self, state: TrainState) -> TrainState:
        """The policy becomes the reference."""
        return (
            state
            if state.reference is None
            else state._replace(reference=self._copy_as_reference(state.params))
        )

    def logprobs(self, params: Params, batch: GroupBatch) -> Array:
        """Log-probabilities of the completions under stored `params` (as of `policy`) [N, G, C], on the devices; no gradients."""
        self._count("score", batch, tuple(leaf.dtype for leaf in jax.tree.leaves(params)))
        return self._score(params, self._put(batch))

    def reference_logprobs(
        self, state: TrainState, batches: Sequence[GroupBatch]
    ) -> list[Array | None]:
        """The reference's log-probabilities of each micro-batch, once a batch; None where there is no KL term."""
        if state.reference is None:
            return [None] * len(batches)
        reference = combine(state.reference, state.frozen)
        return [self.logprobs(reference, batch) for batch in batches]

    def optimizer_step(
        self,
        state: TrainState,
        batches: Sequence[GroupBatch],
        old: Sequence[Array] | None,
        reference: Sequence[Array | None],
    ) -> tuple[TrainState, list[Array], StepReport]:
        """One optimizer step on all micro-batches. `old` is None on the first step on a batch.

        Returns the new state (the old one's buffers are donated), each micro-batch's train
        log-probabilities [N, G, C], and the report. When the gradient is not finite the step is not
        taken: the state is the one that was given, to the last bit."""
        gradients = self._zeros(state.params)
        train_logprobs, sums = [], []
        for i, batch in enumerate(batches):
            self._count("accumulate", batch)
            placed = self._put(batch)
            ours = placed.sampler_logprobs_NGC if old is None else old[i]
            gradients, logprobs, micro_sums = self._accumulate(
                state.params, gradients, placed, ours, reference[i], old is None, state.frozen
            )
            train_logprobs.append(logprobs)
            sums.append(micro_sums)
        params, opt_state, grad_norm = self._apply(state.params, state.opt_state, gradients)
        total = functools.reduce(
            LossSums.add, (LossSums._make(map(float, s)) for s in jax.device_get(sums))
        )
        report = StepReport(total, float(grad_norm))
        return (
            state._replace(params=params, opt_state=opt_state, step=state.step + report.taken),
            train_logprobs,
            report,
        )

    def usable(self, state: TrainState, probe: GroupBatch) -> bool:
        """True when the state's weights are finite, and so are the log-probabilities that they give
        the completions of `probe`."""
        logprobs = self.logprobs(self.policy(state), probe)
        return bool(self._finite(state.params, logprobs, self._put(probe).completion_lengths_NG))

    def lower(self, groups: int, group_size: int, prompt: int, completion: int) -> LoweredStep:
        """The programs of a step for micro-batches of one shape, from shapes alone: nothing is computed, and the mesh may be of devices
        that are only described (`jax.experimental.topologies`)."""
        mesh, shape = self.mesh, (groups, group_size, completion)

        def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        def stored(layout: Layout, dtype: Any) -> Params:
            return jax.tree.map(lambda leaf: array(leaf.stored_shape, dtype, leaf.spec), layout)

        data, float32 = PartitionSpec(AXIS), jnp.float32
        batch = GroupBatch(
            prompt_NP=array((groups, prompt), jnp.int32, data),
            prompt_lengths_N=array((groups,), jnp.int32, data),
            completions_NGC=array(shape, jnp.int32, data),
            completion_lengths_NG=array(shape[:2], jnp.int32, data),
            action_mask_NGC=array(shape, bool, data),
            loss_weights_NGC=array(shape, float32, data),
            advantages_NG=array(shape[:2], float32, data),
            sampler_logprobs_NGC=array(shape, float32, data),
        )
        params, logprobs = stored(self.layout, float32), array(shape, float32, data)
        frozen = stored(self.frozen_layout, self.compute_dtype)
        opt_state = jax.tree.map(
            lambda leaf, spec: array(leaf.shape, leaf.dtype, spec),
            jax.eval_shape(self.optimizer.init, params),
            self._optimizer_specs(),
        )
        reference = logprobs if self.loss.kl_beta else None
        on_policy = jax.ShapeDtypeStruct(
            (), bool
        )  # as a step gives it: what is compiled here is what a step runs
        return LoweredStep(
            score=self._score.lower(stored(self._whole_layout, self.compute_dtype), batch)
            if self.loss.kl_beta
            else None,
            accumulate=self._accumulate.lower(
                params, params, batch, logprobs, reference, on_policy, frozen
            ),
            apply=self._apply.lower(params, opt_state, params),
        )

    def _optimizer_specs(self) -> Any:
        """The optimizer's state with a PartitionSpec for each array: its moments lie as the weights do, its counters are replicated."""
        stored = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.stored_shape, jnp.float32), self.layout
        )
        state = jax.eval_shape(self.optimizer.init, stored)
        return optax.tree_map_params(
            self.optimizer,
            lambda _, spec: spec,
            state,
            specs(self.layout),
            transform_non_params=lambda _: PartitionSpec(),
        )

    def _put(self, batch: GroupBatch) -> GroupBatch:
        """Groups split over the devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        arrays = {name: np.asarray(getattr(batch, name)) for name in _BATCH_FIELDS}
        if arrays["prompt_NP"].shape[0] % self.mesh.size:
            raise ValueError(
                f"{arrays['prompt_NP'].shape[0]} groups in a micro-batch do not divide over {self.mesh.size} devices"
            )
        # each process hands its own devices their groups; jax.device_put would compare the arrays of all processes first
        return GroupBatch(
            **{
                name: jax.make_array_from_callback(a.shape, sharding, a.__getitem__)
                for name, a in arrays.items()
            }
        )

    def _count(self, function: str, batch: GroupBatch, *more: Any) -> None:
        self._shapes.add((function, batch.prompt_NP.shape, batch.completions_NGC.shape, *more))

    def _local_logprobs(
        self, params: Params, batch: GroupBatch, scan_layers: ScanLayers = scan_stack
    ) -> tuple[Array, Array]:
        """This device's groups: log-probabilities and entropies of the completions, [N, G, C] each."""
        storage = self._head.storage

        def load_layer(leaves: Params) -> Params:
            return jax.tree.map(
                lambda leaf, layout: storage.load(leaf, layout.shape),
                leaves,
                self._whole_layout["layers"],
            )

        hidden = forward_shared_prompt(
            self.config,
            params,
            batch.prompt_NP,
            batch.prompt_lengths_N,
            batch.completions_NGC,
            load=lambda leaf: storage.load(leaf, (self.config.hidden_size,)),
            embed=lambda tree, ids: embed(
                tree["embed"]["embedding"], ids, self._head.shape, storage
            ),
            load_layer=load_layer,
            scan_layers=scan_layers,
            kernel=self.kernel,
            remat=self.remat,
            lora=self.lora,
        )
        shape = batch.completions_NGC.shape
        logprobs, entropies = token_logprobs(
            hidden.reshape(-1, self.config.hidden_size),
            head_table(params),
            batch.completions_NGC.reshape(-1),
            self._head,
        )
        return logprobs.reshape(shape), entropies.reshape(shape)

    def _local_score(self, params: Params, batch: GroupBatch) -> Array:
        return self._local_logprobs(params, batch)[0]

    def _local_accumulate(
        self,
        params: Params,
        gradients: Params,
        batch: GroupBatch,
        old: Array,
        reference: Array | None,
        on_policy: Array,
        frozen: Params | None,
    ) -> tuple[Params, Array, LossSums]:
        def scan_layers(p: Params) -> ScanLayers:
            still = None if frozen is None else frozen["layers"]
            return lambda layer, carry, _: accumulating_scan(
                layer, carry, p["layers"], gradients["layers"], still
            )

        def loss(p: Params) -> tuple[Array, tuple[Array, LossSums]]:
            train, entropies = self._local_logprobs(combine(p, frozen), batch, scan_layers(p))
            ours = jnp.where(on_policy, lax.stop_gradient(train), old)
            value, sums = grpo_loss(
                train,
                ours,
                reference,
                batch.sampler_logprobs_NGC,
                entropies,
                batch.advantages_NG,
                batch.loss_weights_NGC,
                batch.action_mask_NGC,
                self.loss,
            )
            return value, (train, sums)

        (_, (train, sums)), new = jax.value_and_grad(loss, has_aux=True)(params)
        totals = [lax.psum(x, AXIS) for x in sums[:-1]]
        totals.append(lax.pmax(sums.mismatch_max, AXIS))
        layers = new.pop("layers")  # these have been added to the accumulator's already
        total = jax.tree.map(jnp.add, {name: gradients[name] for name in new}, new)
        return total | {"layers": layers}, train, LossSums(*totals)

    def _apply_gradients(
        self, params: Params, opt_state: Any, gradients: Params
    ) -> tuple[Params, Any, Array]:
        """Nothing changes when the gradient is not finite."""
        norm = optax.tree.norm(gradients)

        def step() -> tuple[Params, Any]:
            updates, after = self.optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), after

        return *lax.cond(jnp.isfinite(norm), step, lambda: (params, opt_state)), norm


def _finite(params: Params, logprobs_NGC: Array, lengths_NG: Array) -> Array:
    """Whether all weights are, and the log-probabilities of real tokens."""
    real_NGC = jnp.arange(logprobs_NGC.shape[-1]) < lengths_NG[..., None]
    return (
        jnp.isfinite(optax.tree.norm(params))
        & jnp.isfinite(jnp.where(real_NGC, logprobs_NGC, 0.0)).all()
    )


jax.tree_util.register_dataclass(GroupBatch, data_fields=list(_BATCH_FIELDS), meta_fields=[])

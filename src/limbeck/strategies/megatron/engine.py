"""The engine of Megatron's schedules and optimizers. See ``limbeck.strategies.base.Engine`` for the methods.

States have Hugging Face names, so a checkpoint is the same as any other strategy's and resumes with other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.config.schema import MegatronConfig
from limbeck.errors import LimbeckError
from limbeck.models import HiddenStateCapture, attending_within
from limbeck.models.megatron_families import EMBEDDINGS, HEAD
from limbeck.strategies.base import MODEL, EngineState, MicroBatches, ModelOutline
from limbeck.strategies.megatron.body import MegatronBody
from limbeck.strategies.megatron.core import OptimizerTensors, ProcessGroups, import_megatron, make_optimizer
from limbeck.strategies.megatron.weights import WeightMap
from limbeck.strategies.pipeline_parallel import PipelineGroup
from limbeck.strategies.shards import Shard, Sliceable, shard_of, whole_box
from limbeck.strategies.world import World


class Chunk(nn.Module):
    """Consecutive layers as Megatron's schedules call them with a micro-batch.

    Args:
        body: the layers.
        root: the module with ``body`` and the loss, if these are the last layers; the others return the message for the
            next stage.
        term: of the loss, of layers before the last; see ``StudentSpec.make_term``.

    outputs: what ``term`` made of each micro-batch.
    """

    def __init__(self, body: MegatronBody, root: nn.Module | None = None, term: nn.Module | None = None) -> None:
        super().__init__()
        self.module = body.gpt  # where Megatron looks for attributes of the model
        self.body, self.root, self.term = body, root, term
        self.outputs: list[Any] = []

    def forward(self, inputs: Any) -> Any:
        if self.root is not None:
            return self.root(inputs)
        batch = inputs.batch
        ids, taps = batch.input_ids, getattr(self.term, "taps", HiddenStateCapture())
        with attending_within(self.body, ids, batch.documents, batch.cu_seqlens) as options, taps.capture() as found:
            message = self.body.message(ids.shape[1], ids, batch.position_ids, **options)
        output = None if self.term is None else self.term(inputs, found)
        if output is None:
            return message
        self.outputs.append(output.detached())
        scale = self.body.gpt.config.grad_scale_func  # of float16, which Megatron applies to the last stage's loss
        return _WithLoss.apply(message, output.loss if scale is None else scale(output.loss))


class _WithLoss(torch.autograd.Function):
    """``message`` as it is. The backward pass from it is also that of ``loss``, which is added to what is minimised."""

    @staticmethod
    def forward(ctx: Any, message: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return message

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], ctx.one


class MegatronEngine:
    """Trains ``chunks`` of layers with Megatron's schedules and AdamW.

    Args:
        chunks: of this rank, in the order of the model; the last one has the loss on the last pipeline stage.
        weights: the parameters of this rank, which are trained or frozen already.
        initial: of the whole model, in the precision of the masters.
        settings: of Megatron's optimizer.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        weights: WeightMap,
        initial: dict[str, Tensor],
        groups: ProcessGroups,
        world: World,
        pipeline: PipelineGroup | None,
        outline: ModelOutline,
        given: MegatronConfig,
        *,
        reduce_in_float32: bool,
        **settings: Any,
    ) -> None:
        distributed = import_megatron().distributed
        self.root: nn.Module = chunks[-1].root or chunks[-1]
        self._groups, self._world, self._pipeline, self._outline = groups, world, pipeline, outline
        self._weights, self._steps = weights, 0
        # Parameters of the loss, such as projections of features.
        self._added = {
            name: parameter
            for chunk in chunks
            for module in (chunk.root or chunk.term or nn.Identity(),)
            for name, parameter in module.named_parameters()
            if not name.startswith(MODEL)
        }
        added = {name: parameter.detach().clone() for name, parameter in self._added.items()}
        for parameter in self._added.values():
            parameter.data = parameter.to(world.device, settings["params_dtype"])
        self._config = config = chunks[0].body.gpt.config
        groups.activate()
        wrapping = {
            "use_distributed_optimizer": given.use_distributed_optimizer,
            "grad_reduce_in_fp32": reduce_in_float32,
            "overlap_grad_reduce": given.overlap_grad_reduce,
            "average_in_collective": given.ddp_average_in_collective,
            "bucket_size": given.ddp_bucket_size,
        }
        self._chunks = [
            distributed.DistributedDataParallel(
                config, distributed.DistributedDataParallelConfig(**wrapping), chunk, disable_bucketing=number > 0
            )
            for number, chunk in enumerate(chunks)
        ]
        if given.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in self._chunks]
            config.no_sync_func = functions[0] if len(functions) == 1 else functions
        config.finalize_model_grads_func = distributed.finalize_model_grads
        self._megatron_optimizer = make_optimizer(
            self._chunks, use_distributed_optimizer=given.use_distributed_optimizer, **settings
        )
        self._tensors = OptimizerTensors(self._megatron_optimizer)
        if settings["fp16"]:
            config.grad_scale_func = self._megatron_optimizer.scale_loss
        self.optimizer = self._tensors.scheduled()
        self._load(initial | added, None)
        # Their names, with those of other stages.
        self._all_added = {name for name, _ in self._from_all_stages(iter(added.items()))}
        self._clear_gradients()

    def forward_backward(self, micro_batches: MicroBatches[Any]) -> Iterator[Any]:
        self._set_training(True)
        count, outputs = len(micro_batches), []
        # The stages compute different micro-batches at a time, but all ranks of a teacher compute one together.
        inputs = micro_batches if self._pipeline is None else list(micro_batches)
        self._groups.activate()  # a teacher may have computed with its own
        sizes: dict[str, int] = {"seq_length": 1, "micro_batch_size": 1}
        if self._pipeline is not None:
            shapes = {tuple(one.batch.input_ids.shape) for one in inputs}
            self._check_count(count)
            self._config.variable_seq_lengths = len(shapes) > 1
            rows, time = shapes.pop()
            width = self._chunks[0].module.body.width(time) * self._world.dims.cp
            sizes = {"seq_length": width, "micro_batch_size": rows}

        def loss(output: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            outputs.append(output.detached())
            return output.loss * count, torch.ones((), dtype=torch.int), {}  # Megatron divides by both

        def forward_step(iterator: Iterator[Any], chunk: nn.Module) -> tuple[Any, Any]:
            micro_batch = next(iterator)
            self._groups.activate()
            return chunk(micro_batch), loss

        iterators = [iter(inputs) for _ in self._chunks]
        import_megatron().pipeline_parallel.get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks,
            num_microbatches=count,
            **sizes,
        )
        for chunk in self._chunks:
            outputs += chunk.module.outputs
            chunk.module.outputs = []
        yield from outputs

    @torch.no_grad()
    def evaluate(self, micro_batch: Any) -> Any | None:
        self._set_training(False)
        self._groups.activate()
        pipeline, outputs = self._pipeline, list[Any]()
        for number, chunk in enumerate(wrapped.module for wrapped in self._chunks):
            if pipeline is not None and (number or not pipeline.is_first):
                shape = (*micro_batch.batch.input_ids.shape, self._outline.width)
                received = torch.empty(shape, dtype=self._config.params_dtype, device=self._world.device)
                chunk.body.receive(pipeline.recv_forward(received))
            output = chunk(micro_batch)
            if chunk.root is None and pipeline is not None:
                pipeline.send_forward(chunk.body.rows(output, micro_batch.batch.input_ids.shape[1]))
            outputs += chunk.outputs if chunk.root is None else [output]
            chunk.outputs = []
        return reduce(lambda one, other: one.plus(other), outputs) if outputs else None

    def step(self) -> Tensor:
        self._groups.activate()
        stepped, norm, _ = self._megatron_optimizer.step()
        self._tensors.join_scalers()
        self._steps += bool(stepped)
        self._clear_gradients()
        found = norm if stepped else torch.inf  # float16 gradients overflowed
        return torch.as_tensor(found, dtype=torch.float32, device=self._world.device)

    def iter_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._stream(None):
            yield name, value
            if name == EMBEDDINGS and self._weights.tied:
                yield HEAD, value

    def state_dict(self) -> EngineState[Sequence[Shard]]:
        trained = self.trained_names()
        model: dict[str, list[Shard]] = {}
        optimizer: dict[str, list[Shard]] = {}
        keepers, load = dict[str, int](), [0] * self._world.size  # the rank that keeps a whole tensor, on the host
        for entry in (None, *self._tensors.MOMENTS) if self._steps else (None,):
            every = ((f"{MODEL}{name}", value) for name, value in self._stream(entry))
            added = ((name, self._tensors.read(parameter, entry)) for name, parameter in self._added.items())
            for name, value in chain(every, self._from_all_stages(added)):
                if name in trained and name not in keepers:  # every rank sees the same names and sizes
                    keepers[name] = load.index(min(load))
                    load[keepers[name]] += value.numel()
                if keepers.get(name) == self._world.rank:
                    kept, ending = (model, "") if entry is None else (optimizer, f"|{entry}")
                    kept[f"{name}{ending}"] = [shard_of(value.float().cpu())]
        if optimizer:
            optimizer |= {f"{name}|step": [shard_of(torch.tensor(float(self._steps)))] for name in model}
        return EngineState(model, optimizer, self._tensors.read_scaler())

    def load_state_dict(self, state: EngineState[Sliceable]) -> None:
        self._load({name.removeprefix(MODEL): value for name, value in state.model.items()}, None)
        self._tensors.write_scaler(state.scaler)
        if not state.optimizer:
            return
        for entry in self._tensors.MOMENTS:
            ending = f"|{entry}"
            found = {key.removesuffix(ending): value for key, value in state.optimizer.items() if key.endswith(ending)}
            self._load({name.removeprefix(MODEL): value for name, value in found.items()}, entry)
        self._steps = int(next(value[()] for key, value in state.optimizer.items() if key.endswith("|step")))
        self._tensors.set_steps(self._steps)

    def trained_names(self) -> set[str]:
        return set(self._outline.trained) | self._all_added

    def offload(self) -> None:
        raise LimbeckError("Megatron moves no states between steps; set is_offload_states: false.")

    def reload(self) -> None:
        """Nothing was moved."""

    def held_tensors(self) -> dict[str, list[Tensor]]:
        parameters = [*(held.parameter for held in self._weights.held), *self._added.values()]
        states = [x for adam in self._tensors.adams for state in adam.state.values() for x in state.values()]
        stepped = [one for group in self.optimizer.param_groups for one in group["params"]]
        return {
            "parameters": list(parameters),
            "gradients": [one.main_grad for one in parameters if hasattr(one, "main_grad")],
            "optimizer": [x for x in states if torch.is_tensor(x)]
            + [x for x in stepped if id(x) not in map(id, parameters)],
        }

    def _stream(self, entry: str | None) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of the model's values or moments (of trained parameters), on every rank. Collective."""
        return self._from_all_stages(
            self._weights.stream(partial(self._tensors.read, entry=entry), trained_only=entry is not None)
        )

    def _from_all_stages(self, own: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return own if self._pipeline is None else self._pipeline.broadcast_all(own, self._world.device)

    def _load(self, tensors: Mapping[str, Sliceable], entry: str | None) -> None:
        for parameter, value in self._weights.slices(tensors):
            self._tensors.write(parameter, entry, value)
        for name, parameter in self._added.items():
            if name in tensors:
                self._tensors.write(parameter, entry, tensors[name][whole_box(tensors[name].shape)])

    def _check_count(self, count: int) -> None:
        assert self._pipeline is not None
        stages = self._pipeline.num_stages
        if len(self._chunks) > 1 and count % stages:
            raise LimbeckError(
                "student.strategy_args.strategy_config.virtual_pipeline_model_parallel_size: the interleaved schedule needs a "
                f"multiple of {stages} micro-batches, the number of stages, and a step has {count}; change "
                "student.training_args.gradient_accumulation_steps."
            )

    def _clear_gradients(self) -> None:
        self._megatron_optimizer.zero_grad()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    def _set_training(self, training: bool) -> None:
        for chunk in self._chunks:
            if chunk.training != training:
                chunk.train(training)

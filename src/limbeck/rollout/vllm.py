"""The generator ``vllm``: vLLM's engine in the training process, or on devices of its own (``vllm_process.py``).

    generator = VllmGenerator(*student_outline(config, world), max_model_len=1024)
    generator.update_weights(engine.iter_weights(), version=step)
    completions = generator.generate(prompts, SamplingParams(max_tokens=256))

vLLM reads a folder with the student's configuration and tokenizer, and no weights. They are loaded in place by
``update_weights`` and never written to disk. vLLM gets the token ids of the prompts, not their text.

Every sample is a request of its own, with a seed that depends on the seed of the step, the row id and the number of the
sample. The same engine therefore writes the same completions for any batch, up to rounding of the logits.

Every rank has a whole engine for its part of the prompts. vLLM joins the process group of the training, if there is one.
It keeps groups of its own for the whole process, so that a process has one engine at a time: a new one ends the one before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.rollout.generator import Completion, Prompt, SamplingParams, most_new_tokens
from limbeck.rollout.student import end_token_ids, num_tokens
from limbeck.rollout.weights import checked_weights

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are those of the training
}
"""Variables that are set before vLLM is imported, unless the user has set them."""

_OWN_ARGUMENTS = frozenset(
    ("model", "tokenizer", "skip_tokenizer_init", "load_format", "logprobs_mode", "max_logprobs", "generation_config")
)
_PARALLEL_ARGUMENTS = frozenset(
    ("distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
)
"""Arguments of ``vllm.LLM`` on which the protocol of generators depends."""

_CACHE_ARGUMENTS = ("gpu_memory_utilization", "kv_cache_memory_bytes")
_GPU_SHARE = 0.4  # of a GPU, for weights and cache: the rest is the training's
_CPU_CACHE = 2**30  # bytes

_running: list[VllmGenerator] = []
"""The generator with the engine of this process. vLLM destroys the process group when an engine is collected, even if the
training needs it still; so it lives as long as the process, or until the next one.
"""

_LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to it."""


class VllmGenerator:
    """Writes completions with ``vllm.LLM``; see the module docstring.

    Args:
        model: the student's structure on the meta device, in the dtype to compute in; see ``student_outline``.
        tokenizer: its end token, and those of the model's generation configuration, end a completion.
        max_model_len: most tokens of a prompt and its completion; the model's positions if it has fewer.
        device_type: ``"cpu"`` or ``"cuda"``; vLLM computes on the current device.
        ranks: number of processes that make a generator at the same time, each its own.
        arguments: of ``vllm.LLM``, which override the defaults of this class.

    Raises:
        LimbeckError: if vLLM is not installed, refuses the model or the arguments, or would end an engine that shares a
            process group with others.
    """

    _OWN = _OWN_ARGUMENTS | _PARALLEL_ARGUMENTS
    _WHY = "which runs one engine on every rank with the student's weights"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_model_len: int,
        device_type: str = "cpu",
        ranks: int = 1,
        arguments: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.version = 0
        text = model.config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None) or max_model_len
        self._weights = _CheckpointWeights(model, min(num_tokens(tokenizer), text.vocab_size))
        self._end_ids = end_token_ids(model, tokenizer)
        self._has_weights = self._is_offloaded = self._has_failed = False
        chosen = {
            "max_model_len": min(max_model_len, positions),
            "trust_remote_code": trust_remote_code,
            "dtype": str(model.dtype).removeprefix("torch."),
            **self._defaults(device_type == "cpu", arguments or {}),
            **self._checked(arguments or {}),
        }
        self._ranks = ranks
        self._vllm, self._llm = self._start(model, tokenizer, chosen)
        self._max_model_len: int = self._llm.llm_engine.model_config.max_model_len
        self._can_sleep: bool = self._llm.llm_engine.model_config.enable_sleep_mode

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``Generator``. One name of tied parameters is enough.

        Raises:
            LimbeckError: if a weight is missing, unknown or of another shape, or if vLLM cannot load it.
        """
        self.reload()
        complete = self._weights.complete(weights)
        with self._usable("vLLM could not load the student's weights"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": complete})
        self._has_weights, self.version = True, version

    def offload(self) -> None:
        """Move the weights to host memory and free the cache (sleep mode of level 1).

        Does nothing on a CPU, where vLLM has no sleep mode: the weights are in host memory already, and the cache keeps
        its size.
        """
        if self._can_sleep and not self._is_offloaded:
            self._llm.sleep(level=1)
            self._is_offloaded = True

    def reload(self) -> None:
        """The inverse of ``offload``; ``update_weights`` and ``generate`` call it where needed."""
        if self._is_offloaded:
            self._llm.wake_up()
            self._is_offloaded = False

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Completion]:
        """See ``Generator``. A completion also ends, not finished, where ``max_model_len`` is reached.

        Raises:
            LimbeckError: if a prompt is empty or leaves no position for a token, the temperature is between 0 and 0.01, or
                vLLM fails.
        """
        if not self._has_weights:
            raise LimbeckError("the generator has no weights yet; call update_weights before generate.")
        if 0 < sampling.temperature < _LOWEST_TEMPERATURE:
            raise LimbeckError(
                f"the generator vllm cannot sample at temperature {sampling.temperature}: vLLM's lowest is "
                f"{_LOWEST_TEMPERATURE}; raise rollout.temperature, or set it to 0 for greedy decoding."
            )
        self.reload()
        samples = [(prompt, number) for prompt in prompts for number in range(sampling.n)]
        if not samples:
            return []
        requests = [self._request(prompt, number, sampling) for prompt, number in samples]
        with self._usable(f"vLLM failed while it wrote {len(samples)} completions, none of which is kept"):
            # A prefix in the cache may be of earlier weights, and changes the rounding of the logits.
            self._llm.reset_prefix_cache()
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt.token_ids)} for prompt, _ in samples],
                requests,
                use_tqdm=False,
            )
        if len(outputs) != len(samples):
            raise LimbeckError(
                f"vLLM returned {len(outputs)} completions for {len(samples)} requests; restart the run."
            )
        return [self._completion(prompt, output) for (prompt, _), output in zip(samples, outputs, strict=True)]

    def _start(self, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
        """The package ``vllm`` and the engine of this process."""
        _end_engine(self._ranks)
        if self._ranks > 1:
            arguments = {**arguments, "distributed_executor_backend": "external_launcher"}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are in this process
        vllm, llm = start_engine(model, tokenizer, self._weights.vocab_size, arguments)
        _running.append(self)
        if self._ranks > 1:  # at exit, vLLM would destroy a process group that the training has destroyed already
            llm.llm_engine.engine_core._finalizer.detach()
        return vllm, llm

    def _defaults(self, on_cpu: bool, arguments: Mapping[str, Any]) -> dict[str, Any]:
        cache = {"kv_cache_memory_bytes": _CPU_CACHE} if on_cpu else {"gpu_memory_utilization": _GPU_SHARE}
        return {
            "enforce_eager": on_cpu,  # code for a CPU takes longer to compile than CUDA graphs to capture
            "enable_sleep_mode": not on_cpu,
            **({} if {*_CACHE_ARGUMENTS} & arguments.keys() else cache),
        }

    def _checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        own = sorted(self._OWN & arguments.keys())
        if own:
            raise LimbeckError(
                f"rollout.generator_kwargs.{own[0]} is set by the generator vllm, {self._WHY}; remove it."
            )
        return dict(arguments)

    @contextmanager
    def _usable(self, failed: str) -> Iterator[None]:
        """Like ``explained``; refuses to use the engine again, which keeps requests and half of the weights."""
        if self._has_failed:
            raise LimbeckError(
                "vLLM's engine has failed or was ended by another one, and cannot be used any more; restart the run."
            )
        self._has_failed = True
        with explained(failed):
            yield
        self._has_failed = False

    def _request(self, prompt: Prompt, number: int, sampling: SamplingParams) -> Any:
        """The parameters of the request for one sample."""
        most = most_new_tokens(prompt, sampling, self._max_model_len)
        seed = np.random.default_rng((sampling.seed, prompt.row_id, number)).integers(2**63)
        return self._vllm.SamplingParams(
            max_tokens=most,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=int(seed),
            stop=list(sampling.stop_strings),
            stop_token_ids=sorted(self._end_ids | set(sampling.stop_token_ids)),
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop_strings),
            skip_special_tokens=False,  # a stop string may be one
            logprobs=0,  # that of the sampled token
        )

    def _completion(self, prompt: Prompt, output: Any) -> Completion:
        if tuple(output.prompt_token_ids or ()) != prompt.token_ids:
            raise LimbeckError(
                f"vLLM continued other tokens than the prompt of row {prompt.row_id}: {len(output.prompt_token_ids or ())} "
                f"tokens in place of {len(prompt.token_ids)}, or other ids; its samples cannot be used. Check the plug-ins of "
                "vLLM that change prompts."
            )
        (written,) = output.outputs
        if written.finish_reason not in ("stop", "length"):
            raise LimbeckError(
                f"vLLM ended the completion of row {prompt.row_id} with {written.finish_reason!r} instead of writing it to its "
                "end; see vLLM's messages above."
            )
        token_ids = tuple(written.token_ids)
        log_probs = tuple(found[token].logprob for found, token in zip(written.logprobs, token_ids, strict=True))
        return Completion(prompt, token_ids, log_probs, written.finish_reason == "stop", self.version)


class _CheckpointWeights:
    """The names and shapes of the weights of ``model``, and those that vLLM loads for ``vocab_size`` tokens.

    vLLM's model has no rows that pad the output head, so that they are never sampled.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._model = type(model).__name__
        state = model.state_dict(keep_vars=True)
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        names_of: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names_of.setdefault(id(tensor), []).append(name)
        self._tied = {name: names for names in names_of.values() for name in names}
        embeddings = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
        padded = {id(tensor) for module in embeddings for tensor in module.parameters()}
        self._padded = {name for name, tensor in state.items() if id(tensor) in padded}

    def complete(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """``weights``, checked; every tied parameter under each of its names, which vLLM keeps apart on a CPU."""
        for name, tensor in checked_weights(weights, self._tied, self._shapes, self._model):
            tensor = tensor[: self.vocab_size] if name in self._padded else tensor
            yield from ((each, tensor) for each in self._tied[name])


def _end_engine(ranks: int) -> None:
    """End the engine of this process, if it has one, and free its memory."""
    if not _running:
        return
    if ranks > 1:
        raise LimbeckError("a process of several ranks can have one generator vllm only; start the second run anew.")
    generator = _running.pop()
    generator._has_failed = True
    generator._llm.llm_engine.engine_core.shutdown()
    del generator._llm


def start_engine(model: Any, tokenizer: Any, vocab_size: int, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The package ``vllm``, and its engine for ``model``, with random weights."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise LimbeckError(
            "rollout.generator = vllm needs vLLM; install it with: pip install 'limbeck[vllm]', or set rollout.generator: hf."
        ) from error
    with tempfile.TemporaryDirectory(prefix="limbeck-vllm-") as folder, _unchanged_process():
        _write_folder(Path(folder), model, tokenizer, vocab_size)
        with explained("vLLM cannot run the student with these rollout.generator_kwargs"):
            llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                **arguments,
            )
    return vllm, llm


def _write_folder(folder: Path, model: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write the configuration and the tokenizer of ``model``, the former for ``vocab_size`` tokens."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.get_text_config().vocab_size = vocab_size
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restores what vLLM changes for the whole process: the state of random numbers and the threads of PyTorch."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        np.random.set_state(state)
        torch.set_num_threads = set_num_threads  # vLLM replaces it by a function without effect
        torch.set_num_threads(threads)


@contextmanager
def explained(failed: str) -> Iterator[None]:
    """Turns any exception of vLLM into one sentence that begins with ``failed``."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:  # vLLM documents no exceptions of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        hint = ""
        if isinstance(error, torch.OutOfMemoryError):
            hint = " Lower rollout.generator_kwargs.gpu_memory_utilization or max_num_seqs."
        elif (
            type(error).__name__ == "EngineDeadError" or str(error) == "cancelled"
        ):  # an executor waited for the process
            hint = " A process of the engine has ended, and its messages are above; restart the run."
        raise LimbeckError(f"{failed}: {type(error).__name__}: {' '.join(lines[:3])}{hint}") from error

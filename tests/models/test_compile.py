"""Compiled layers really run, compute what uncompiled layers do, and are compiled once for all lengths."""

import pytest
import torch
from tiny import make_model
from torch._dynamo.backends.common import aot_autograd

from limbeck.models import (
    HiddenStateCapture,
    ModelSource,
    add_lora,
    body,
    compile_layers,
    decoder_layers,
    enable_varlen_attention,
    hidden_states,
    load_model,
    recompute_activations,
    should_compile,
    undo_around,
)
from limbeck.models import compile as compiling
from limbeck.objectives import compiler_found

LAYERS, PIECES = 2, 4  # pieces of a layer between its calls of an attention that is not compiled


class CountingBackend:
    """A backend that runs graphs as they are; ``graphs`` counts compilations, ``runs`` executions."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend(monkeypatch):
    counting = CountingBackend()
    monkeypatch.setattr(compiling, "BACKEND", counting)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):  # too few, beyond which layers silently run uncompiled
        yield counting
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("compiled") / "model", layers=LAYERS)


def load(folder, *, packed=False, lora=False, recomputed=None):
    model = load_model(ModelSource(str(folder)), torch.float32, 0).train()
    if packed:
        enable_varlen_attention(model, "tiny")
    if lora:
        torch.manual_seed(1)
        model = add_lora(model, target="all-linear", rank=2, alpha=4, dropout=0.0, additional_target=None)
    if recomputed is not None:
        recompute_activations(model, use_reentrant=recomputed)
        model.enable_input_require_grads()
    return model


def forward(model, lengths, *, packed=False):
    """Last hidden states for one packed row of documents of these lengths, or for two rows of their sum."""
    total = sum(lengths)
    ids = torch.arange(total) % 90 + 5
    if not packed:
        return hidden_states(body(model), ids.expand(2, -1), None)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return hidden_states(body(model), ids[None], positions[None], lengths)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("options", "graphs", "runs"),
    [
        ({}, 1, LAYERS),
        pytest.param({"packed": True}, PIECES, LAYERS * PIECES, marks=pytest.mark.slow),
        ({"recomputed": False}, 1, 2 * LAYERS),
        pytest.param({"recomputed": True}, 2, 2 * LAYERS, marks=pytest.mark.slow),  # without gradients, then with them
        pytest.param(
            {"lora": True}, 2, LAYERS, marks=pytest.mark.slow
        ),  # the input of the first layer needs no gradient
        pytest.param(
            {"lora": True, "packed": True, "recomputed": False}, PIECES, 2 * LAYERS * PIECES, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_compiled_layers_run_for_all_lengths_and_change_nothing(folder, backend, options, graphs, runs):
    packed = options.get("packed", False)
    plain, compiled = load(folder, **options), load(folder, **options)
    compile_layers(decoder_layers(compiled))
    assert list(compiled.state_dict()) == list(plain.state_dict())
    batches = [
        (7, 3),
        (5, 4, 9),
        (20, 2),
        *((2 + i, 3 + i // 2) for i in range(27)),
    ]  # more than PyTorch compiles before it gives up
    for lengths in batches:
        found, expected = (forward(model, lengths, packed=packed) for model in (compiled, plain))
        torch.testing.assert_close(found, expected)
        for states in (found, expected):
            states.square().mean().backward()
    assert (backend.graphs, backend.runs) == (graphs, runs * len(batches))
    torch.testing.assert_close(gradients(compiled), gradients(plain))


@pytest.mark.slow
def test_evaluation_and_autocast_compile_once_more_each(folder, backend):
    plain, compiled = load(folder), load(folder)
    compile_layers(decoder_layers(compiled))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(forward(compiled, (9, 4)), forward(plain, (9, 4)))
    assert backend.graphs == 1
    for model in (plain, compiled):
        model.eval()
    with torch.no_grad():
        for lengths in [(9, 4), (11, 5), (17, 2)]:
            torch.testing.assert_close(forward(compiled, lengths), forward(plain, lengths))
    assert (backend.graphs, backend.runs) == (2, 4 * LAYERS)


def test_layers_around_captured_submodules_run_uncompiled(folder, backend):
    model = load(folder)
    compile_layers(decoder_layers(model))
    forward(model, (4, 4))
    taps = HiddenStateCapture.from_names(body(model), ["model.layers.0", "model.layers.1.mlp"], "student")
    undo_around(decoder_layers(model), taps.modules)
    with taps.capture() as found:
        forward(model, (4, 4))
    assert set(found) == {"model.layers.0", "model.layers.1.mlp"}
    assert backend.runs == LAYERS + 1


def test_a_failing_compiler_warns_once_and_the_next_model_is_compiled(folder, backend, monkeypatch):
    def fail(graph, example_inputs):
        raise OSError("there is no C++ compiler")

    monkeypatch.setattr(compiling, "BACKEND", fail)
    plain, failing, other = (load(folder) for _ in range(3))
    compile_layers(decoder_layers(failing))
    with pytest.warns(UserWarning, match="Qwen2DecoderLayer could not be compiled") as caught:
        found = forward(failing, (9, 4))
    assert len(caught) == 1
    torch.testing.assert_close(found, forward(plain, (9, 4)))
    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    compile_layers(decoder_layers(other))
    forward(other, (9, 4))
    assert backend.runs == LAYERS


def fails_in_backward(graph):
    """A backend that runs graphs as they are, and fails to compile the backward of the one with this number."""
    count = 0

    def compile_forward(module, inputs):
        nonlocal count
        count += 1
        return module.forward

    def compile_backward(module, inputs):
        if count >= graph:
            raise OSError("ptxas failed")
        return module.forward

    return aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)


@pytest.mark.skipif(
    not hasattr(torch._functorch.config, *compiling._WITH_BACKWARD), reason="PyTorch < 2.10 compiles backwards later"
)
@pytest.mark.parametrize(
    ("graph", "recomputed"),
    [
        (1, None),
        (3, False),  # after the first pieces of a layer have run
        (1, True),  # its first graph with gradients is compiled in the backward pass
    ],
)
def test_a_backward_that_cannot_be_compiled_warns_once_and_changes_nothing(
    folder, backend, monkeypatch, graph, recomputed
):
    monkeypatch.setattr(compiling, "BACKEND", fails_in_backward(graph))
    packed = graph > 1
    plain, compiled = (load(folder, packed=packed, recomputed=recomputed) for _ in range(2))
    compile_layers(decoder_layers(compiled))
    with pytest.warns(UserWarning, match="Qwen2DecoderLayer could not be compiled") as caught:
        for lengths in [(9, 4), (5, 6)]:
            found, expected = (forward(model, lengths, packed=packed) for model in (compiled, plain))
            torch.testing.assert_close(found, expected)
            for states in (found, expected):
                states.square().mean().backward()
    assert len(caught) == 1
    torch.testing.assert_close(gradients(compiled), gradients(plain))


@pytest.mark.processes
@pytest.mark.skipif(not compiler_found(), reason="there is no C++ compiler")
def test_inductor_gives_the_same_hidden_states_and_gradients(tmp_path, recwarn):
    folder = make_model(tmp_path / "model", layers=1)
    plain, compiled = load(folder), load(folder)
    torch._dynamo.reset()
    compile_layers(decoder_layers(compiled))
    for lengths in [(9, 4), (21, 3)]:
        found, expected = forward(compiled, lengths), forward(plain, lengths)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for states in (found, expected):
            states.square().mean().backward()
    assert not any("could not be compiled" in str(warning.message) for warning in recwarn)
    torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-3, atol=1e-4)


def test_auto_compiles_long_runs_only(monkeypatch):
    monkeypatch.setattr(compiling, "compiler_found", lambda: True)
    hour = {"cpu": 3600 * 5e10, "cuda": 3600 * 3e14}
    for device_type, flops in hour.items():
        assert should_compile("auto", flops, device_type)
        assert not should_compile("auto", flops / 1000, device_type)
        assert should_compile(True, 0, device_type)
        assert not should_compile(False, flops, device_type)
    monkeypatch.setattr(compiling, "compiler_found", lambda: False)
    assert not should_compile("auto", hour["cpu"], "cpu")

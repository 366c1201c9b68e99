"""Hidden-state capture: outputs under every wrapper, removal of the hooks, and the accepted naming schemes."""

import gc

import pytest
import torch
from tiny import make_model

from limbeck.errors import LimbeckError
from limbeck.models import (
    HiddenStateCapture,
    ModelSource,
    add_lora,
    body,
    check_logit_layer,
    hidden_states,
    load_model,
    recompute_activations,
    resolve_pairs,
    submodules,
)
from limbeck.objectives import FeatureLosses

IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {layers: make_model(root / str(layers), layers=layers) for layers in (2, 4)}


def load(folder):
    return load_model(ModelSource(str(folder)), torch.float32)


def names(layers, *, extra=()):
    each = ("", ".input_layernorm", ".self_attn", ".self_attn.o_proj", ".post_attention_layernorm", ".mlp", *extra)
    return ["model", "model.norm", *(f"model.layers.{i}{part}" for i in range(layers) for part in each)]


def test_outputs_are_those_that_the_model_itself_reports(folders):
    trunk = body(load(folders[4]))
    capture = HiddenStateCapture.from_names(
        trunk, ["model.layers.1", "model.norm", "model.layers.0", "model.layers.1"], "student"
    )
    with capture.capture() as found:
        own = trunk(IDS, output_hidden_states=True)
    rows = capture.rows(found, IDS.shape, torch.tensor([0, 7]))
    expected = [own.hidden_states[2], own.last_hidden_state, own.hidden_states[1], own.hidden_states[2]]
    for one, other in zip(rows, expected, strict=True):
        assert one.equal(other.flatten(0, 1)[[0, 7]])


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_also_after_an_error(folders):
    model = load(folders[2])
    before = hooks(model)
    capture = HiddenStateCapture.from_names(body(model), ["model.layers.0.mlp"], "student")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), capture.capture():
        assert hooks(model) == before + 1
        raise ZeroDivisionError
    assert hooks(model) == before
    assert [type(module) for module in model.modules()] == kinds


def gradients(model, *, recompute, frozen_prefix=None):
    trunk = body(model).train()
    capture = HiddenStateCapture.from_names(
        trunk, ["model.layers.0.mlp", "model.layers.1", "model.layers.1.self_attn"], "student"
    )
    if recompute:
        recompute_activations(model)
    with capture.capture() as found:
        hidden = hidden_states(trunk, IDS, None)
    loss = sum(rows.square().sum() for rows in capture.rows(found, IDS.shape, None)) + hidden.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients(folders):
    loss, plain = gradients(load(folders[2]), recompute=False)
    again, recomputed = gradients(load(folders[2]), recompute=True)
    assert again == loss
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_outlives_a_step_with_the_garbage_collector_off(folders, recompute):
    model = load(folders[2])
    trunk = body(model).train()
    if recompute:
        recompute_activations(model)
    capture = HiddenStateCapture.from_names(trunk, ["model.layers.0.mlp", "model.layers.1", "model.norm"], "student")
    losses = FeatureLosses(["mse", "l1", "cosine"], [(32, 8), (32, 32), (32, 8)])
    teacher = [torch.ones(12, width) for width in (8, 32, 8)]

    def step():
        with capture.capture() as found:
            hidden = hidden_states(trunk, IDS, None)
        (losses(capture.rows(found, IDS.shape, None), teacher, 12.0).sum() + hidden.sum()).backward()
        model.zero_grad()
        losses.zero_grad()

    def tensors():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            step()
        before = tensors()
        for _ in range(200):
            step()
        assert tensors() == before
    finally:
        gc.enable()


def test_names_are_the_same_under_lora(folders):
    pytest.importorskip("peft")
    plain, adapted = load(folders[2]), load(folders[2])
    adapted = add_lora(adapted, target="all-linear", rank=2, alpha=None, dropout=0.0, additional_target=None)
    wanted = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp", "model.norm"]
    outputs = []
    for model in (plain, adapted):
        capture = HiddenStateCapture.from_names(body(model), wanted, "student")
        with capture.capture() as found:
            hidden_states(body(model), IDS, None)
        outputs.append(capture.rows(found, IDS.shape, None))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)  # fresh adapters add nothing
    assert submodules(body(plain)).keys() <= submodules(body(adapted)).keys()


def test_a_submodule_without_one_output_per_token_raises_an_error(folders):
    trunk = body(load(folders[2]))
    capture = HiddenStateCapture.from_names(trunk, ["model.rotary_emb"], "teacher")
    with pytest.raises(
        LimbeckError, match=r"teacher submodule model\.rotary_emb gives \[1, 6, 8\] for a batch of \[2, 6\]"
    ):
        with capture.capture() as found:
            hidden_states(trunk, IDS, None)
        capture.rows(found, IDS.shape, None)
    with pytest.raises(LimbeckError, match=r"model\.norm did not run"):
        HiddenStateCapture.from_names(trunk, ["model.norm"], "student").rows({}, IDS.shape, None)
    with (
        pytest.raises(LimbeckError, match="runs more than once"),
        HiddenStateCapture.from_names(trunk, ["model.norm"], "student").capture(),
    ):
        hidden_states(trunk, IDS, None)
        hidden_states(trunk, IDS, None)


def test_a_probe_shows_widths_and_what_can_be_trained(folders):
    trunk = body(load(folders[2])).train()
    trunk.embed_tokens.requires_grad_(False)
    rows = HiddenStateCapture.from_names(
        trunk, ["model.norm", "model.layers.0.mlp.up_proj", "model.embed_tokens"], "student"
    ).probe(trunk)
    assert [(tuple(one.shape), one.requires_grad) for one in rows] == [
        ((8, 32), True),
        ((8, 64), True),
        ((8, 32), False),
    ]
    assert trunk.training


def pairs_of(*entries, student=2, teacher=2, **kwargs):
    return [
        (pair.student, pair.teacher, pair.loss)
        for pair in resolve_pairs(entries, names(student), names(teacher), **kwargs)
    ]


def test_a_pair_has_a_loss_of_its_own_or_cosine():
    assert pairs_of(["model.norm", "model.layers.1"], ["model.layers.0.mlp", "model.layers.0.mlp", "l1"]) == [
        ("model.norm", "model.layers.1", "cosine"),
        ("model.layers.0.mlp", "model.layers.0.mlp", "l1"),
    ]


def test_stars_pair_layers_in_order_and_the_last_with_the_last():
    star = ["model.layers.*.mlp", "model.layers.*"]
    assert pairs_of(star, student=12, teacher=12)[10][:2] == ("model.layers.10.mlp", "model.layers.10")
    assert [teacher for _, teacher, _ in pairs_of(star, student=2, teacher=6)] == ["model.layers.2", "model.layers.5"]


@pytest.mark.parametrize(
    ("entry", "counts", "sentence"),
    [
        (["model.layers.*", "model.layers.*"], (2, 3), "2 layers of the student and 3 of the teacher"),
        (["model.layers.*", "model.layers.*"], (4, 2), "ambiguous"),
        (["model.layers.*", "model.norm"], (2, 2), "on one side only"),
        (["model.layers.*.mlp.experts.*", "model.norm"], (2, 2), "more than one"),
        (
            ["model.layers.7.mlp", "model.norm"],
            (2, 2),
            r"student has no submodule model\.layers\.7\.mlp; nearest are model",
        ),
        (["model.norm", "model.norms"], (2, 2), r"teacher has no submodule model\.norms; nearest are model\.norm"),
        (
            ["decoder.layers.0.mlp.linear_fc1", "model.norm"],
            (2, 2),
            r"no submodule decoder\.layers\.0\.mlp\.linear_fc1",
        ),
    ],
)
def test_invalid_pairs_raise_errors(entry, counts, sentence):
    with pytest.raises(LimbeckError, match=sentence):
        pairs_of(entry, student=counts[0], teacher=counts[1])


def test_a_repeated_pair_raises_an_error_but_two_losses_do_not():
    with pytest.raises(LimbeckError, match="paired twice with cosine"):
        pairs_of(["model.layers.*", "model.layers.*"], ["model.layers.1", "model.layers.1"])
    assert len(pairs_of(["model.norm", "model.norm"], ["model.norm", "model.norm", "mse"])) == 2


@pytest.mark.parametrize(
    ("megatron", "ours"),
    [
        ("decoder.final_layernorm", "model.norm"),
        ("decoder.layers.1", "model.layers.1"),
        ("decoder.layers.1.input_layernorm", "model.layers.1.input_layernorm"),
        ("decoder.layers.0.self_attention", "model.layers.0.self_attn"),
        ("decoder.layers.0.self_attention.linear_proj", "model.layers.0.self_attn.o_proj"),
        ("decoder.layers.0.pre_mlp_layernorm", "model.layers.0.post_attention_layernorm"),
        ("decoder.layers.1.mlp", "model.layers.1.mlp"),
    ],
)
def test_megatrons_names_are_understood(megatron, ours):
    assert pairs_of([megatron, "model.norm"])[0][0] == ours


def test_a_star_works_in_megatrons_names():
    assert pairs_of(["decoder.layers.*.mlp", "decoder.layers.*.mlp"])[1][:2] == (
        "model.layers.1.mlp",
        "model.layers.1.mlp",
    )


def test_an_ambiguous_megatron_name_raises_an_error():
    sandwich = names(2, extra=(".pre_feedforward_layernorm", ".post_feedforward_layernorm"))
    with pytest.raises(LimbeckError, match=r"could be .* or .* in the student"):
        resolve_pairs([["decoder.layers.0.pre_mlp_layernorm", "model.norm"]], sandwich, names(2))


def test_only_the_output_head_gives_logits(folders):
    model = load(folders[2])
    check_logit_layer(model, "lm_head", "student")
    check_logit_layer(model, "output_layer", "student")
    with pytest.raises(LimbeckError, match=r"output head lm_head, and model\.norm is a layer inside"):
        check_logit_layer(model, "model.norm", "student")
    with pytest.raises(LimbeckError, match="it has no submodule head"):
        check_logit_layer(model, "head", "teacher")

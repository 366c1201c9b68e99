"""Documents end to end in one row give what each gives in a row of its own: losses and gradients, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.data import IGNORE, Batch
from limbeck.errors import LimbeckError
from limbeck.models import (
    ModelSource,
    body,
    enable_varlen_attention,
    hidden_states,
    load_model,
    output_head,
    recompute_activations,
)
from limbeck.objectives import Objective
from limbeck.strategies.base import FrozenModel
from limbeck.teachers import LocalTeacher
from limbeck.train.student import LossSettings, StudentWithLoss, TrainInput

VOCAB = 96
FAMILIES = {
    "qwen2": {},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
                    "query_pre_attn_scalar": 8},
    "gpt_oss": {"head_dim": 8, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip

PRECISION = {"gpt_oss": torch.float32}  # its experts know no other
ROUNDING = {"gpt_oss": 1e-5, "gemma2": 1e-6, "gemma3_text": 1e-6}  # float32, or norms in it


def tiny(family: str, *, seed: int = 0, attention: str | None = None, **changes):
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        **FAMILIES[family], **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.removesuffix("_window"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(PRECISION.get(family, torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that attending to a stranger shows
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def documents(*lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(5)
    found = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length + 1,))
        labels = ids[1:].clone()
        labels[: length // 3] = IGNORE
        found.append((ids[:-1], labels))
    return found


def packed(parts, padding: int = 0) -> Batch:
    lengths = [len(ids) for ids, _ in parts]
    lengths[-1] += padding
    return Batch.of(
        torch.nn.functional.pad(torch.cat([ids for ids, _ in parts]), (0, padding))[None],
        torch.nn.functional.pad(torch.cat([labels for _, labels in parts]), (0, padding), value=IGNORE)[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        sum(lengths) - padding,
        documents=tuple(lengths),
    )


def step(student: StudentWithLoss, teacher: LocalTeacher, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    """The loss over all batches, and every gradient in one vector."""
    student.zero_grad()
    count = sum(len(batch.supervised) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = student(TrainInput(batch, teacher.compute_signal(batch), count)).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def parties(family: str, attention: str | None = None, **changes):
    student, teacher_model = (tiny(family, seed=seed, attention=attention, **changes) for seed in (0, 1))
    teacher = LocalTeacher(FrozenModel(body(teacher_model), output_head(teacher_model.requires_grad_(False)), 0))
    root = StudentWithLoss(student, LossSettings(Objective.of("forward_kl", kd_weight=0.5), VOCAB))
    return student, teacher_model, root, teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_give_the_gradients_of_single_documents(family):
    student, teacher_model, root, teacher = parties(family)
    parts = documents(11, 1, 4, 9, 7)
    loss, gradient = step(root, teacher, [packed([part]) for part in parts])
    found = []
    if family != "gpt_oss":  # its masks do not look at positions
        found.append(step(root, teacher, [packed(parts)]))
    for model in (student, teacher_model):
        enable_varlen_attention(model, family)
        assert model.config._attn_implementation.endswith("_by_document")
    found += [step(root, teacher, [packed(parts, padding)]) for padding in (0, 3)]
    rounding = ROUNDING.get(family, 1e-12)
    for ours, our_gradient in found:
        assert ours == pytest.approx(loss, rel=rounding)
        torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=rounding * gradient.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_keep_documents_apart_too(reentrant):
    student, teacher_model, root, teacher = parties("mistral")
    parts = documents(11, 4, 9)
    loss, gradient = step(root, teacher, [packed([part]) for part in parts])
    enable_varlen_attention(student, "student")
    enable_varlen_attention(teacher_model, "teacher")
    root.train()
    recompute_activations(student, use_reentrant=reentrant)
    student.enable_input_require_grads()
    ours, our_gradient = step(root, teacher, [packed(parts)])
    assert ours == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-7, atol=1e-9)


def test_configured_eager_attention_stays_eager():
    models = [tiny("llama", attention=kind) for kind in ("sdpa", "eager")]
    batch = packed(documents(8, 5, 12))
    found = []
    for model in models:
        enable_varlen_attention(model, "llama")
        found.append(hidden_states(body(model), batch.input_ids, batch.position_ids, batch.documents))
    assert [model.config._attn_implementation for model in models] == ["sdpa_by_document", "eager_by_document"]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)  # eager forms its softmax in float32


def of_each(family, parts, attention=None):
    """The hidden states of every document in a row of its own."""
    model = tiny(family, attention=attention).eval()
    return torch.cat([hidden_states(body(model), ids[None], None)[0] for ids, _ in parts])


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])  # its sinks need a GPU there
def test_flex_attention_keeps_documents_apart(family):
    parts = documents(11, 1, 4, 9, 7)
    packs = packed(parts, padding=3)
    flex = tiny(family, attention="flex_attention").eval()
    enable_varlen_attention(flex, family)
    assert flex.config._attn_implementation == "flex_attention_by_document"
    with torch.compiler.set_stance("force_eager"):  # compiling takes its time, and the mathematics are the same
        found = hidden_states(body(flex), packs.input_ids, packs.position_ids, packs.documents)[0]
        alone = hidden_states(body(flex), parts[0][0][None], None)[0]
    torch.testing.assert_close(found[:-3], of_each(family, parts, "eager"), rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, found[: len(alone)], rtol=0, atol=1e-9)


@torch.no_grad()
def test_flex_attention_takes_what_autocast_leaves(tmp_path):
    make_model(tmp_path / "model", kind="qwen3", head_dim=8)  # whose norms leave queries in float32
    flex = load_model(ModelSource(str(tmp_path / "model"), attn_implementation="flex_attention"), torch.float32).eval()
    packs = packed(documents(8, 5))
    with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", torch.bfloat16):
        plain = hidden_states(body(flex), packs.input_ids[:, :8], None)
        enable_varlen_attention(flex, "qwen3")
        found = hidden_states(body(flex), packs.input_ids, packs.position_ids, packs.documents)
    torch.testing.assert_close(found[:, :8], plain)
    flex.save_pretrained(tmp_path / "saved")
    assert "by_document" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_window", "qwen3", "llama", "mistral", "gemma2"])
def test_gpu_kernels_give_the_gradients_of_single_documents(family, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    changes = {"head_dim": 16, "hidden_size": 64}  # the smallest that the kernels take
    student, teacher_model, root, teacher = parties(family, attention, **changes)
    parts = documents(130, 1, 40, 90, 70)
    for model in (student, teacher_model):
        enable_varlen_attention(model.to(dtype), family)
        model.to("cuda")
    teacher = LocalTeacher(FrozenModel(body(teacher_model), output_head(teacher_model), 0))
    loss, gradient = step(root, teacher, [packed([part]).to(torch.device("cuda")) for part in parts])
    ours, our_gradient = step(root, teacher, [packed(parts, 3).to(torch.device("cuda"))])
    tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-4
    assert ours == pytest.approx(loss, rel=tolerance)
    assert (our_gradient - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_rows_without_documents_and_generation_are_as_before(family):
    model = tiny(family).eval()
    ids = torch.randint(3, VOCAB, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left-padded, as for writing

    def everything():
        with torch.no_grad():
            return (
                hidden_states(body(model), ids, None),
                model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
                model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
            )

    before = everything()
    enable_varlen_attention(model, family)
    for a, b in zip(before, everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_saved_model_does_not_carry_the_attention_along(tmp_path):
    make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    enable_varlen_attention(model, "model")
    model.save_pretrained(tmp_path / "saved")
    assert "by_document" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == "sdpa"


def test_a_recurrent_model_is_refused():
    settings = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))
    with pytest.raises(LimbeckError, match=r"MambaForCausalLM\) does not separate packed rows"):
        enable_varlen_attention(model, "the student")

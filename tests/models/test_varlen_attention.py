"""Documents end to end in one row give what each gives in a row of its own: losses and gradients, for every family."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import make_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, masking_utils

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
    varlen_attention,
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
    "nemotron_h": {"hybrid_override_pattern": "M-*M", "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
                   "ssm_state_size": 4, "chunk_size": 4},
}  # fmt: skip

PRECISION = {"gpt_oss": torch.float32}  # its experts know no other
ROUNDING = {"gpt_oss": 1e-5, "gemma2": 1e-6, "gemma3_text": 1e-6, "nemotron_h": 1e-6}  # float32, or norms in it


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
    if family not in ("gpt_oss", "nemotron_h"):  # their masks and states do not look at positions
        found.append(step(root, teacher, [packed(parts)]))
    for model in (student, teacher_model):
        enable_varlen_attention(model, family)
        assert model.config._attn_implementation.endswith("_by_document")
    found += [step(root, teacher, [packed(parts, padding)]) for padding in (0, 3)]
    rounding = ROUNDING.get(family, 1e-12)
    for ours, our_gradient in found:
        assert ours == pytest.approx(loss, rel=rounding)
        torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=rounding * gradient.abs().max().item())


@pytest.mark.parametrize(("family", "reentrant"), [("mistral", False), ("mistral", True), ("nemotron_h", False)])
def test_recomputed_layers_keep_documents_apart_too(family, reentrant):
    student, teacher_model, root, teacher = parties(family)
    parts = documents(11, 4, 9)
    loss, gradient = step(root, teacher, [packed([part]) for part in parts])
    enable_varlen_attention(student, "student")
    enable_varlen_attention(teacher_model, "teacher")
    root.train()
    recompute_activations(student, use_reentrant=reentrant)
    student.enable_input_require_grads()
    ours, our_gradient = step(root, teacher, [packed(parts)])
    rounding = ROUNDING.get(family, 1e-9)
    assert ours == pytest.approx(loss, rel=rounding)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-7, atol=rounding * gradient.abs().max().item())


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


def attend(query, key, value, cu_seqlens, max_length, window, scale):
    """The definition of the varlen kernel, one position at a time."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        assert 0 < end - start <= max_length
        for t in range(start, end):
            seen = slice(start if window is None else max(start, t + 1 - window), t + 1)
            p = torch.einsum("hd,shd->hs", query[t].double() * scale, key[seen].double()).softmax(-1)
            outputs.append(torch.einsum("hs,shd->hd", p, value[seen].double()).to(query.dtype))
    return torch.stack(outputs)


@pytest.fixture
def kernel(monkeypatch):
    """Takes the CPU for a GPU whose varlen kernel is ``attend``. The keyword arguments of every call."""
    calls = []

    def record(query, key, value, cu_seqlens, max_length, window, scale):
        assert query.dtype == key.dtype == value.dtype and cu_seqlens.dtype == torch.int32
        calls.append({"dtype": query.dtype, "cu_seqlens": cu_seqlens, "max_length": max_length, "window": window})
        return attend(query, key, value, cu_seqlens, max_length, window, scale)

    dtypes = (torch.bfloat16, torch.float16, torch.float64)
    monkeypatch.setattr(varlen_attention, "_device_obstacle", lambda device: None)
    monkeypatch.setattr(varlen_attention, "_KERNEL_DTYPES", dtypes)
    monkeypatch.setattr(varlen_attention, "_varlen", record)
    monkeypatch.setattr(varlen_attention, "_warned", set())
    return calls


def compare_packed_with_single(family, parts, *, recompute=False, **changes):
    """Trains on packed ``parts`` after ``enable_varlen_attention`` and compares loss and gradient with single documents."""
    student, teacher_model, root, teacher = parties(family, **changes)
    loss, gradient = step(root, teacher, [packed([part]) for part in parts])
    for model in (student, teacher_model):
        enable_varlen_attention(model, family)
    if recompute:
        root.train()
        recompute_activations(student)
        student.enable_input_require_grads()
    for padding in (0, 3):
        ours, our_gradient = step(root, teacher, [packed(parts, padding)])
        rounding = 10 * ROUNDING.get(family, 1e-12)
        assert ours == pytest.approx(loss, rel=rounding)
        torch.testing.assert_close(our_gradient, gradient, rtol=0, atol=rounding * gradient.abs().max().item())


VARLEN = {"qwen2": {None}, "qwen2_window": {None, 6}, "qwen3": {None}, "llama": {None}, "mistral": {5}}


@pytest.mark.parametrize("family", VARLEN)
@pytest.mark.parametrize("groups", [2, 4])
def test_the_varlen_kernel_computes_all_documents_in_one_call(family, groups, kernel):
    parts = documents(11, 1, 4, 9, 7)
    compare_packed_with_single(family, parts, num_key_value_heads=groups)
    kernel = [call for call in kernel if len(call["cu_seqlens"]) == len(parts) + 1]  # not those of the check
    assert len(kernel) == 2 * 2 * 2  # layers, models, paddings
    assert {call["window"] for call in kernel} == VARLEN[family]
    assert {call["max_length"] for call in kernel} == {128}
    # One tensor for all layers of student and teacher.
    assert len({id(call["cu_seqlens"]) for call in kernel}) == 2


def test_the_varlen_kernel_takes_float32_norms_only_under_autocast(kernel):
    parts = documents(11, 1, 4, 9)
    packs, model = packed(parts), tiny("gemma3_text").float().eval()
    with pytest.warns(UserWarning, match="computed in float32; set model_args.dtype: bf16"):
        enable_varlen_attention(model, "gemma3")
    assert not kernel
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = hidden_states(body(model), packs.input_ids, packs.position_ids, packs.documents)[0]
        each = torch.cat([hidden_states(body(model), ids[None], None)[0] for ids, _ in parts])
    assert {(call["dtype"], call["window"]) for call in kernel} == {(torch.bfloat16, 5), (torch.bfloat16, None)}
    torch.testing.assert_close(found, each, rtol=0, atol=0.05 * each.abs().max().item())


def test_recomputed_layers_use_the_varlen_kernel_too(kernel):
    parts = documents(11, 4, 9)
    compare_packed_with_single("mistral", parts, recompute=True)
    kernel = [call for call in kernel if len(call["cu_seqlens"]) == len(parts) + 1]
    assert len(kernel) == 2 * 2 * (2 + 1)  # paddings, layers, student twice and teacher


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "soft-cap; set attn_implementation: flex_attention"),
        ("gpt_oss", {}, "attention sinks; set attn_implementation: flex_attention"),
        ("llama", {"attention": "eager"}, "attn_implementation is eager"),
        ("llama", {"head_dim": 12}, "a multiple of 8"),
    ],
)
def test_what_the_varlen_kernel_cannot_do_is_computed_by_document_with_one_warning(family, changes, reason, kernel):
    with pytest.warns(UserWarning, match=reason) as warned:
        compare_packed_with_single(family, documents(11, 1, 4, 9), **changes)
    assert len([warning for warning in warned if "one packed document at a time" in str(warning.message)]) == 1
    assert not kernel


def test_attention_dropout_is_not_given_to_the_varlen_kernel(kernel):
    model = tiny("llama", attention_dropout=0.5).train()
    enable_varlen_attention(model, "llama")
    kernel.clear()
    packs = packed(documents(11, 4))
    with pytest.warns(UserWarning, match="attention dropout"):
        hidden_states(body(model), packs.input_ids, packs.position_ids, packs.documents)
    assert not kernel


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"local_size": 4}, "neither causal nor a sliding window"),  # chunks: the layer has no sliding window
        ({"allow_is_causal_skip": False}, "not only causal"),  # joined with another mask
    ],
)
def test_other_masks_are_not_given_to_the_varlen_kernel(described, reason, kernel):
    packs = packed(documents(11, 4))
    given = {"batch_size": 1, "q_length": 15, "kv_length": 15, "device": torch.device("cpu"), **described}
    with varlen_attention.separate_documents(packs.documents, packs.cu_seqlens):
        mask = AttentionMaskInterface()["sdpa_by_document"](mask_function=masking_utils.causal_mask_function, **given)
    layer = body(tiny("llama").eval()).layers[0].self_attn
    query, key = (torch.randn(1, heads, 15, 8, dtype=torch.float64) for heads in (4, 2))
    with pytest.warns(UserWarning, match=reason):
        AttentionInterface()["sdpa_by_document"](layer, query, key, key, mask)
    assert not kernel


def test_a_cpu_gets_no_warning(recwarn):
    compare_packed_with_single("llama", documents(5, 4))
    assert not [warning for warning in recwarn if "one packed document" in str(warning.message)]


@pytest.mark.parametrize(
    ("signature", "options"),
    [
        ({"is_causal"}, {"is_causal": True}),  # PyTorch 2.10
        ({"window_size", "scale"}, {"window_size": (-1, 0), "scale": 0.5}),  # 2.11
        ({"window_size", "scale", "enable_gqa"}, {"window_size": (-1, 0), "scale": 0.5, "enable_gqa": True}),  # 2.12
    ],
)
def test_the_kernel_is_called_as_each_version_of_pytorch_takes_it(signature, options, monkeypatch):
    def varlen_attn(query, key, value, starts, starts_k, longest, longest_k, **given):
        assert given == options and starts is starts_k and longest == longest_k == 128
        return query if "scale" in given else query / 8**-0.5

    monkeypatch.setattr(varlen_attention, "_VARLEN_OPTIONS", frozenset(signature))
    monkeypatch.setattr(varlen_attention, "varlen_attn", varlen_attn)
    query = torch.randn(5, 4, 8)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    output = varlen_attention._varlen(query, query, query, starts, 128, None, 0.5)
    torch.testing.assert_close(output, query if "scale" in options else query * 0.5 * 8)


@pytest.mark.slow
def test_a_compiled_layer_is_compiled_once_for_all_batches(kernel, monkeypatch):
    monkeypatch.setattr(varlen_attention, "_varlen", torch_library_attend)
    model = tiny("mistral").eval()
    enable_varlen_attention(model, "mistral")
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    torch._dynamo.reset()
    for layer in body(model).layers:
        layer.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        for lengths in ((11, 4, 9), (12, 3, 5, 8), (140, 1), (7, 7, 7, 7, 7), (300, 2, 9), (31,) * 9):
            parts = documents(*lengths)
            packs = packed(parts)
            found = hidden_states(body(model), packs.input_ids, packs.position_ids, packs.documents)[0]
            if len(packs.input_ids[0]) < 50:
                torch.testing.assert_close(found, of_each("mistral", parts), rtol=0, atol=1e-9)
    assert len(compilations) <= 3  # static shapes, then dynamic lengths, then a dynamic maximum


@torch.library.custom_op("limbeck_test::attend", mutates_args=())
def _attend_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int, window: int
) -> torch.Tensor:
    return attend(query, key, value, cu_seqlens, max_length, window, None)


@_attend_op.register_fake
def _(query, key, value, cu_seqlens, max_length, window):
    return torch.empty_like(query)


def torch_library_attend(query, key, value, cu_seqlens, max_length, window, scale):
    return _attend_op(query, key, value, cu_seqlens, max_length, window)


def test_flash_attention_without_its_package_is_pytorchs_attention(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.models.load.is_flash_attn_2_available", lambda: False)
    make_model(tmp_path / "model")
    for name in ("fa2", "flash_attention_2"):
        with pytest.warns(UserWarning, match="needs a GPU and the package flash-attn"):
            model = load_model(ModelSource(str(tmp_path / "model"), attn_implementation=name), torch.float32)
        assert model.config._attn_implementation == "sdpa"


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def gpu_step(family, attention, dtype, batches, **changes):
    """Loss and gradient of the packed ``batches`` on the GPU in ``dtype``."""
    student, teacher_model, root, teacher = parties(family, attention, head_dim=16, hidden_size=64, **changes)
    for model in (student, teacher_model):
        enable_varlen_attention(model.to(dtype), family)
        model.to("cuda")
    teacher = LocalTeacher(FrozenModel(body(teacher_model), output_head(teacher_model), 0))
    return step(root, teacher, [batch.to(torch.device("cuda")) for batch in batches])


def assert_close_step(single, packs, tolerance):
    assert packs[0] == pytest.approx(single[0], rel=tolerance)
    assert (packs[1] - single[1]).norm() <= tolerance * single[1].norm()


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("family", ["qwen2", "qwen2_window", "qwen3", "llama", "mistral", "gemma3_text"])
    def test_the_varlen_kernel_gives_the_gradients_of_single_documents(self, family, groups, monkeypatch):
        calls, own = [], varlen_attention._varlen
        monkeypatch.setattr(varlen_attention, "_varlen", lambda *given: calls.append(given) or own(*given))
        parts = documents(130, 1, 40, 90, 70)
        single, packs = (
            gpu_step(family, None, torch.bfloat16, batches, num_key_value_heads=groups)
            for batches in ([packed([part]) for part in parts], [packed(parts, 3)])
        )
        assert_close_step(single, packs, 5e-2)
        assert calls

    @pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
    @pytest.mark.parametrize("lengths", [(130, 1, 40), (1,), (1, 1, 1), (64,) * 20])
    def test_the_varlen_kernel_is_causal_attention_within_documents(self, window, lengths):
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        torch.manual_seed(0)
        given = [
            torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
        distance = torch.arange(len(document)).cuda()
        distance = distance[:, None] - distance
        seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or len(document)))
        grad = torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16)
        output = varlen_attention._varlen(*given, starts, 256, window, 0.2)
        found = (output, *torch.autograd.grad(output, given, grad))
        query, key, value = (x.float() for x in given)
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * 0.2
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, value)
        for ours, theirs in zip(found, (expected, *torch.autograd.grad(expected, given, grad.float())), strict=True):
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)

    def test_a_compiled_layer_takes_the_varlen_kernel_in_any_batch(self):
        model = tiny("mistral", head_dim=16, hidden_size=64, num_hidden_layers=1).to("cuda", torch.bfloat16)
        enable_varlen_attention(model, "mistral")
        lengths = ((130, 1, 40), (60, 60, 9, 7), (300, 2))
        packs = [packed(documents(*each)).to(torch.device("cuda")) for each in lengths]

        def run():
            return [
                hidden_states(body(model), one.input_ids, one.position_ids, one.documents, cu_seqlens=one.cu_seqlens)
                for one in packs
            ]

        plain = run()
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
            for layer in body(model).layers:
                layer.compile(fullgraph=True, backend="aot_eager")
            for ours, expected in zip(run(), plain, strict=True):
                ours.float().square().sum().backward()
                torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())

    def test_packing_does_not_wait_for_the_gpu(self):
        model = tiny("mistral", head_dim=16, hidden_size=64).to("cuda", torch.bfloat16)
        enable_varlen_attention(model, "mistral")
        one = packed(documents(130, 1, 40)).pin_memory()

        def run():
            here = one.to(torch.device("cuda"))
            hidden = hidden_states(
                body(model), here.input_ids, here.position_ids, here.documents, cu_seqlens=here.cu_seqlens
            )
            hidden.sum().backward()

        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("family", ["qwen2", "qwen2_window", "qwen3", "llama", "mistral", "gemma2"])
    def test_flash_attn_gives_the_gradients_of_single_documents(self, family):
        pytest.importorskip("flash_attn")
        parts = documents(130, 1, 40, 90, 70)
        single, packs = (
            gpu_step(family, "flash_attention_2", torch.bfloat16, batches)
            for batches in ([packed([part]) for part in parts], [packed(parts, 3)])
        )
        assert_close_step(single, packs, 5e-2)

    def test_flex_attention_gives_the_gradients_of_single_documents(self):
        # One layer and one shape: compiling takes most of the time.
        changes = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
        parts = documents(130, 1, 40)
        single = gpu_step("gemma2", "eager", torch.float32, [packed([part]) for part in parts], **changes)
        packs = gpu_step("gemma2", "flex_attention", torch.float32, [packed(parts, 3)], **changes)
        assert_close_step(single, packs, 1e-3)


def test_the_longest_length_is_rounded_up_to_a_power_of_two():
    for longest in (1, 128, 129, 140, 256, 300, 5000):
        with varlen_attention.separate_documents((1, longest), torch.tensor([0, 1, 1 + longest], dtype=torch.int32)):
            given = varlen_attention.causal_mask().max_length
        assert given.bit_count() == 1
        assert max(127, longest - 1) < given < 2 * max(128, longest)


def test_without_documents_positions_that_start_again_divide_no_row():
    model = tiny("llama", attention="sdpa").eval()
    ids, positions = torch.randint(3, VOCAB, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        found = hidden_states(body(model), ids, positions)
        whole = body(model)(
            input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)
        ).last_hidden_state
    torch.testing.assert_close(found, whole)


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

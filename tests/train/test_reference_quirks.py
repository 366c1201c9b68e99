"""Each quirk of another system gives that system's formula on whole logits; without quirks nothing changes."""

import json

import pytest
import torch
from runs import rows
from tiny import TEMPLATE, make_model
from transformers import AutoModelForCausalLM

from limbeck import DistillPipeline, LimbeckError
from limbeck.config import load_arguments
from limbeck.data import BatchStream, StreamSettings, tokenize_files
from limbeck.models import ModelSource, load_tokenizer

from .test_features import first_batch

STEP = {"max_steps": 1, "eval_steps": 0, "save_steps": 0, "distill_loss_weight": 0.4, "kd_temperature": 2.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    """A student with a row for every token, including added ones, and a teacher whose head has 24 rows of padding."""
    folder = tmp_path_factory.mktemp("padded")
    for name, shape, more in (("student", {}, 0), ("teacher", {"hidden": 48, "layers": 3, "seed": 1}, 24)):
        make_model(folder / name, **shape)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        model.resize_token_embeddings(len(load_tokenizer(ModelSource(str(folder / name)))) + more)
        model.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


def logits_of(folder, input_ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids, use_cache=False).logits.double()


def kl(z_t, z_s):
    log_p, log_q = (z_t / 2).log_softmax(-1), (z_s / 2).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def expected(fault, z_s, z_t, batch, base):
    """(CE, KD) as the system with this quirk computes them, from [batch, time, vocab] logits with padding."""
    targets = batch.labels != -100
    count, tokens = targets.sum(), batch.num_tokens
    ce = torch.nn.functional.cross_entropy(z_s[targets], batch.labels[targets])
    shared = min(z_s.shape[-1], z_t.shape[-1])
    per_token = kl(z_t[..., :shared], z_s[..., :shared])
    if fault == "unshifted_mask":  # ROLL: mask = labels != IGNORE, where labels are those of the inputs
        own = torch.nn.functional.pad(targets, (1, 0))[:, :-1]
        return ce, per_token[own].sum() / count
    if fault == "every_token":  # HyperPod: the sum is over all tokens
        real = torch.zeros_like(targets)
        if batch.real is None:
            real[:] = True
        else:
            real.view(-1)[batch.real] = True
        assert real.sum() == tokens > count
        return ce, per_token[real].sum() / tokens
    if fault == "base_vocabulary":  # ROLL: target_vocab_size = tokenizer.vocab_size
        return ce, kl(z_t[..., :base], z_s[..., :base])[targets].mean()
    if fault == "zero_padded_vocabulary":  # HyperPod's pad_logits
        more = z_t.shape[-1] - z_s.shape[-1]
        assert more == 24
        return ce, kl(z_t, torch.nn.functional.pad(z_s, (0, more)))[targets].mean()
    assert fault == "mean_over_vocabulary"  # ModelOpt's reduction="mean"
    log_p, log_q = ((z / 2).log_softmax(-1)[targets] for z in (z_t[..., :shared], z_s[..., :shared]))
    return ce, (log_p.exp() * (log_p - log_q)).mean()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "fault",
    ["unshifted_mask", "every_token", "base_vocabulary", "zero_padded_vocabulary", "mean_over_vocabulary"],
)
@pytest.mark.slow
def test_a_quirk_gives_the_formula_of_its_system(configure, assets, pair, fault, packing):
    config = configure(
        **STEP, student_pretrain=pair[0], teacher_pretrain=pair[1], objective_faults=[fault],
        **{"student.use_sequence_packing": packing, "student.data_args.file_name": [str(assets / "rows.jsonl")]},
    )  # fmt: skip
    found = DistillPipeline(config).run().metrics
    batch = first_batch(config, assets, packing)
    if packing:  # each document in its own row, for the models without varlen attention
        parts = torch.split(batch.input_ids[0], list(batch.documents))
        z_s, z_t = (torch.cat([logits_of(folder, part[None])[0] for part in parts])[None] for folder in pair)
    else:
        z_s, z_t = (logits_of(folder, batch.input_ids) for folder in pair)
    base = load_tokenizer(ModelSource(pair[0])).vocab_size
    assert base < z_s.shape[-1]
    ce, kd = expected(fault, z_s, z_t, batch, base)
    plain = expected_without(z_s, z_t, batch)
    assert abs(kd.item() - plain) > 1e-4 * plain, "the fault shows"
    assert found["train/train_student_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert found["train/train_distill_loss"] == pytest.approx(kd.item(), rel=1e-5)
    assert found["train/loss"] == pytest.approx(0.6 * ce.item() + 0.4 * kd.item(), rel=1e-5)


def expected_without(z_s, z_t, batch):
    shared = min(z_s.shape[-1], z_t.shape[-1])
    return kl(z_t[..., :shared], z_s[..., :shared])[batch.labels != -100].mean().item()


def test_mean_of_micro_batches_gives_short_and_long_ones_the_same_weight(configure, tmp_path):
    """With one row per micro-batch the loss is the mean of the means of the rows, so it depends on the split."""
    losses = {}
    for name, faults, split in (
        ("sound", [], (1, 8)),
        ("sound whole", [], (8, 1)),
        ("fault", ["mean_of_micro_batches"], (1, 8)),
        ("fault whole", ["mean_of_micro_batches"], (8, 1)),
    ):
        config = configure(**STEP, output_dir=str(tmp_path / name), objective_faults=faults, **rows(*split))
        losses[name] = DistillPipeline(config).run().metrics["train/loss"]
    assert losses["sound"] == pytest.approx(losses["sound whole"], rel=1e-6)
    assert losses["fault whole"] == pytest.approx(losses["sound"], rel=1e-6)
    assert losses["fault"] != pytest.approx(losses["sound"], rel=1e-5)


def micro_batches(config, assets, size):
    """All micro-batches of the first step, of ``size`` rows each."""
    examples, _ = tokenize_files(
        list(config.student.data_args.file_name),
        load_tokenizer(ModelSource(str(assets / "student"))),
        sequence_length=64,
    )
    stream = BatchStream(
        examples,
        StreamSettings(seed=42, sequence_length=64, per_device_batch_size=size, accumulation_steps=8 // size, pad_id=0),
    )
    return next(stream).micro_batches


def log_softmaxes(z_t, z_s, tau_t, tau_s):
    return (z_t / tau_t).log_softmax(-1), (z_s / tau_s).log_softmax(-1)


def roll(parts, base):
    """Unshifted mask, ``tokenizer.vocab_size`` columns, the 64 most likely tokens, τ_t = 1.5 · 2."""
    ce = kd = 0
    for batch, z_s, z_t in parts:
        targets = batch.labels != -100
        ce = ce + torch.nn.functional.cross_entropy(z_s[targets], batch.labels[targets], reduction="sum")
        own = torch.nn.functional.pad(targets, (1, 0))[:, :-1]
        top = z_t[..., :base][own].topk(64)
        log_p, log_q = log_softmaxes(top.values, z_s[..., :base][own].gather(-1, top.indices), 3.0, 2.0)
        kd = kd + (log_p.exp() * (log_p - log_q)).sum()
    count = sum((batch.labels != -100).sum() for batch, *_ in parts)
    return 0.5 * ce / count + 0.5 * kd / count


def modelopt(parts, base):
    """The mean over positions and vocabulary, and over micro-batches."""
    total = 0
    for batch, z_s, z_t in parts:
        log_p, log_q = log_softmaxes(z_t[..., : z_s.shape[-1]], z_s, 1.0, 1.0)
        total = total + (log_p.exp() * (log_p - log_q))[batch.labels != -100].mean()
    return total / len(parts)


def trl(parts, base):
    """Generalised JSD at β = ½; earlier releases average the means of the micro-batches."""
    total = 0
    for batch, z_s, z_t in parts:
        p, q = (z[..., : z_s.shape[-1]][batch.labels != -100].softmax(-1) for z in (z_t, z_s))
        m = (p + q) / 2
        total = total + 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1).mean()
    return total / len(parts)


@pytest.mark.parametrize(
    ("system", "faults", "changes"),
    [
        (roll, ["unshifted_mask", "base_vocabulary"], {"kd_temperature": 2.0, "teacher_temperature": 1.5}),
        (modelopt, ["mean_over_vocabulary", "mean_of_micro_batches"], {}),
        (trl, ["mean_of_micro_batches"], {}),
    ],
)
def test_a_preset_with_all_its_quirks_gives_the_formula_of_its_system(configure, assets, pair, system, faults, changes):
    config = configure(
        **{key: 0 if key != "max_steps" else 1 for key in ("max_steps", "eval_steps", "save_steps")}, **changes,
        student_pretrain=pair[0], teacher_pretrain=pair[1], objective_preset=system.__name__, objective_faults=faults,
        **rows(2, 4), **{"student.data_args.file_name": [str(assets / "rows.jsonl")]},
    )  # fmt: skip
    found = DistillPipeline(config).run().metrics["train/loss"]
    parts = [
        (batch, *(logits_of(folder, batch.input_ids) for folder in pair)) for batch in micro_batches(config, assets, 2)
    ]
    assert len({int((batch.labels != -100).sum()) for batch, *_ in parts}) > 1, "micro-batches of different lengths"
    assert found == pytest.approx(system(parts, load_tokenizer(ModelSource(pair[0])).vocab_size).item(), rel=1e-5)


def test_parity_is_the_arithmetic_of_hyperpods_sample(pair, tmp_path):
    """Its rows are padded to max_length with attention everywhere and labels equal to the input. Its ``compute_loss`` pads
    logits with zeros, sums the divergence over all positions, and divides by batch · max_length.
    """
    T, alpha, max_length = 3.0, 0.3, 120
    pairs = [(f"What is {i}?", f"It is {i}." + " Indeed." * i) for i in range(8)]
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"conversations": one}) + "\n" for one in turns))
    argv = [
        "--parity", "--teacher_model", pair[1], "--student_model", pair[0], "--dataset_name", str(tmp_path / "rows.jsonl"),
        "--max_length", str(max_length), "--temperature", str(T), "--alpha", str(alpha), "--no-bf16",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--chat_template", TEMPLATE,
        "--output_dir", str(tmp_path), "max_steps=1", "track_with=none",
    ]  # fmt: skip
    found = DistillPipeline(load_arguments(argv, "hyperpod").config).run().metrics

    tokenizer = load_tokenizer(ModelSource(pair[0]))
    system = {"role": "system", "content": "You are a helpful assistant."}
    chats = [[system, {"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    texts = [tokenizer.apply_chat_template(chat, chat_template=TEMPLATE, tokenize=False) for chat in chats]
    padded = tokenizer(texts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    ids, everywhere = padded["input_ids"], torch.ones_like(padded["input_ids"])
    assert len(set(padded["attention_mask"].sum(1).tolist())) > 4, "rows of different lengths"
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)
    with torch.no_grad():
        out = student(ids, attention_mask=everywhere, labels=ids)
        z_t = teacher(ids, attention_mask=everywhere).logits
    z_s = torch.nn.functional.pad(out.logits, (0, z_t.shape[-1] - out.logits.shape[-1]))
    q, p = (z_s / T).log_softmax(-1), (z_t / T).softmax(-1)
    kd = torch.nn.functional.kl_div(q, p, reduction="batchmean") * T**2 / max_length
    assert found["train/train_student_loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert found["train/loss"] == pytest.approx(alpha * kd.item() + (1 - alpha) * out.loss.item(), rel=1e-5)


def test_quirks_can_be_combined_and_do_not_affect_validation(configure, tmp_path):
    config = configure(
        **{**STEP, "max_steps": 3, "eval_steps": 3}, objective_faults=["unshifted_mask", "base_vocabulary"]
    )
    found = DistillPipeline(config).run().metrics
    assert 0 < found["student/grad_norm"] < 100
    sound = configure(**{**STEP, "max_steps": 3, "eval_steps": 3}, output_dir=str(tmp_path / "sound"))
    assert found["val/kd"] == pytest.approx(DistillPipeline(sound).run().metrics["val/kd"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective_faults": ["unshifted_mask", "every_token"]}, "which contradict"),
        ({"objective_faults": ["every_token"], "loss_balance": "modelopt"}, "cannot be combined with loss_balance"),
        (
            {"objective_faults": ["trained_padding"], "student.use_sequence_packing": True},
            "cannot be combined with student.use_sequence_packing",
        ),
        ({"objective_faults": ["shifted_mask"]}, "objective_faults"),
    ],
)
def test_unsupported_quirks_are_an_error(configure, changes, message):
    with pytest.raises(LimbeckError, match=message):
        configure(**changes)

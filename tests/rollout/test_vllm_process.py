"""The generator ``vllm`` on devices of its own: it passes the contract, with weights that are sent to other processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import contract
import pytest
import torch
import yaml
from runs import launch, metrics, rows
from test_vllm import VllmTests, make_student, needs_vllm, writing

from limbeck import DistillPipeline
from limbeck.config import load_mapping
from limbeck.errors import LimbeckError
from limbeck.models import ModelSource, load_tokenizer, model_outline
from limbeck.rollout import SamplingParams
from limbeck.rollout.vllm_engines import VllmEngines
from limbeck.rollout.vllm_process import SeparateVllm
from limbeck.strategies.state import iter_model


def start(folder, **changes):
    source, device = ModelSource(str(folder)), changes.get("device_type", "cpu")
    outline = model_outline(source, torch.float32 if device == "cpu" else torch.bfloat16)
    return SeparateVllm(outline, load_tokenizer(source), **{"max_model_len": 256, "devices": [1], **changes})


def descendants():
    """The processes that this one has started, and those that they have."""
    import psutil

    return psutil.Process().children(recursive=True)


def alive(processes):
    """Those that do not end soon."""
    import psutil

    _, left = psutil.wait_procs(processes, timeout=20)
    with suppress(psutil.NoSuchProcess):
        left = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    return left


def processes_of_group(number):
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            found += [process] if os.getpgid(process.pid) == number else []
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("qwen3"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("qwen2"), "qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def engine(folder):
    engine = start(folder)
    processes = [process for process in descendants() if "resource_tracker" not in " ".join(process.cmdline())]
    assert processes
    yield engine
    engine.close()
    assert not alive(processes)


@pytest.fixture
def generator(engine, model):
    engine.update_weights(iter_model(model), 1)
    return engine


@pytest.fixture
def wide_generator(generator):
    return generator


@needs_vllm
class TestContract(VllmTests):
    def test_large_weights_are_sent_in_parts(self, generator, model, prompts, monkeypatch):
        monkeypatch.setattr("limbeck.rollout.vllm_process._PART_BYTES", 5000)
        assert len(list(generator.parts(iter_model(model)))) > 3
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        generator.update_weights(iter_model(model), 3)
        contract.check_log_probs(generator, model, prompts, contract.SETTINGS[0])


@needs_vllm
class TestSeveralEngines:
    def test_they_write_what_one_does_until_a_process_dies(self, engine, folder, model, prompts):
        second = start(folder, devices=[2, 3], arguments={"tensor_parallel_size": 2})
        engines = VllmEngines([engine, second], [0, 0])
        engines.update_weights(iter_model(model), 5)
        sampling = SamplingParams(12, n=2, seed=3)
        completions = engines.generate(prompts, sampling)
        assert [completion.prompt for completion in completions] == [prompt for prompt in prompts for _ in range(2)]
        assert contract.tokens(completions) == contract.tokens(engine.generate(prompts, sampling))
        assert {completion.version for completion in completions} == {5}

        worker = max(descendants(), key=lambda process: process.create_time())
        threading.Timer(1.0, worker.kill).start()
        with pytest.raises(
            LimbeckError, match=r"vLLM failed while it wrote \d+ completions.*A process of the engine has"
        ):
            second.generate(prompts, SamplingParams(200, n=200))
        with pytest.raises(LimbeckError, match="has failed or was ended"):
            engines.update_weights(iter_model(model), 6)
        second.close()


@needs_vllm
def test_a_worker_ends_with_the_process_of_its_trainer():
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    code = "import sys, time; from limbeck.rollout.vllm_worker import WorkerExtension\n"
    code += "WorkerExtension().end_with_process(int(sys.argv[1])); print('ready', flush=True); time.sleep(100)"
    worker = subprocess.Popen([sys.executable, "-c", code, str(trainer.pid)], stdout=subprocess.PIPE, text=True)
    assert any("ready" in line for line in worker.stdout)
    trainer.kill()
    assert worker.wait(20) == -signal.SIGKILL
    trainer.wait()


@needs_vllm
@pytest.mark.processes
class TestRuns:
    @pytest.mark.parametrize(
        ("ranks", "generator", "staleness"),
        [(1, "vllm", 1), (2, "hf", 0)],
        ids=["beside the training", "one engine for two ranks"],
    )
    def test_losses_are_those_of_a_generator_on_the_students_devices(
        self, alone, settings, tied, tmp_path, ranks, generator, staleness
    ):
        changes = {**writing(tied), "max_steps": 8, "rollout.max_staleness": staleness}
        expected = metrics(alone(**changes, **rows(4, 2), **{"rollout.generator": generator}), "train/loss")
        apart = {"student.device_mapping": list(range(ranks)), "rollout.device_mapping": [ranks]}
        config = settings(**changes, **rows(4, 2 // ranks), **apart, **{"rollout.generator": "vllm"})
        if ranks == 1:
            DistillPipeline(load_mapping(config).config).run()
        else:
            assert "Traceback" not in launch(config, tmp_path, ranks)
        assert len(expected) == 8
        assert metrics(tmp_path / "out", "train/loss") == pytest.approx(expected, rel=1e-4)

    def test_ctrl_c_reaches_the_training_only_which_ends_the_engine(self, settings, tied, tmp_path):
        config = tmp_path / "run.yaml"
        apart = {"student.device_mapping": [0], "rollout.generator": "vllm", "rollout.device_mapping": [1]}
        config.write_text(yaml.safe_dump(settings(**writing(tied), max_steps=5000, **apart)))
        command = [sys.executable, "-m", "limbeck", "train", str(config)]
        with (tmp_path / "printed").open("w") as printed:
            run = subprocess.Popen(command, start_new_session=True, stdout=printed, stderr=printed)
        while run.poll() is None and not (tmp_path / "out" / "metrics.jsonl").exists():
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        assert run.wait(120) == 128 + signal.SIGINT, (tmp_path / "printed").read_text()
        assert "Traceback" not in (tmp_path / "printed").read_text()
        assert list((tmp_path / "out").glob("checkpoint-*"))
        assert not alive(processes_of_group(run.pid))


@needs_vllm
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_are_sent_from_gpu_to_gpu(folder, prompts):
    model = contract.load(folder)
    generator = start(folder, device_type="cuda", arguments={"gpu_memory_utilization": 0.3})
    for version in (1, 2):
        generator.update_weights(((name, weight.cuda()) for name, weight in iter_model(model)), version)
        for completion in generator.generate(prompts, SamplingParams(12)):
            expected = contract.sampling_log_probs(model, completion.prompt, completion.token_ids, SamplingParams(12))
            chosen = expected.gather(-1, torch.tensor(completion.token_ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(completion.log_probs).double(), chosen, atol=0.05, rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5).add_(0.05)
    generator.close()

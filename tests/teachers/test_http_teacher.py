"""A teacher over another medium is one file: a channel, and a function that is registered as a teacher source."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights, metrics
from safetensors.torch import load, save

from limbeck import DistillPipeline
from limbeck.strategies.world import World
from limbeck.teachers import SignalSpec, TeacherRequest
from limbeck.teachers.local import load_local_teacher

PLUGIN = str(Path(__file__).with_name("http_teacher.py"))


@contextmanager
def serving(config):
    """A server of the teacher of ``config`` in a thread; yields its address and the paths of the requests."""
    teacher, paths = load_local_teacher(config, World(0, 1, torch.device("cpu"))), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            header = json.loads(self.headers["X-Header"])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            paths.append(self.path)
            content = getattr(self, self.path.strip("/"))(header, body)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def describe(self, header, body):
            info = teacher.info
            return json.dumps({"vocab_size": info.vocab_size, "num_parameters": info.num_parameters}).encode()

        def head(self, header, body):
            return save({"weight": teacher.model.head.weight.detach().clone()})

        def check(self, header, body):
            teacher.check(config, **header)
            return b""

        def respond(self, header, body):
            return save(teacher.encode(TeacherRequest.from_tensors(load(body), SignalSpec(**header))))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "changes", [{"student.use_sequence_packing": True}, {"logits_topk": 5}], ids=["hidden-states", "top-k"]
)
def test_a_teacher_behind_http_gives_the_losses_of_a_local_one(configure, tmp_path, changes):
    changes = {"max_steps": 4, **changes}
    DistillPipeline(configure(output_dir=str(tmp_path / "one"), **changes)).run()
    with serving(configure(**changes)) as (url, paths):
        remote = {"plugins": [PLUGIN], "teacher.source": "http", "teacher.source_kwargs": {"url": url}}
        DistillPipeline(configure(**changes, **remote)).run()
    for key in ("train/loss", "train/train_distill_loss", "student/grad_norm", "val/loss"):
        one, out = metrics(tmp_path / "one", key), metrics(tmp_path / "out", key)
        assert len(out) > 0 and out == one, key
    assert_same_weights(tmp_path / "one" / "student", tmp_path / "out" / "student")
    assert paths.count("/check") == 1
    assert paths.count("/head") == (0 if "logits_topk" in changes else 1)
    assert paths.count("/respond") == len(metrics(tmp_path / "out", "train/loss")) + 96 // 16

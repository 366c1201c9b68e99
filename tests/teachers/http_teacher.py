"""A teacher behind an HTTP server: ``teacher.source: http``, ``teacher.source_kwargs: {url: ...}``. No pickle is sent."""

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

from safetensors.torch import load, save

from limbeck.errors import LimbeckError
from limbeck.objectives import OutputHead
from limbeck.registry import TEACHERS
from limbeck.teachers import TeacherDescription, TeacherRequest, TeacherResponse, connect_channels


class HttpChannel:
    def __init__(self, url):
        self.url, self.thread = url, ThreadPoolExecutor(1)  # one thread keeps the order

    def describe(self):
        return TeacherDescription(**json.loads(self.post("describe")))

    def head(self):
        return OutputHead(**load(self.post("head")))

    def check(self, longest_row, largest_token):
        self.post("check", {"longest_row": longest_row, "largest_token": largest_token})

    def send(self, request):
        request = request or TeacherRequest.empty()
        body = self.thread.submit(self.post, "respond", vars(request.spec), save(request.tensors()))
        return lambda: TeacherResponse(load(body.result()), seconds=0.0)

    def offload(self):
        self.post("offload")

    def post(self, path, header=None, body=b""):
        return urlopen(Request(f"{self.url}/{path}", body, {"X-Header": json.dumps(header)})).read()


@TEACHERS.register("http")
def connect_over_http(context):
    url = context.config.teacher.source_kwargs.get("url")
    if url is None:
        raise LimbeckError("teacher.source = http needs teacher.source_kwargs.url; set it to the server's address.")
    return connect_channels(context, [HttpChannel(url)])

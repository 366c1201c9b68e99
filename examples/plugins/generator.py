"""A generator: greedy decoding with transformers. A step source gets it with ``GENERATORS.get("greedy")(config, world)``."""

import torch

from limbeck.models import ModelSource, load_model
from limbeck.registry import GENERATORS
from limbeck.rollout import Completion


class GreedyGenerator:
    def __init__(self, config, world):
        source = ModelSource.from_args(config.student.model_args, "student")
        self.model = load_model(source, torch.float32).to(world.device).eval()
        self.version = 0

    @torch.no_grad()
    def generate(self, prompts, sampling):
        completions = []
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids], device=self.model.device)
            out = self.model.generate(ids, do_sample=False, max_new_tokens=sampling.max_tokens)
            written = tuple(out[0, ids.shape[1] :].tolist())
            finished = len(written) < sampling.max_tokens
            completions += [Completion(prompt, written, None, finished, self.version)] * sampling.n
        return completions

    def update_weights(self, weights, version):
        self.model.load_state_dict(dict(weights))
        self.version = version

    def offload(self):
        self.model.to("cpu")

    def reload(self):
        """``generate`` runs where the model is."""


GENERATORS.register("greedy")(GreedyGenerator)

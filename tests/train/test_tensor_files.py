"""Boxes of tensors in any number of files are read back as any other boxes."""

import json
import random
import struct
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from limbeck import LimbeckError
from limbeck.strategies.shards import Shard, whole_box
from limbeck.train.tensor_files import fingerprint, open_shards, write_shards, write_tensors


def grid(shape: list[int], generator: random.Random) -> list[tuple[slice, ...]]:
    """Boxes that divide a tensor, by random cuts of every dimension."""
    boxes: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted({0, size, *(generator.randint(0, size) for _ in range(2))})
        boxes = [(*box, slice(*pair)) for box in boxes for pair in pairwise(cuts)]
    return boxes


def random_box(shape: list[int], generator: random.Random) -> tuple[slice, ...]:
    return tuple(slice(*sorted(generator.randint(0, size) for _ in range(2))) for size in shape)


def shard(tensor: torch.Tensor, box: tuple[slice, ...]) -> Shard:
    return Shard(tuple(tensor.shape), box, lambda: tensor[box])


def test_any_box_is_read_from_any_division_into_files(tmp_path):
    generator = random.Random(0)
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        shape = [generator.randint(1, 5) for _ in range(generator.randint(0, 3))]
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        files: list[list[Shard]] = [[], [], []]
        for box in grid(shape, generator):
            generator.choice(files).append(shard(tensor, box))
        for i, parts in enumerate(files):
            path = folder / f"{i}.safetensors"
            assert write_shards(path, {"w": parts, "other": [shard(torch.ones(1), (slice(0, 1),))]}) == fingerprint(
                path
            )
        stored = open_shards(sorted(folder.iterdir()))["w"]
        assert tuple(stored.shape) == tuple(shape)
        for box in [whole_box(shape), *(random_box(shape, generator) for _ in range(5))]:
            torch.testing.assert_close(stored[box], tensor[box], rtol=0, atol=0)


def test_a_tensor_that_is_incomplete_is_an_error(tmp_path):
    tensor = torch.arange(6.0).view(3, 2)
    write_shards(tmp_path / "a.safetensors", {"w": [shard(tensor, (slice(0, 2), slice(0, 2)))]})
    stored = open_shards([tmp_path / "a.safetensors"])["w"]
    torch.testing.assert_close(stored[slice(1, 2), slice(0, 2)], tensor[1:2])
    with pytest.raises(LimbeckError, match="does not have all of w"):
        stored[whole_box((3, 2))]


def test_a_file_is_what_safetensors_reads_with_aligned_tensors(tmp_path):
    tensors = {
        str(i): torch.arange(-3, 4).to(dtype)
        for i, dtype in enumerate(
            (
                torch.float64,
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int8,
                torch.bool,
            )
        )
    }
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "sliced": torch.arange(12.0).view(3, 4).t()}
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].equal(tensor), name
    content = (tmp_path / "a.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size])["__metadata__"] == {"format": "pt"}

"""Tensors that lie in files."""

import os

import pytest
import safetensors.torch
import torch

import torchquant as tq
from torchquant.files.shelf import EmptyOnDisk, is_open, is_shelved, kept, shelf
from torchquant.files.tensors import write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float16, torch.int64])
def test_a_kept_tensor_is_the_same_and_leaves_no_file(tmp_path, dtype):
    value = torch.randn(128, 300).mul(50).to(dtype).t()
    with shelf(tmp_path):
        assert is_open()
        shelved = kept(value)
        assert is_shelved(shelved)
        assert kept(shelved) is shelved
        assert os.listdir(tmp_path) == []
    assert not is_open()
    assert (shelved.dtype, shelved.shape) == (value.dtype, value.shape)
    assert torch.equal(shelved, value)
    assert shelved.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


def test_little_tensors_and_tensors_beside_no_shelf_stay_as_they_are(tmp_path):
    large = torch.zeros(10000)
    assert kept(large) is large
    with shelf(tmp_path):
        small = torch.zeros(3)
        assert kept(small) is small


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(tq.ArtifactError, match="nothing can be written into /nowhere"), shelf("/nowhere"):
        pass


def test_empty_tensors_on_disk_take_none_of_it_and_can_be_written(tmp_path):
    with EmptyOnDisk(tmp_path):
        model = torch.nn.utils.skip_init(torch.nn.Linear, 1 << 15, 1 << 15)  # 4 GiB
        small = torch.empty(4)
    free = os.statvfs(tmp_path)
    assert model.weight.shape == (1 << 15, 1 << 15)
    assert os.listdir(tmp_path) == []
    with torch.no_grad():
        model.weight[7, 3] = 2.5
    assert float(model.weight[7].sum()) == 2.5
    assert (free.f_bavail - os.statvfs(tmp_path).f_bavail) * free.f_frsize < 1 << 30
    assert small.shape == (4,)


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    values = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "none": torch.empty(0, 3),
        "words": torch.arange(5, dtype=torch.int32),
        "number": torch.tensor(3, dtype=torch.int64),
    }
    write_tensors(tmp_path / "a.safetensors", values, {"format": "pt"})
    back = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert back.keys() == values.keys()
    assert all(torch.equal(back[n], v) and back[n].dtype == v.dtype for n, v in values.items())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

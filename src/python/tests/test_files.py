"""Files: our own format, and those of torch, compressed-tensors and torch.nn.utils.prune."""

import json
import struct

import numpy as np
import pytest
import sparse24
from conftest import VECTORS, read_safetensors

RNG = np.random.default_rng(24)


def test_a_file_comes_back_as_it_was(tmp_path):
    s = sparse24.compress(sparse24.prune(RNG.standard_normal((64, 32)).astype(np.float32), vector=8))
    tensors = {
        "up.weight": s,
        "bias": RNG.standard_normal(5).astype(np.float16),
        "big": np.arange(6).reshape(1, 2, 3).astype(">i4"),
        "scalar": np.float64(0.5),
        "flags": np.array([True, False]),
        "nothing": np.empty((0, 3), np.int64),
        "strided": np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::-2],
    }
    path = tmp_path / "model.safetensors"
    sparse24.save_file(tensors, path, metadata={"who": "a test"})
    # By nothing of ours.
    file = read_safetensors(path)
    assert file["up.weight.values"][0] == "F32" and file["up.weight.meta"][0] == "U32"
    loaded = sparse24.load_file(path)
    assert list(loaded) == sorted(tensors)
    assert loaded["up.weight"] == s and loaded["up.weight"].vector == 8
    for name, tensor in tensors.items():
        if name == "up.weight":
            continue
        tensor = np.asarray(tensor)
        assert loaded[name].dtype == tensor.dtype.newbyteorder("=") and loaded[name].shape == tensor.shape, name
        np.testing.assert_array_equal(loaded[name], tensor)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"]["who"] == "a test" and header["__metadata__"]["up.weight.vector"] == "8"


@pytest.mark.parametrize("layout", ["native", "dense", "bitmask", "cutlass"])
def test_every_layout_is_read_back(tmp_path, layout):
    pruned = sparse24.prune(RNG.standard_normal((64, 64)).astype(np.float16), vector=4)
    path = tmp_path / "m.safetensors"
    sparse24.save_file({"a.weight": sparse24.compress(pruned)}, path, layout)
    back = sparse24.load_file(path)["a.weight"]
    if layout == "dense":
        np.testing.assert_array_equal(back, pruned)
    else:
        assert back == sparse24.compress(pruned)


def test_folders_of_compressed_tensors_are_read(tmp_path):
    for name, compressed in [("ct_ckpt_sparse24_f16", True), ("ct_ckpt_bitmask_f16", False)]:
        expected = read_safetensors(VECTORS / name / "dense_expected.safetensors")
        loaded = sparse24.load_file(VECTORS / name)
        assert set(loaded) == set(expected)
        for tensor, (_, numbers) in expected.items():
            got = loaded[tensor]
            assert isinstance(got, sparse24.Sparse24) == (compressed and tensor in ("up.weight", "down.weight"))
            np.testing.assert_array_equal(got.decompress() if isinstance(got, sparse24.Sparse24) else got, numbers)


def test_masks_of_torch_are_applied():
    loaded = sparse24.load_file(VECTORS / "prune_with_mask.safetensors")
    expected = read_safetensors(VECTORS / "prune_removed.safetensors")
    assert set(loaded) == set(expected)
    for name, (_, numbers) in expected.items():
        np.testing.assert_array_equal(loaded[name] + 0, numbers + 0)


def test_bfloat16_needs_ml_dtypes(monkeypatch):
    pytest.importorskip("ml_dtypes", reason="numpy's bfloat16 is of the package ml_dtypes")
    import sys

    loaded = sparse24.load_file(VECTORS / "matrix_bf16_32x64.safetensors")
    assert loaded["dense"].dtype.name == "bfloat16"
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="install ml_dtypes"):
        sparse24.load_file(VECTORS / "matrix_bf16_32x64.safetensors")


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sparse24.load_file(tmp_path / "nowhere.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="bad.safetensors: not a safetensors file"):
        sparse24.load_file(bad)
    with pytest.raises(ValueError, match="framework 'jax' is not one of numpy, torch"):
        sparse24.load_file(bad, "jax")
    with pytest.raises(TypeError):
        sparse24.load_file(1.5)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "m.safetensors"
    sparse24.save_file({"a": np.zeros(1, np.float32)}, path)
    before = path.read_bytes()
    s = sparse24.compress(np.eye(4, dtype=np.float32))
    for tensors, layout, error, message in [
        ({"a": [1.0]}, "native", TypeError, "a is a list"),
        ({"a": np.array(["x"])}, "native", TypeError, "which safetensors does not have"),
        ({1: np.zeros(1)}, "native", TypeError, "a tensor is called 1"),
        ({"a": s}, "cutlass", ValueError, "a: 4 x 4 F32: the layout cutlass takes F16"),
        ({"a": s, "a.values": np.zeros(1, np.float32)}, "native", ValueError, "a.values: the name is taken"),
        ({"a": s}, "best", ValueError, "layout"),
    ]:
        with pytest.raises(error, match=message):
            sparse24.save_file(tensors, path, layout)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with pytest.raises((OSError, ValueError)):
        sparse24.save_file({"a": s}, tmp_path / "no folder" / "m.safetensors")

"""Every way in which an array may lie in memory, and those that are refused."""

import array

import numpy as np
import pytest
import sparse24

RNG = np.random.default_rng(24)
W = RNG.standard_normal((16, 24)).astype(np.float32)
EXPECTED = sparse24.prune(W)


def strided(w):
    wide = np.zeros((w.shape[0] * 2, w.shape[1] * 3), w.dtype)
    wide[::2, ::3] = w
    return wide[::2, ::3]


def read_only(w):
    w = w.copy()
    w.flags.writeable = False
    return w


class DLPackOnly:
    """An array of a library that is neither numpy nor torch."""

    def __init__(self, w):
        self.w = w

    def __dlpack__(self, **kwargs):
        return self.w.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.w.__dlpack_device__()


WAYS = {
    "contiguous": lambda w: w,
    "fortran": np.asfortranarray,
    "strided": strided,
    "negative strides": lambda w: np.ascontiguousarray(w[::-1, ::-1])[::-1, ::-1],
    "big-endian": lambda w: w.astype(w.dtype.newbyteorder(">")),
    "little-endian": lambda w: w.astype(w.dtype.newbyteorder("<")),
    "read-only": read_only,
    "unaligned": lambda w: np.frombuffer(b"?" + w.tobytes(), w.dtype, offset=1).reshape(w.shape),
    "subclass": lambda w: w.view(np.matrix),
    "DLPack": lambda w: DLPackOnly(w.copy()),
    "buffer": lambda w: memoryview(w),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_same_numbers_in_any_memory_are_the_same_matrix(way, dtype):
    w = W.astype(dtype)
    given = WAYS[way](w)
    before = np.array(w)
    pruned = sparse24.prune(given)
    assert type(pruned) is np.ndarray and pruned.dtype == dtype and pruned.flags.c_contiguous
    np.testing.assert_array_equal(pruned, sparse24.prune(w))
    np.testing.assert_array_equal(w, before)
    compressed = sparse24.compress(WAYS[way](pruned))
    assert compressed == sparse24.compress(pruned)
    layer = sparse24.Linear(WAYS[way](w), device="cpu")
    x = RNG.standard_normal((3, 24)).astype(dtype)
    np.testing.assert_array_equal(layer(WAYS[way](x)), layer(x))


def test_what_comes_back_is_new_memory_that_can_be_written_to():
    pruned = sparse24.prune(W)
    assert pruned.flags.writeable and not np.shares_memory(pruned, W)
    pruned[:] = 0
    np.testing.assert_array_equal(sparse24.prune(W), EXPECTED)


def test_bfloat16_of_ml_dtypes_stays_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="numpy's bfloat16 is of the package ml_dtypes")
    w = W.astype(ml_dtypes.bfloat16)
    pruned = sparse24.prune(w)
    assert pruned.dtype == ml_dtypes.bfloat16
    kept = pruned != 0
    np.testing.assert_array_equal(pruned[kept], w[kept])
    s = sparse24.compress(pruned)
    assert s.dtype == "bfloat16" and s.values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(sparse24.decompress(s), pruned)
    y = sparse24.Linear(s, device="cpu")(np.ones((2, 24), ml_dtypes.bfloat16))
    assert y.dtype == ml_dtypes.bfloat16
    expected = pruned.astype(np.float64).sum(1)
    np.testing.assert_allclose(y[0].astype(np.float64), expected, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dtype", ["float64", "int8", "int64", "uint16", "bool", "complex64", "object", "U1"])
def test_other_types_are_named(dtype):
    with pytest.raises(TypeError, match="w is of .*, expected float32, float16 or bfloat16"):
        sparse24.prune(np.zeros((4, 4), dtype))


def test_a_structured_array_is_refused():
    with pytest.raises(TypeError, match="expected float32"):
        sparse24.prune(np.zeros((4, 4), [("a", np.float32)]))


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_other_dimensions_are_named(dims):
    with pytest.raises(ValueError, match=f"w has {dims} dimensions, expected 2"):
        sparse24.prune(np.zeros((4,) * dims, np.float32))


def test_a_scalar_is_no_matrix():
    with pytest.raises(ValueError, match="0 dimensions"):
        sparse24.prune(np.float32(1))
    with pytest.raises(TypeError, match="w is a float"):
        sparse24.prune(1.0)


@pytest.mark.parametrize("given", [[[1.0, 2.0, 3.0, 4.0]], ((1.0,),), "text", b"bytes", None, object()])
def test_what_is_no_array_is_refused(given):
    with pytest.raises(TypeError, match="w is a .*, expected an array of numpy or torch"):
        sparse24.prune(given)


def test_a_huge_list_is_refused_without_a_look_at_it():
    with pytest.raises(TypeError, match="w is a list"):
        sparse24.prune([[0.0] * 4] * 10_000_000)


def test_a_mask_is_not_lost():
    with pytest.raises(TypeError, match="masked array"):
        sparse24.prune(np.ma.masked_array(W, W > 0))


def test_a_flat_buffer_has_the_wrong_shape():
    with pytest.raises(ValueError, match="1 dimensions"):
        sparse24.prune(array.array("f", [1, 2, 3, 4]))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (1, 1), (3, 5)])
def test_matrices_of_any_size_go_through(shape):
    w = RNG.standard_normal(shape).astype(np.float32)
    pruned = sparse24.prune(w)
    assert pruned.shape == shape
    s = sparse24.compress(pruned)
    assert s.shape == shape
    np.testing.assert_array_equal(s.decompress(), pruned)

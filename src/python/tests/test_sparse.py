"""Pruning by its definition, and the format against files that torch and compressed-tensors wrote."""

import pickle

import numpy as np
import pytest
import sparse24
from conftest import VECTORS, read_safetensors, two_of_four

RNG = np.random.default_rng(24)


@pytest.mark.parametrize("vector", [1, 2, 8, 32, 128])
@pytest.mark.parametrize("shape", [(128, 64), (37, 26)])
def test_magnitude_keeps_the_two_largest_of_four(vector, shape):
    w = RNG.standard_normal(shape).astype(np.float32)
    mask = two_of_four(w, vector)
    np.testing.assert_array_equal(sparse24.prune(w, vector=vector), np.where(mask, w, 0))
    np.testing.assert_array_equal(sparse24.prune(w, f"{vector}:2:4"), np.where(mask, w, 0))


def test_zeros_stay_zero_and_what_is_2_4_stays():
    w = RNG.standard_normal((8, 32)).astype(np.float32)
    once = sparse24.prune(w)
    np.testing.assert_array_equal(sparse24.prune(once), once)
    w[:, ::4] = 0
    assert not sparse24.prune(w, method="random")[:, ::4].any()


def test_methods_that_need_inputs_use_them():
    # One input is large, so that weights beside it are worth nothing.
    w = np.array([[3.0, 2.0, 1.0, 0.5]], np.float32)
    x = np.array([[0.01, 0.01, 9.0, 9.0]], np.float32)
    np.testing.assert_array_equal(sparse24.prune(w), [[3, 2, 0, 0]])
    np.testing.assert_array_equal(sparse24.prune(w, method="wanda", inputs=x), [[0, 0, 1, 0.5]])
    for method in ["wanda", "obd", "sparsegpt"]:
        with pytest.raises(ValueError, match=f"{method} needs statistics of the layer's inputs"):
            sparse24.prune(w, method=method)
        with pytest.raises(ValueError, match="inputs have 3 features, the weights 4"):
            sparse24.prune(w, method=method, inputs=np.ones((2, 3), np.float32))


def test_sparsegpt_loses_less_of_the_output_than_magnitude():
    w = RNG.standard_normal((32, 64)).astype(np.float32)
    # Inputs that hang together, which is what compensation is for.
    x = (RNG.standard_normal((256, 8)) @ RNG.standard_normal((8, 64)) + 0.3 * RNG.standard_normal((256, 64))).astype(
        np.float32
    )
    lost = {}
    for method in ["magnitude", "sparsegpt"]:
        pruned = sparse24.prune(w, method=method, inputs=x)
        assert (np.count_nonzero(pruned.reshape(32, 16, 4), axis=2) <= 2).all()
        lost[method] = np.linalg.norm(x @ (w - pruned).T) / np.linalg.norm(x @ w.T)
    assert lost["sparsegpt"] < 0.7 * lost["magnitude"], lost


def test_random_is_a_function_of_its_seed():
    w = RNG.standard_normal((8, 32)).astype(np.float32)
    draw = lambda seed: sparse24.prune(w, method="random", seed=seed)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vector": 3}, "vector length 3 is not one of"),
        ({"vector": 0}, "vector length 0"),
        ({"pattern": "1:4"}, "pattern '1:4' is not 2:4 or V:2:4"),
        ({"pattern": "x:2:4"}, "pattern 'x:2:4' is not"),
        ({"pattern": "8:2:4", "vector": 4}, "both say how many rows"),
        ({"method": "best"}, 'method "best" is not one of magnitude'),
    ],
)
def test_what_is_asked_for_and_is_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse24.prune(np.zeros((4, 4), np.float32), **arguments)


def test_arguments_of_other_types_are_type_errors():
    w = np.zeros((4, 4), np.float32)
    for arguments in [{"vector": "8"}, {"vector": 1.5}, {"seed": "x"}, {"method": 1}]:
        with pytest.raises(TypeError):
            sparse24.prune(w, **arguments)
    with pytest.raises(OverflowError):
        sparse24.prune(w, vector=-1)
    with pytest.raises(TypeError, match="expected a Sparse24, not a ndarray"):
        sparse24.decompress(w)


def test_a_nan_is_named_by_its_place():
    w = np.ones((4, 8), np.float32)
    w[2, 5] = np.nan
    with pytest.raises(ValueError, match="row 2, column 5 is NaN"):
        sparse24.prune(w)


def test_what_is_not_2_4_is_named_by_its_place():
    w = np.zeros((4, 8), np.float32)
    w[3, 4:7] = 1
    with pytest.raises(ValueError, match=r"row 3, group 1 \(columns 4..8\): 3 positions"):
        sparse24.compress(w)


def test_compress_finds_the_widest_pattern_unless_told():
    w = sparse24.prune(RNG.standard_normal((64, 64)).astype(np.float32), vector=16)
    assert (sparse24.compress(w).vector, sparse24.compress(w, 4).vector) == (16, 4)
    s = sparse24.compress(w, 2)
    assert s.with_vector(1).vector == 1 and s.with_vector().vector == 16
    np.testing.assert_array_equal(s.with_vector().decompress(), w)
    with pytest.raises(ValueError):
        s.with_vector(128)


def test_the_parts_are_those_of_the_specification():
    # The worked example of the crate's format.
    w = np.array([[1, 0, 0, 2, 3, 4, 0, 0, 5, 0, 0, 6, 7, 0, 8, 0]], np.float32)
    s = sparse24.compress(w)
    np.testing.assert_array_equal(s.meta, np.array([[0x8C4C]], np.uint32))
    np.testing.assert_array_equal(s.values, [[1, 2, 3, 4, 5, 6, 7, 8]])
    assert (s.shape, s.dtype, s.nbytes) == ((1, 16), "float32", 8 * 4 + 4)
    again = sparse24.Sparse24(s.values, s.meta, s.shape, s.vector)
    assert again == s and again is not s
    other = sparse24.Sparse24(s.values + 1, s.meta, s.shape)
    assert other != s and s != "something else"
    assert repr(s) == f"<sparse24.Sparse24 1 x 16, float32, V={s.vector}, 36 bytes>"
    with pytest.raises(TypeError):
        hash(s)


def test_parts_that_are_not_legal_are_refused():
    s = sparse24.compress(np.eye(4, dtype=np.float32), 1)
    with pytest.raises(ValueError, match="code 0x0 is not one of"):
        sparse24.Sparse24(s.values, np.zeros_like(s.meta), s.shape)
    with pytest.raises(ValueError, match="values has shape"):
        sparse24.Sparse24(s.values[:3], s.meta, s.shape)
    with pytest.raises(TypeError, match="meta is of float32"):
        sparse24.Sparse24(s.values, s.meta.astype(np.float32), s.shape)
    # The other byte order is the same words.
    assert sparse24.Sparse24(s.values, s.meta.astype(">u4"), s.shape) == s


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_matrix_is_pickled_with_its_vector_length(protocol):
    for dtype in [np.float32, np.float16]:
        s = sparse24.compress(sparse24.prune(RNG.standard_normal((64, 40)).astype(dtype), vector=8))
        again = pickle.loads(pickle.dumps(s, protocol))
        assert again == s and again.vector == 8 and again.dtype == s.dtype


@pytest.mark.parametrize("name", ["matrix_f16_64x128", "matrix_bf16_32x64", "edge_le2_f16_32x64"])
def test_layouts_of_torch_and_compressed_tensors_go_in_and_out_without_loss(name):
    pytest.importorskip("ml_dtypes", reason="numpy's bfloat16 is of the package ml_dtypes")
    import ml_dtypes

    file = read_safetensors(VECTORS / f"{name}.safetensors")

    def tensor(key):
        dtype, numbers = file[key]
        return numbers.view(ml_dtypes.bfloat16) if dtype == "BF16" else numbers

    pruned = tensor("pruned24")
    cutlass = {"values": tensor("cutlass.values"), "meta": tensor("cutlass.meta")}
    bitmask = {part: tensor(f"ct24.layer.{part}") for part in ("compressed", "bitmask", "shape")}
    for layout, given in [("cutlass", cutlass), ("bitmask", bitmask)]:
        s = sparse24.Sparse24.from_layout(layout, given)
        assert s.shape == pruned.shape
        # -0.0 is zero in the format.
        np.testing.assert_array_equal(s.decompress() + 0, pruned + 0)
        back = s.to_layout(layout)
        assert list(back) == list(given)
        for part, numbers in given.items():
            assert back[part].dtype == numbers.dtype and back[part].shape == numbers.shape, part
            assert back[part].tobytes() == np.ascontiguousarray(numbers).tobytes(), part
        # From one to the other.
        other = "bitmask" if layout == "cutlass" else "cutlass"
        np.testing.assert_array_equal(
            sparse24.Sparse24.from_layout(other, s.to_layout(other)).decompress(), s.decompress()
        )


def test_native_and_dense_layouts_come_back():
    s = sparse24.compress(sparse24.prune(RNG.standard_normal((36, 30)).astype(np.float32), vector=4))
    for layout in ["native", "dense"]:
        again = sparse24.Sparse24.from_layout(layout, s.to_layout(layout), s.shape, s.vector)
        np.testing.assert_array_equal(again.decompress(), s.decompress())
        assert again.vector == s.vector


def test_layouts_that_do_not_fit_are_refused():
    s = sparse24.compress(sparse24.prune(RNG.standard_normal((8, 16)).astype(np.float16)))
    with pytest.raises(ValueError, match="the layout cutlass takes multiples of 32 x 32"):
        s.to_layout("cutlass")
    with pytest.raises(ValueError, match='layout "best" is not native'):
        s.to_layout("best")
    with pytest.raises(ValueError, match="layout 'best' is not native"):
        sparse24.Sparse24.from_layout("best", {})
    parts = s.to_layout("bitmask")
    with pytest.raises(ValueError, match="has a tensor 'bitmask', which is not given"):
        sparse24.Sparse24.from_layout("bitmask", {"compressed": parts["compressed"]})
    with pytest.raises(ValueError, match="bytes of bitmask has shape"):
        sparse24.Sparse24.from_layout("bitmask", {**parts, "bitmask": parts["bitmask"][:4]})
    with pytest.raises(ValueError, match="bits are set, expected 2|positions are non-zero"):
        sparse24.Sparse24.from_layout("bitmask", {**parts, "bitmask": parts["bitmask"] ^ np.uint8(1)})
    with pytest.raises(TypeError, match="bitmask is of float32, expected integers"):
        sparse24.Sparse24.from_layout("bitmask", {**parts, "bitmask": parts["bitmask"].astype(np.float32)})

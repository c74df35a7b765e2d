"""Layers against products in float64."""

import math
import pickle
import threading

import numpy as np
import pytest
import sparse24

RNG = np.random.default_rng(24)

ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def close(y, x, w, bias=None, activation=None):
    """Whether y is the product within the round-off of its type and of float32's sums."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    exact = x @ w.T
    bound = np.abs(x) @ np.abs(w.T) * w.shape[1] * 2.0**-23
    if bias is not None:
        exact, bound = exact + bias.astype(np.float64), bound + np.abs(bias) * 2.0**-23
    exact = ACTIVATIONS[activation](exact)
    bound = 1.2 * bound + np.abs(exact) * np.finfo(y.dtype).eps + 1e-6
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= bound).all(), np.abs(y - exact).max()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("vector", [None, 1, 32])
def test_a_layer_is_the_product_of_its_weights(activation, dtype, vector):
    w = (RNG.standard_normal((72, 40)) * 0.3).astype(dtype)
    bias = RNG.standard_normal(72).astype(dtype)
    if vector is not None:
        w = sparse24.prune(w, vector=vector)
    given = w if vector is None else sparse24.compress(w, vector)
    layer = sparse24.Linear(given, bias, activation, device="cpu", dense_fallback=False)
    assert (layer.in_features, layer.out_features, layer.dtype) == (40, 72, np.dtype(dtype).name)
    # One token and several, again and again: what was bound before must not show.
    for tokens in [1, 5, 1, 17, 3, 2, 5, 64]:
        x = RNG.standard_normal((tokens, 40)).astype(dtype)
        y = layer(x)
        assert y.dtype == dtype
        close(y, x, w, bias, activation)
    assert layer.nbytes > 0


def test_a_layer_takes_any_number_of_dimensions():
    w = RNG.standard_normal((6, 8)).astype(np.float32)
    layer = sparse24.Linear(w, device="cpu")
    x = RNG.standard_normal((2, 3, 5, 8)).astype(np.float32)
    y = layer(x)
    assert y.shape == (2, 3, 5, 6)
    np.testing.assert_array_equal(y.reshape(-1, 6), layer(x.reshape(-1, 8)))
    np.testing.assert_array_equal(layer(x[0, 0, 0]), layer(x[0, 0, :1])[0])
    assert layer(np.empty((0, 8), np.float32)).shape == (0, 6)
    assert layer(np.empty((2, 0, 8), np.float32)).shape == (2, 0, 6)


def test_what_does_not_fit_a_layer_is_refused():
    w = RNG.standard_normal((6, 8)).astype(np.float32)
    layer = sparse24.Linear(w, device="cpu")
    with pytest.raises(ValueError, match="x has 7 features, the layer takes 8"):
        layer(np.zeros((1, 7), np.float32))
    with pytest.raises(ValueError, match="x has 0 dimensions"):
        layer(np.float32(1) * np.ones((), np.float32))
    with pytest.raises(TypeError, match="x is a list"):
        layer([1.0] * 8)
    with pytest.raises(TypeError, match="f16"):
        layer(np.zeros((1, 8), np.float16))
    with pytest.raises(TypeError, match="f32"):
        sparse24.Linear(w.astype(np.float16), device="cpu")(np.zeros((1, 8), np.float32))
    with pytest.raises(ValueError, match="bias has 5 elements, the layer 6 outputs"):
        sparse24.Linear(w, np.zeros(5, np.float32), device="cpu")
    with pytest.raises(ValueError, match="bias has 2 dimensions"):
        sparse24.Linear(w, np.zeros((1, 6), np.float32), device="cpu")
    with pytest.raises(ValueError, match='activation "tanh" is not one of'):
        sparse24.Linear(w, activation="tanh", device="cpu")
    with pytest.raises(ValueError, match='no device matches "no such GPU"; there are: auto, cpu'):
        sparse24.Linear(w, device="no such GPU")
    with pytest.raises(TypeError, match="device is a int"):
        sparse24.Linear(w, device=0)


def test_the_plan_is_explained():
    s = sparse24.compress(sparse24.prune(RNG.standard_normal((64, 64)).astype(np.float32)))
    layer = sparse24.Linear(s, device="cpu", dense_fallback=False)
    assert "sparse24" in layer.explain(8) or "2:4" in layer.explain(8)


def test_a_layer_is_pickled_with_all_that_it_has():
    s = sparse24.compress(sparse24.prune(RNG.standard_normal((64, 32)).astype(np.float32)))
    bias = RNG.standard_normal(64).astype(np.float32)
    layer = sparse24.Linear(s, bias, "silu", device=sparse24.Device("cpu", threads=1), dense_fallback=False)
    again = pickle.loads(pickle.dumps(layer))
    x = RNG.standard_normal((4, 32)).astype(np.float32)
    np.testing.assert_array_equal(again(x), layer(x))
    assert repr(again) == "<sparse24.Linear 32 -> 64, silu>"


def test_threads_may_share_a_layer():
    w = RNG.standard_normal((64, 64)).astype(np.float32)
    layer = sparse24.Linear(w, device="cpu")
    inputs = [RNG.standard_normal((1 + i % 6, 64)).astype(np.float32) for i in range(12)]
    expected = [layer(x) for x in inputs]
    wrong = []

    def work(seed):
        order = np.random.default_rng(seed).permutation(len(inputs))
        for i in list(order) * 20:
            if not np.array_equal(layer(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_a_device_says_what_it_is():
    device = sparse24.Device("cpu", threads=1)
    assert (device.kind, device.threads) == ("cpu", 1) and device.name in repr(device)
    again = pickle.loads(pickle.dumps(device))
    assert (again.kind, again.threads) == ("cpu", 1)
    assert sparse24.devices()[0] == {"name": "cpu", "kind": "cpu"}
    for threads in [0, 1025]:
        with pytest.raises(ValueError, match="threads is not a number from 1 to 1024"):
            sparse24.Device("cpu", threads=threads)
    assert sparse24.Device().kind in {"cpu", "discrete", "integrated", "virtual", "other"}

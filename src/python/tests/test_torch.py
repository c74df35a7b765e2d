"""torch: tensors in and out, layers of modules, layouts."""

import copy
import io
import pickle

import numpy as np
import pytest
import sparse24
from conftest import VECTORS, two_of_four

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch")
import sparse24.torch as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrize, prune  # noqa: E402

torch.manual_seed(24)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_in_are_tensors_out(dtype):
    w = torch.randn(64, 32, dtype=dtype)
    pruned = sparse24.prune(w, vector=8)
    assert isinstance(pruned, torch.Tensor) and pruned.dtype is dtype
    mask = torch.from_numpy(two_of_four(w.float().numpy(), 8))
    assert torch.equal(pruned, torch.where(mask, w, torch.zeros((), dtype=dtype)))
    s = sparse24.compress(pruned)
    assert s.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(sparse24.decompress(s, "torch"), pruned)
    layer = sparse24.Linear(s, torch.ones(64, dtype=dtype), device="cpu")
    x = torch.randn(2, 3, 32, dtype=dtype)
    y = layer(x)
    expected = x.double() @ pruned.double().T + 1
    assert y.dtype is dtype and torch.allclose(
        y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4 + torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    "way",
    [
        lambda w: w.clone().requires_grad_(),
        lambda w: w.T.contiguous().T,
        lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
        nn.Parameter,
        lambda w: w[:, None].expand(-1, 2, -1)[:, 1],
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_any_strides(way, dtype):
    w = torch.randn(16, 24, dtype=dtype)
    pruned = sparse24.prune(way(w))
    assert torch.equal(pruned, sparse24.prune(w)) and not pruned.requires_grad


def test_tensors_elsewhere_are_refused():
    with pytest.raises(TypeError, match=r"w is on meta, expected a tensor on the CPU: use w.cpu\(\)"):
        sparse24.prune(torch.zeros(4, 4, device="meta"))
    with pytest.raises(TypeError, match="layout torch.sparse_coo"):
        sparse24.prune(torch.eye(4).to_sparse())
    with pytest.raises(TypeError, match="w is of float64"):
        sparse24.prune(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="w has 0 dimensions"):
        sparse24.prune(torch.tensor(1.0))


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(48, 64, dtype=dtype), nn.GELU(), nn.Linear(64, 40, bias=False, dtype=dtype)).eval()


def reference(module, x, vector=1):
    """The module with weights masked by the definition."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= torch.from_numpy(two_of_four(layer.weight.float().numpy(), vector))
        return other(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vector", [1, 8])
def test_a_module_gets_2_4_layers(dtype, vector):
    module, x = model(dtype), torch.randn(5, 48, dtype=dtype)
    expected = reference(module, x, vector)
    assert st.sparsify_(module, vector=vector, device="cpu", dense_fallback=False) is module
    assert [type(m).__name__ for m in module] == ["SparseLinear", "GELU", "SparseLinear"]
    assert not module[0].training and module[0].vector >= vector
    with torch.inference_mode():
        tolerance = 1e-5 if dtype is torch.float32 else 0.05
        assert torch.allclose(module(x), expected, atol=tolerance)
    assert "in_features=48, out_features=64, bias=True, V=" in repr(module)


def test_there_is_no_gradient_and_it_says_so():
    module = st.sparsify_(model(), device="cpu")
    with pytest.raises(RuntimeError, match="no gradient"):
        module(torch.randn(1, 48, requires_grad=True))
    assert not module(torch.randn(1, 48)).requires_grad


def test_layers_are_chosen_by_name():
    module = st.sparsify_(model(), include="*", exclude=["2"], device="cpu")
    assert isinstance(module[0], st.SparseLinear) and isinstance(module[2], nn.Linear)
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match="no torch.nn.Linear of the module is selected"):
        st.sparsify_(module, include="nothing")
    assert repr(before) == repr(module)
    alone = st.sparsify_(nn.Linear(8, 8), device="cpu")
    assert isinstance(alone, st.SparseLinear)


def test_shared_weights_and_attention_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.own = nn.Embedding(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 16)
            self.head.weight = self.embed.weight
            self.attention = nn.MultiheadAttention(16, 2)
            # One layer by two names: replaced at one of them it would go on dense at the other.
            self.first = nn.Linear(16, 16)
            self.second = nn.Sequential(self.first)

    module = st.sparsify_(Tied(), device="cpu")
    assert module.first is module.second[0] and isinstance(module.first, nn.Linear)
    assert isinstance(module.head, nn.Linear) and isinstance(module.own, st.SparseLinear)
    assert isinstance(module.attention.out_proj, nn.Linear)
    x = torch.randn(3, 1, 16)
    with torch.no_grad():
        module.attention(x, x, x)


def test_an_error_has_the_layers_name_and_changes_nothing():
    module = model()
    with torch.no_grad():
        module[2].weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="^2: weight at row 3, column 4 is NaN"):
        st.sparsify_(module, device="cpu")
    assert isinstance(module[0], nn.Linear)


def test_masks_of_torch_are_applied():
    module, x = model(), torch.randn(4, 48)
    for layer in (module[0], module[2]):
        mask = torch.from_numpy(two_of_four(torch.randn_like(layer.weight).numpy(), 1))
        prune.custom_from_mask(layer, "weight", mask)
    with torch.no_grad():
        expected = module(x)
    kept = (module[0].weight_orig * module[0].weight_mask).detach()
    st.sparsify_(module, device="cpu")
    assert torch.equal(module[0].weight, kept)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-5)


def test_parametrized_weights_are_computed():
    class Half(nn.Module):
        def forward(self, w):
            return w / 2

    module = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(module[0], "weight", Half())
    expected = sparse24.prune(module[0].weight.detach())
    st.sparsify_(module, device="cpu")
    assert torch.equal(module[0].weight, expected)


def test_methods_that_need_inputs_see_those_of_each_layer():
    torch.manual_seed(1)
    x = torch.randn(512, 6) @ torch.randn(6, 48) + 0.2 * torch.randn(512, 48)
    dense, lost = model(), {}
    with torch.no_grad():
        expected = dense(x)
        for method in ["magnitude", "sparsegpt"]:
            module = copy.deepcopy(dense)
            calibrate = None if method == "magnitude" else lambda m: m(x)
            st.sparsify_(module, method=method, calibrate=calibrate, device="cpu")
            lost[method] = (module(x) - expected).norm() / expected.norm()
    assert lost["sparsegpt"] < 0.8 * lost["magnitude"], lost
    with pytest.raises(ValueError, match="0: method wanda|0: wanda needs statistics"):
        st.sparsify_(model(), method="wanda", device="cpu")


def test_states_copies_and_pickles():
    module, other = (st.sparsify_(model(), vector=4, device="cpu") for _ in range(2))
    x = torch.randn(3, 48)
    with torch.no_grad():
        y = module(x)
        assert not torch.equal(other(x), y)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), y), "what was loaded is used"
        assert torch.equal(copy.deepcopy(module)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        again = st.sparsify_(model(), vector=4, device="cpu")
        again.load_state_dict(torch.load(file))
        assert torch.equal(again(x), y)
        halved = module.half()(x.half())
        assert halved.dtype is torch.float16 and torch.allclose(halved.float(), y, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_tensors_go_in_and_out_without_loss(dtype):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    dense = sparse24.prune(torch.randn(64, 128, dtype=dtype))
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    theirs = torch.sparse.SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)
    s = st.from_semi_structured(theirs)
    assert torch.equal(s.decompress("torch"), dense)
    ours = st.to_semi_structured(s)
    assert torch.equal(ours.packed, packed) and torch.equal(ours.meta, meta) and ours.meta.dtype is meta.dtype
    assert torch.equal(ours.to_dense(), dense)
    layer = nn.Linear(128, 64, bias=False, dtype=dtype)
    layer.weight = nn.Parameter(theirs, requires_grad=False)
    made = st.sparsify_(nn.Sequential(layer), device="cpu")
    assert torch.equal(made[0].weight, dense)
    with pytest.raises(TypeError, match="expected a SparseSemiStructuredTensor, not a Tensor"):
        st.from_semi_structured(dense)
    with pytest.raises(ValueError, match="the layout cutlass takes F16"):
        st.to_semi_structured(sparse24.compress(dense.float()))


def test_files_as_tensors(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5, dtype=torch.bfloat16), "scalar": torch.tensor(2.0), "bool": torch.tensor([True]),
        "ids": torch.arange(4), "empty": torch.empty(0, 2), "strided": torch.randn(4, 6).T,
        "w": sparse24.compress(sparse24.prune(torch.randn(32, 64, dtype=torch.bfloat16))),
    }  # fmt: skip
    sparse24.save_file(tensors, tmp_path / "m.safetensors", "cutlass")
    loaded = sparse24.load_file(tmp_path / "m.safetensors", "torch")
    assert loaded.pop("w") == tensors.pop("w")
    for name, tensor in tensors.items():
        assert loaded[name].dtype is tensor.dtype and torch.equal(loaded[name], tensor), name
    with pytest.raises(TypeError, match="expected a dense tensor on the CPU"):
        sparse24.save_file({"w": torch.zeros(1, device="meta")}, tmp_path / "n.safetensors")
    file = sparse24.load_file(VECTORS / "matrix_bf16_32x64.safetensors", "torch")
    assert file["dense"].dtype is torch.bfloat16


def test_embeddings_as_tensors_and_as_transformers_makes_them(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, device="cpu")
    embeddings = encoder.encode(["the cat sat", "dog"], convert_to_tensor=True)
    assert isinstance(embeddings, torch.Tensor) and embeddings.dtype is torch.float32
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.BertModel.from_pretrained(tiny_bert.folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        mean = model(torch.tensor([[2, 5, 6, 7, 3]])).last_hidden_state[0].mean(0)
    assert torch.allclose(embeddings[0], mean / mean.norm(), atol=2e-6)


def test_a_transformer_of_hugging_face_runs_2_4(tiny_bert):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.BertModel.from_pretrained(tiny_bert.folder, add_pooling_layer=False).eval()
    st.sparsify_(model, include="encoder.*", vector=8, device="cpu")
    with torch.no_grad():
        mean = model(torch.tensor([[2, 5, 6, 7, 3]])).last_hidden_state[0].mean(0)
    expected = sparse24.Encoder(tiny_bert.folder, "8:2:4", device="cpu").encode("the cat sat")
    np.testing.assert_allclose((mean / mean.norm()).numpy(), expected, atol=5e-6)

"""What autograd computes of a pruned BERT: the gradients of a loss such as retraining has.

python tests/vectors/gradients.py tests/vectors

Writes gradients.json and gradients.safetensors into the folder. Written with torch 2.15.0, transformers 5.24.0 and
safetensors 0.8.0, on a CPU.
"""

import json
import pathlib
import sys

import safetensors
import torch
import transformers
from safetensors.torch import save_file

out = pathlib.Path(sys.argv[1])

CONFIG = {
    "architectures": ["BertModel"],
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    # Large enough to be seen in the gradients.
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 16,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 40,
}
TEXTS = [[1, 17, 5, 38, 22, 9, 30, 5, 12, 26, 2], [1, 2], [1, 33, 8, 19, 14, 2]]
# A linear layer that is left dense, and the rows that share a pattern in the others of each block.
DENSE = "encoder.layer.1.attention.output.dense.weight"
VECTOR = {"0": 1, "1": 8}

random = torch.Generator().manual_seed(24)


def normal(*shape):
    return torch.randn(shape, generator=random, dtype=torch.float64)


def draw(model):
    """Gives a model parameters of 0.3, LayerNorm's factors about 1, all of them exact in f16."""
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        weights[name] = (0.3 * normal(*tensor.shape) + name.endswith("LayerNorm.weight")).half()
    model.load_state_dict(weights)


def keep(name, w):
    """What 2:4 keeps: of each four along the inputs the two that are largest, for all rows that share a pattern."""
    if not name.startswith("encoder.layer.") or w.dim() != 2 or name == DENSE:
        return torch.ones_like(w)
    vector = VECTOR[name.split(".")[2]]
    size = w.abs().reshape(w.shape[0] // vector, vector, -1, 4).sum(1, keepdim=True)
    mask = torch.zeros_like(size).scatter_(-1, size.topk(2).indices, 1)
    return mask.expand(-1, vector, -1, -1).reshape(w.shape)


def states(model):
    """By name, what comes out of both LayerNorms of each block, and the mean of the last states, of length 1."""
    found = {}
    norms = [(name, m) for name, m in model.named_modules() if name.startswith("encoder.") and name.endswith("Norm")]
    hooks = [m.register_forward_hook(lambda _, __, y, name=name: found.update({name: y})) for name, m in norms]
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    last = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    for hook in hooks:
        hook.remove()
    mean = (last * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return found, torch.nn.functional.normalize(mean, dim=1)


def gradients(model):
    """Every part of the loss and the loss itself, and the gradients of the encoder's parameters."""
    model.zero_grad()
    found, embeddings = states(model)
    losses = {}
    for i, (name, x) in enumerate(found.items()):
        target = targets[name].to(x.dtype)
        off = (x[real] - target).square().sum(1) / target.square().sum(1)
        # Each counts something else.
        losses[name] = 2.0**-i * off.mean()
    losses["embeddings"] = (embeddings * functional.to(embeddings.dtype)).sum()
    sum(losses.values()).backward()
    named = {name: p.grad * masks[name] for name, p in model.named_parameters() if name.startswith("encoder.")}
    return {name: loss.item() for name, loss in losses.items()}, named


real = torch.arange(max(map(len, TEXTS))) < torch.tensor([len(text) for text in TEXTS])[:, None]
model = transformers.BertModel(transformers.BertConfig(**CONFIG), add_pooling_layer=False).double().eval()
draw(model)
# As in retraining, the states should be those of the dense model.
with torch.no_grad():
    targets = {name: x[real].float() for name, x in states(model)[0].items()}
functional = normal(len(TEXTS), CONFIG["hidden_size"]).float()
masks = {name: keep(name, p.data) for name, p in model.named_parameters()}
for name, p in model.named_parameters():
    p.data *= masks[name]

tensors = {name: p.data.half() for name, p in model.named_parameters()}
losses, found = gradients(model)
tensors |= {f"gradient.{name}": g.float() for name, g in found.items()}
tensors |= {f"target.{name}": target for name, target in targets.items()} | {"functional": functional}
# By how much torch's own f32 is off, over the largest element of each gradient. The biases of keys have a gradient of 0.
in_f32 = gradients(model.float())[1]
off = {n: ((in_f32[n] - g).abs().max() / g.abs().max()).item() for n, g in found.items() if "key.bias" not in n}
tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
save_file(tensors, out / "gradients.safetensors", metadata={"format": "pt"})
parts = {
    "versions": {module.__name__: module.__version__ for module in (torch, transformers, safetensors)},
    "config": CONFIG,
    "texts": TEXTS,
    "weights": {name: 2.0**-i for i, name in enumerate(targets)},
    "losses": losses,
    "off_in_f32": max(off.values()),
}
(out / "gradients.json").write_text(json.dumps(parts, separators=(",", ":")) + "\n", encoding="utf-8")

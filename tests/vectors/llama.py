"""What torch computes with tiny models of Llama's kind: Llama, Mistral, Qwen2 and Qwen3, by every kind of rotary
positions that this crate reads.

python tests/vectors/llama.py tests/vectors

Writes llama.json (configs, texts and logits) and llama_tiny.safetensors into the folder.
"""

import functools
import json
import pathlib
import sys

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import save_file

(out,) = map(pathlib.Path, sys.argv[1:])

COMMON = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 26,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# What each model has beside the common fields.
MODELS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 1e4},
    "llama3": {"model_type": "llama", "head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "mistral": {"model_type": "mistral", "head_dim": 8, "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True, "num_key_value_heads": 1},
}


def numbers(tensor):
    return [float(f"{x:.8g}") for x in numpy.asarray(tensor).ravel().tolist()]


def weights_of(model, seed):
    """Weights of up to 0.4, norms' about 1, all of them exact in f16."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        values = 0.4 * (2 * torch.rand(tensor.shape, generator=random, dtype=torch.float64) - 1)
        weights[name] = (values + (1 if "norm" in name else 0)).half()
    return weights


random = torch.Generator().manual_seed(25)
draw = functools.partial(torch.randint, 0, 26, generator=random)
texts = [draw((length,)).tolist() for length in (1, 7, 40)]
models, stored = [], {}
for seed, (name, fields) in enumerate(MODELS.items()):
    config = COMMON | fields
    kind = {key: value for key, value in config.items() if key != "model_type"}
    # The library wants all of this in one place; the older fields are what checkpoints have.
    if "rope_theta" in kind:
        kind["rope_parameters"] = {"rope_type": "default", "rope_theta": kind.pop("rope_theta")}
    made = transformers.AutoConfig.for_model(config["model_type"], **kind)
    model = transformers.AutoModelForCausalLM.from_config(made)
    weights = weights_of(model, seed)
    if made.tie_word_embeddings:
        # It is the table of embeddings.
        del weights["lm_head.weight"]
    model.load_state_dict(weights, strict=not made.tie_word_embeddings)
    stored |= {f"{name}/{tensor}": values for tensor, values in weights.items()}
    model.double().eval()
    items = []
    for ids in texts:
        with torch.no_grad():
            items.append({"ids": ids, "logits": numbers(model(input_ids=torch.tensor([ids])).logits[0])})
    models.append({"name": name, "config": config, "items": items})

save_file(stored, out / "llama_tiny.safetensors", metadata={"format": "pt"})
modules = (torch, transformers, safetensors, numpy)
parts = {"versions": {module.__name__: module.__version__ for module in modules}, "models": models}
(out / "llama.json").write_text(json.dumps(parts, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

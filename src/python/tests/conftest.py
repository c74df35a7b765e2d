"""What tests share: folders of small models, a reader of safetensors, references in float64."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / "tests" / "vectors"

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", ".", "##s", "dog", "ran"]


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and numbers of each tensor, by nothing of ours; bfloat16 as its bits."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2", "U8": "u1", "I8": "i1", "I16": "<i2"}
    kinds |= {"I32": "<i4", "I64": "<i8", "U32": "<u4", "BOOL": "?"}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + at for at in entry["data_offsets"])
        numbers = np.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = (entry["dtype"], numbers)
    return tensors


def two_of_four(w: np.ndarray, vector: int = 1) -> np.ndarray:
    """Which weights magnitude keeps, by the definition: of each group the two of the largest sums over the rows."""
    m, k = w.shape
    mask = np.zeros((m, k), bool)
    for row in range(0, m, vector):
        for col in range(0, k, 4):
            block = np.abs(w[row : row + vector, col : col + 4].astype(np.float64)).sum(0)
            kept = np.argsort(-block, kind="stable")[:2]
            mask[row : row + vector, col + kept] = True
    return mask


class TinyBert:
    """A BERT of two layers in a folder, and what it computes, in float64."""

    def __init__(self, folder: Path, seed: int = 24) -> None:
        import sparse24

        d, inner, positions = 40, 72, 24
        rng = np.random.default_rng(seed)
        shapes = {
            "embeddings.word_embeddings.weight": (len(WORDS), d),
            "embeddings.position_embeddings.weight": (positions, d),
            "embeddings.token_type_embeddings.weight": (2, d),
        }
        norms = ["embeddings.LayerNorm"]
        for layer in range(2):
            at = f"encoder.layer.{layer}"
            for name, m, k in [
                ("attention.self.query", d, d),
                ("attention.self.key", d, d),
                ("attention.self.value", d, d),
                ("attention.output.dense", d, d),
                ("intermediate.dense", inner, d),
                ("output.dense", d, inner),
            ]:
                shapes[f"{at}.{name}.weight"], shapes[f"{at}.{name}.bias"] = (m, k), (m,)
            norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        for norm in norms:
            shapes[f"{norm}.weight"], shapes[f"{norm}.bias"] = (d,), (d,)
        self.folder = folder
        self.tensors = {
            name: (rng.uniform(-0.4, 0.4, shape) + name.endswith("LayerNorm.weight")).astype(np.float32)
            for name, shape in shapes.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": d,
            "intermediate_size": inner, "layer_norm_eps": 1e-12, "max_position_embeddings": positions,
            "num_attention_heads": 5, "num_hidden_layers": 2, "position_embedding_type": "absolute",
            "type_vocab_size": 2, "vocab_size": len(WORDS),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token = lambda word: {"SpecialToken": {"id": word, "type_id": 0}}
        entry = lambda word, i: {"id": word, "ids": [i], "tokens": [word]}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": WORDS[i], **special} for i in range(5)],
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": True},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [token("[CLS]"), text, token("[SEP]")],
                "pair": [token("[CLS]"), text, token("[SEP]"), {"Sequence": {"id": "B", "type_id": 1}}, token("[SEP]")],
                "special_tokens": {"[CLS]": entry("[CLS]", 2), "[SEP]": entry("[SEP]", 3)},
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(WORDS)}},
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        sparse24.save_file(self.tensors, folder / "model.safetensors")

    def embedding(self, text: str, weights=lambda name, w: w) -> np.ndarray:
        """The mean of the last states, of length 1; `weights` may change those of linear layers."""
        own = {
            name: (weights(name, w) if w.ndim == 2 and ".layer." in name else w).astype(np.float64)
            for name, w in self.tensors.items()
        }
        ids = [2] + [WORDS.index(word) for word in text.lower().split()] + [3]

        def norm(x, name):
            x = x - x.mean(1, keepdims=True)
            return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-12) * own[f"{name}.weight"] + own[f"{name}.bias"]

        def linear(x, name):
            return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

        gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
        x = own["embeddings.word_embeddings.weight"][ids] + own["embeddings.position_embeddings.weight"][: len(ids)]
        x = norm(x + own["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(2):
            at = f"encoder.layer.{layer}"
            q, k, v = (
                linear(x, f"{at}.attention.self.{name}").reshape(len(ids), 5, 8).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            scores = q @ k.swapaxes(1, 2) / math.sqrt(8)
            p = np.exp(scores - scores.max(2, keepdims=True))
            heads = (p / p.sum(2, keepdims=True)) @ v
            attended = linear(heads.swapaxes(0, 1).reshape(len(ids), -1), f"{at}.attention.output.dense")
            x = norm(x + attended, f"{at}.attention.output.LayerNorm")
            inner = gelu(linear(x, f"{at}.intermediate.dense"))
            x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        mean = x.mean(0)
        return mean / np.linalg.norm(mean)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> TinyBert:
    return TinyBert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A Llama whose tokens are letters, with torch's logits of some texts."""
    import sparse24

    folder = tmp_path_factory.mktemp("models") / "llama"
    folder.mkdir()
    model = next(m for m in json.loads((VECTORS / "llama.json").read_text())["models"] if m["name"] == "llama")
    (folder / "config.json").write_text(json.dumps(model["config"]))
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {chr(97 + i): i for i in range(26)}, "unk_token": "z"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = {
        name.removeprefix("llama/"): numbers
        for name, (_, numbers) in read_safetensors(VECTORS / "llama_tiny.safetensors").items()
        if name.startswith("llama/")
    }
    sparse24.save_file(weights, folder / "model.safetensors")
    return folder, model

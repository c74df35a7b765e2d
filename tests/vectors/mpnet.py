"""What torch computes with MPNet: embeddings of all-mpnet-base-v2 and hidden states of a tiny one of random weights.

bash tests/fetch-mpnet.sh model/mpnet
python tests/vectors/mpnet.py model/mpnet tests/vectors

Writes mpnet.json and mpnet_tiny.safetensors into the second folder.
"""

import functools
import hashlib
import json
import pathlib
import sys

sys.path.pop(0)  # this file's own folder, where sentence_transformers.py would be taken for the package

import numpy  # noqa: E402
import safetensors  # noqa: E402
import sentence_transformers  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder  # noqa: E402

folder, out = map(pathlib.Path, sys.argv[1:])

LONG = """A lighthouse keeper wrote the weather into a book every evening for thirty years: the wind and its
direction, the height of the waves, what ships went by, and how much oil the lamp had burnt. When the lamp was given
a motor and the keeper a pension, nobody asked for the book, and it lay in a drawer among corks and string. A
student found it there much later. She typed the entries, one after the other, through a whole winter, and drew a
curve of the wind. It showed three storms that no other station on that coast had noted, and a calm of eleven days
which fishermen still talked about."""
# Text and how many features of its embedding are kept.
TEXTS = [
    ("", 768),
    ("lighthouse", 16),
    ("The cat sat on the mat.", 768),
    (" ".join(LONG.split()), 768),
    ("Élodie's crème brûlée cost 7€ in Zürich, naïve as it sounds — 東京 was dearer! 😀", 16),
    (" ".join(f"Crate {i} holds {3 * i + 2} lamps." for i in range(70)), 16),
]


def numbers(tensor):
    return [float(f"{x:.8g}") for x in numpy.asarray(tensor).ravel().tolist()]


def embeddings():
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    # The tokenizer by itself, which is what a reader of tokenizer.json has: transformers must agree.
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.enable_truncation(model.max_seq_length)
    items = []
    for text, features in TEXTS:
        ids = model.tokenizer(text, truncation=True, max_length=model.max_seq_length)["input_ids"]
        assert ids == plain.encode(text).ids, text
        # One at a time, so that none is padded.
        items.append({"text": text, "ids": ids, "embedding": numbers(model.encode(text)[:features])})
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "max_seq_length": model.max_seq_length, "items": items}


CONFIG = {
    "architectures": ["MPNetModel"],
    "hidden_act": "gelu",
    "hidden_size": 40,
    "intermediate_size": 72,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 26,
    "model_type": "mpnet",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "relative_attention_num_buckets": 32,
    "vocab_size": 14,
}


def tiny_weights(model):
    """Weights of up to 0.4, LayerNorm's about 1, the relative bias of up to 1, all of them exact in f16."""
    random = torch.Generator().manual_seed(24)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        values = 2 * torch.rand(tensor.shape, generator=random, dtype=torch.float64) - 1
        values *= 1 if "relative" in name else 0.4
        values += 1 if name.endswith("LayerNorm.weight") else 0
        weights[name] = values.half()
    return weights


def tiny():
    model = transformers.MPNetModel(transformers.MPNetConfig(**CONFIG), add_pooling_layer=False)
    weights = tiny_weights(model)
    save_file(weights, out / "mpnet_tiny.safetensors", metadata={"format": "pt"})

    random = torch.Generator().manual_seed(25)
    draw = functools.partial(torch.randint, 5, 14, generator=random)
    texts = [[0], *([0, *draw((length - 2,)).tolist(), 2] for length in (5, 24))]
    # A padding token within, as a text that names it has: it is attended to, but takes no position.
    texts.append([0, 9, 1, 7, 12, 2])

    found = []
    model.load_state_dict(weights)
    model.double().eval()
    for ids in texts:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        found.append({"ids": ids, "hidden": numbers(hidden), "mean": numbers(hidden.mean(0))})
    return {"config": CONFIG, "items": found}


def buckets():
    """The distances, up to 511 tokens to the left or right of the query, at which the bucket changes, and to which."""
    found = {}
    for count in (32, 8):
        of = functools.partial(MPNetEncoder.relative_position_bucket, num_buckets=count)
        for side, sign in (("left", -1), ("right", 1)):
            # One at a time and all at once: torch's logarithm of several numbers is another function.
            row = [of(torch.tensor(sign * n)).item() for n in range(512)]
            assert row == of(sign * torch.arange(512)).tolist(), (count, side)
            found[f"{count} {side}"] = [[n, row[n]] for n in range(512) if n == 0 or row[n] != row[n - 1]]
    return found


modules = (torch, transformers, sentence_transformers, tokenizers, safetensors, numpy)
parts = {
    "versions": {module.__name__: module.__version__ for module in modules},
    "model": embeddings(),
    "tiny": tiny(),
    "buckets": buckets(),
}
(out / "mpnet.json").write_text(json.dumps(parts, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

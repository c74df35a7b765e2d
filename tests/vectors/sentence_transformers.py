"""Embeddings of the folders of tests/pipeline.rs by Sentence Transformers, as JSON to stdout.

SPARSE24_WRITE_PIPELINES=DIR cargo test --test pipeline sentence_transformers
python sentence_transformers.py DIR > sentence_transformers.json
"""

import json
import pathlib
import sys

sys.path.pop(0)  # this file's own folder, where it would be taken for the package

from sentence_transformers import SentenceTransformer  # noqa: E402

TEXTS = ["The cats sat on the mat.", "dog", "", "the dog ran on the mat . cats"]
SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ["PAD", "UNK", "CLS", "SEP", "MASK"]}

found = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for tokenizer in folder.rglob("tokenizer.json"):
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 24, **SPECIAL}
        tokenizer.with_name("tokenizer_config.json").write_text(json.dumps(config))
    model = SentenceTransformer(str(folder), device="cpu")
    rows = model.encode(TEXTS, convert_to_numpy=True)
    found[folder.name] = [[round(float(x), 9) for x in row] for row in rows]
json.dump(found, sys.stdout, indent=0, sort_keys=True)

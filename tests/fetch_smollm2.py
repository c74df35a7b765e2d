"""Makes a Hugging Face folder of a GGUF file of SmolLM2. fetch-smollm2.sh runs it, with `gguf` and `safetensors`.

    python3 fetch_smollm2.py FILE.gguf FOLDER

The weights become f32: the numbers that the quantised blocks stand for, bit for bit. The same file always gives the
same bytes. What a GGUF does not say of the model (its activation, how text is cut into words) is that of SmolLM2.
"""
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def renamed(name):
    """Hugging Face's name of a tensor."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER[kind]}.weight"


def halves(weight, heads):
    """The rows of Q or K in Hugging Face's order, where rotary embedding turns row i of a head together with row
    i + head_dim/2. GGUF has these two side by side: rows 2i and 2i + 1."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def weights(tensors, config):
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    out = {}
    for tensor in tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        out[renamed(tensor.name)] = halves(weight, heads[kind]) if kind in heads else np.ascontiguousarray(weight)
    return out


def config_of(field):
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        # An f32 in the file. The shortest decimal that rounds to it is the number that was meant.
        "rms_norm_eps": float(str(np.float32(field("llama.attention.layer_norm_rms_epsilon")))),
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": field("llama.vocab_size"),
    }


def tokenizer_of(field, tokens, special):
    """Byte-level BPE. Text is cut at special tokens, then each digit is a word of its own, then GPT-2's pattern cuts.
    Nothing is put before or after a text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }


def main(file, folder):
    reader = gguf.GGUFReader(file)
    field = lambda key: reader.fields[key].contents()
    if (got := (field("general.architecture"), field("tokenizer.ggml.pre"))) != ("llama", "smollm"):
        sys.exit(f"{file}: {got} is not ('llama', 'smollm'), architecture and pre-tokenizer of SmolLM2")
    if any(tensor.name == "output.weight" for tensor in reader.tensors):
        sys.exit(f"{file}: an output matrix of its own; SmolLM2 uses the table of its tokens")

    config, tokens = config_of(field), field("tokenizer.ggml.tokens")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    control = int(gguf.TokenType.CONTROL)
    special = {i: {"content": tokens[i], **plain}
               for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == control}
    names = {
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
    }
    files = {
        "config.json": config,
        "generation_config.json": {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "special_tokens_map.json": names,
        "tokenizer.json": tokenizer_of(field, tokens, special),
        "tokenizer_config.json": {
            "add_bos_token": field("tokenizer.ggml.add_bos_token"),
            "add_prefix_space": field("tokenizer.ggml.add_space_prefix"),
            "added_tokens_decoder": special,
            **names,
            "chat_template": field("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            # Of tokenizer.json as it stands. The class that SmolLM2 names, GPT2Tokenizer, leaves out the digits.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_bytes(text.encode())
    save_file(weights(reader.tensors, config), folder / "model.safetensors", {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else nobody but the owner may read it


if __name__ == "__main__":
    main(*sys.argv[1:])

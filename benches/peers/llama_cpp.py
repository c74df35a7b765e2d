#!/usr/bin/env python3
"""llama.cpp on a language model of Llama's kind, on the CPU: a peer of `sparse24 bench --model --device cpu`.

GGUF files in f32 and f16 are made here from a Hugging Face folder, without its tokenizer: ids are drawn. Each has two
rows: `prefill`, a pass over the tokens of a prompt, and `decode`, a pass over one token after it (the mean of --new of
them, one after the other); a sequence at a time. The cache of keys and values is of the weights' type. Attention is
llama.cpp's default in f16, and not its flash attention in f32, because that rounds to f16. Before anything is timed,
logits after texts of several lengths, and after one more token that finds the text in the cache, are compared with a
forward pass in f64 on the weights as the file stores them.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python==0.3.36
    pip install gguf==0.19.0 numpy==2.4.6 safetensors==0.8.0
    python3 benches/peers/llama_cpp.py model/smollm2 [--dtype f16] [--threads 2] [--seq 64] [--new 32] [--out FILE]

pip compiles llama.cpp, in some minutes, with the compiler that is there. The figures are of a build for the very
processor (-DGGML_NATIVE=ON, the default unless one builds for another machine), without a BLAS; what the build uses is
recorded as `build` in the environment. Writes JSON of the schema sparse24-model-bench/1. Everything else goes to
stderr.
"""
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
# This folder's numpy.py, torch.py and this very file would be imported in place of the libraries.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != HERE]
import gguf  # noqa: E402
import llama_cpp as llama  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

sys.path.append(HERE)
import common  # noqa: E402
from common import log  # noqa: E402

sys.path.remove(HERE)

ALLOWED = {"f32": 1e-4, "f16": 5e-2}  # of a logit, where those of its row are about 1
LENGTHS = (33, 7, 2)  # of the texts that are verified, of which the last token comes by itself
NUMPY = {"f32": np.float32, "f16": np.float16}


def load(folder):
    """(configuration, weights)"""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        cfg = json.load(file)
    rope = {**cfg, **(cfg.get("rope_parameters") or {})}
    plain = cfg.get("rope_scaling") is None and rope.get("rope_type", "default") == "default"
    bias = cfg.get("attention_bias") or cfg.get("mlp_bias")
    if cfg["model_type"] != "llama" or cfg["hidden_act"] != "silu" or bias or not plain:
        sys.exit(f"{folder}: a Llama with SiLU, without biases and with plain rotary positions is wanted")
    cfg["rope_theta"] = rope["rope_theta"]
    cfg.setdefault("num_key_value_heads", cfg["num_attention_heads"])
    cfg["head_dim"] = cfg.get("head_dim") or cfg["hidden_size"] // cfg["num_attention_heads"]
    return cfg, load_file(f"{folder}/model.safetensors")


def stored(weights, dtype):
    """The weights as a file of this type has them: vectors, which norms have, stay f32."""
    return {name: w.astype(NUMPY[dtype] if w.ndim == 2 else np.float32) for name, w in weights.items()}


def twin(cfg, W, ids):
    """The logits of the last two tokens of one text in f64."""
    wide = lambda key: W[key + ".weight"].astype(np.float64)
    heads, shared, width = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    n = len(ids)

    def norm(x, key):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + cfg["rms_norm_eps"]) * wide(key)

    # Feature i of a head turns together with feature i + width/2.
    angles = np.arange(n)[:, None] * cfg["rope_theta"] ** -(np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = W["model.embed_tokens.weight"][ids].astype(np.float64)
    later = np.triu(np.full((n, n), -np.inf), 1)
    for layer in range(cfg["num_hidden_layers"]):
        k = f"model.layers.{layer}."
        h = norm(x, k + "input_layernorm")
        q, keys, values = ((h @ wide(f"{k}self_attn.{name}_proj").T).reshape(n, -1, width).transpose(1, 0, 2)
                           for name in "qkv")
        keys, values = (np.repeat(a, heads // shared, axis=0) for a in (turned(keys), values))
        s = turned(q) @ keys.transpose(0, 2, 1) / math.sqrt(width) + later
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        x = x + (p @ values).transpose(1, 0, 2).reshape(n, -1) @ wide(k + "self_attn.o_proj").T
        h = norm(x, k + "post_attention_layernorm")
        gate = h @ wide(k + "mlp.gate_proj").T
        x = x + (gate / (1.0 + np.exp(-gate)) * (h @ wide(k + "mlp.up_proj").T)) @ wide(k + "mlp.down_proj").T
    head = "lm_head" if "lm_head.weight" in W else "model.embed_tokens"
    return norm(x[-2:], "model.norm") @ wide(head).T


def write_gguf(cfg, W, dtype, path):
    """A file without a tokenizer: llama.cpp runs it on ids."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(cfg["vocab_size"])
    writer.add_context_length(cfg["max_position_embeddings"])
    writer.add_embedding_length(cfg["hidden_size"])
    writer.add_block_count(cfg["num_hidden_layers"])
    writer.add_feed_forward_length(cfg["intermediate_size"])
    writer.add_head_count(cfg["num_attention_heads"])
    writer.add_head_count_kv(cfg["num_key_value_heads"])
    writer.add_key_length(cfg["head_dim"])
    writer.add_value_length(cfg["head_dim"])
    writer.add_rope_dimension_count(cfg["head_dim"])
    writer.add_rope_freq_base(cfg["rope_theta"])
    writer.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "f16" else gguf.LlamaFileType.ALL_F32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg["num_hidden_layers"])
    heads = {"q_proj": cfg["num_attention_heads"], "k_proj": cfg["num_key_value_heads"]}
    for name, w in W.items():
        # GGUF has the two rows of a head that turn together side by side.
        if (h := heads.get(name.split(".")[-2])) is not None:
            w = w.reshape(h, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@llama.llama_log_callback
def quiet(level, text, _):
    if level == 4:  # an error
        log(text.decode(errors="replace").rstrip())


class Context:
    """A model with a cache for one sequence of at most `tokens` tokens."""

    def __init__(self, path, dtype, tokens, threads):
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load the {dtype} file")
        params = llama.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch = tokens
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = {"f32": llama.GGML_TYPE_F32, "f16": llama.GGML_TYPE_F16}[dtype]
        if dtype == "f32":
            # Its flash attention rounds to f16: logits are then 1e-3 off, and 1.4e-6 without.
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp makes no context of {tokens} tokens for the {dtype} file")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def cut(self, length):
        """Forgets the tokens after so many."""
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self.context), 0, length, -1):
            sys.exit("llama.cpp does not cut its cache")

    def feed(self, ids):
        """Appends tokens to the sequence; logits are of the last one alone."""
        if code := llama.llama_decode(self.context, llama.llama_batch_get_one(ids, len(ids))):
            sys.exit(f"llama_decode: {code}")

    def logits(self):
        row = llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(row, (self.vocabulary,)).astype(np.float64)

    def free(self):
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def tokens_of(ids):
    return (llama.llama_token * len(ids))(*map(int, ids))


def check(context, items):
    """The largest distance of a logit from the twin's, over the root mean square of its row: after each text less its
    last token, and after this one. Infinite if one is NaN."""
    off = []
    for ids, expected in items:
        context.cut(0)
        for part, want in zip((ids[:-1], ids[-1:]), expected, strict=True):
            context.feed(tokens_of(part))
            off.append(float(np.abs(context.logits() - want).max() / np.sqrt((want * want).mean())))
    return math.inf if any(map(math.isnan, off)) else max(off)


def prefill(context, prompt):
    def seconds(calls):
        spent = 0.0
        for _ in range(calls):
            context.cut(0)
            start = time.perf_counter()
            context.feed(prompt)
            context.logits()
            spent += time.perf_counter() - start
        return spent

    return seconds


def decode(context, prompt, after):
    """Times tokens after the prompt, which is in the cache already once the cache has been cut back to it. More of them
    than `after` holds begin again after the prompt."""
    def seconds(calls):
        context.cut(0)
        context.feed(prompt)
        context.logits()
        spent = 0.0
        for at in range(calls):
            if at % len(after) == 0:
                context.cut(len(prompt))
            token = tokens_of(after[at % len(after):][:1])
            start = time.perf_counter()
            context.feed(token)
            context.logits()
            spent += time.perf_counter() - start
        return spent

    return seconds


def main():
    p = common.parser(__doc__, products=False)
    p.add_argument("model", help="folder with config.json and model.safetensors")
    p.add_argument("--dtype", choices=("f32", "f16"), action="append", help="repeatable; both unless given")
    p.add_argument("--seq", type=common.positive, default=64, help="tokens of the prompt (default: %(default)s)")
    p.add_argument("--new", type=common.positive, default=32, help="tokens decoded after it (default: %(default)s)")
    args = p.parse_args()
    args.dtype = args.dtype or ["f32", "f16"]
    cfg, weights = load(args.model)
    if args.seq + args.new > cfg["max_position_embeddings"]:
        p.error(f"--seq and --new: the model takes at most {cfg['max_position_embeddings']} tokens")
    with tempfile.TemporaryDirectory() as work:
        return run(args, cfg, weights, work)


def run(args, cfg, weights, work):
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    build = llama.llama_print_system_info().decode().strip()
    simd = next((level for level in ("avx512", "avx2") if f"{level.upper()} = 1" in build), None)
    environment = common.environment_of(args, "llama-cpp-python", llama.__version__, {"gguf": gguf_version()},
                                        common.cpu(args.threads, simd))
    environment["build"] = build
    rng = np.random.default_rng(args.seed)
    draw = lambda length: rng.integers(0, cfg["vocab_size"], length)
    texts = [draw(length) for length in LENGTHS]
    prompt, after = tokens_of(draw(args.seq)), draw(args.new)
    h, inner, layers = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_hidden_layers"]
    queries, shared = (cfg["head_dim"] * cfg[name] for name in ("num_attention_heads", "num_key_value_heads"))
    linear_weights = layers * (2 * h * queries + 2 * h * shared + 3 * h * inner)

    rows, timed, contexts = [], [], []
    for dtype in args.dtype:
        path = os.path.join(work, f"{dtype}.gguf")
        own = stored(weights, dtype)
        items = [(ids, twin(cfg, own, ids)) for ids in texts]
        if args.break_weight:
            key = "model.layers.0.mlp.up_proj.weight"
            own[key].flat[np.abs(own[key]).argmax()] *= -1.0
        write_gguf(cfg, own, dtype, path)
        del own
        context = Context(path, dtype, max(args.seq + args.new, *LENGTHS), args.threads)
        contexts.append(context)
        worst = check(context, items)
        for phase, seconds in (("prefill", prefill(context, prompt)), ("decode", decode(context, prompt, after))):
            rows.append(row_of(args, cfg, dtype, phase, worst, linear_weights))
            if rows[-1]["verified"]:
                timed.append((rows[-1], common.Built(lambda: None, lambda: None, seconds), []))
    measure(args, timed, linear_weights)
    for context in contexts:
        context.free()
    common.write({"schema": "sparse24-model-bench/1", "environment": environment, "model": args.model,
                  "weights": "folder", "layers": layers, "hidden": h, "linear_weights": linear_weights, "batch": 1,
                  "seq": args.seq, "rows": rows}, args.out)
    return common.FINE if all(row["verified"] for row in rows) else common.WRONG


def gguf_version():
    from importlib.metadata import version
    return version("gguf")


def row_of(args, cfg, dtype, phase, worst, linear_weights):
    """A row without times."""
    again = [args.model, "--dtype", dtype, "--threads", str(args.threads), "--seq", str(args.seq)]
    again += ["--new", str(args.new), "--seed", str(args.seed)]
    row = {"phase": phase, "op": "dense", "vector": None, "dtype": dtype, "kernels": ["ggml"], "dense_layers": 0,
           # As sparse24 counts: query, key and value are one, and so are gate and up.
           "linear_layers": 4 * cfg["num_hidden_layers"], "threads": args.threads, "prompt_tokens": args.seq,
           "new_tokens": args.new if phase == "decode" else 0,
           "median_ms": None, "min_ms": None, "max_ms": None, "samples": 0, "calls_per_sample": 0, "clock": None,
           "parts": None, "sequences_per_second": None, "tokens_per_second": None, "effective_tflops": None,
           "speedup_vs_dense": None, "weight_bytes": NUMPY[dtype]().itemsize * linear_weights,
           "max_error": worst if math.isfinite(worst) else None, "allowed_error": ALLOWED[dtype],
           "verified": worst <= ALLOWED[dtype],
           "command": common.command_line(*again, *(["--quick"] if args.quick else []))}
    if not row["verified"]:
        row["failure"] = f"a logit is {worst:.2e} off, {ALLOWED[dtype]:.0e} is allowed"
        log(f"failed: {dtype} {phase}: {row['failure']}")
    return row


def measure(args, timed, linear_weights):
    """Samples the verified rows in turns."""
    samples, sample, warm_up = common.policy(args)
    for row, built, _ in timed:
        calls = common.calibrate(built, sample, warm_up)
        # Whole runs of new tokens, so that every sample has the same lengths of the cache.
        calls = -(-calls // args.new) * args.new if row["phase"] == "decode" else calls
        row.update(samples=samples, calls_per_sample=calls, clock="host_wall")
    gc.collect()
    gc.disable()
    for _ in range(samples):
        for row, built, times in timed:
            times.append(built.time(row["calls_per_sample"]) * 1e3 / row["calls_per_sample"])
    gc.enable()
    for row, _, times in timed:
        row.update(common.summary(times))
        tokens, median = (args.seq if row["phase"] == "prefill" else 1), row["median_ms"]
        row.update(tokens_per_second=tokens / median * 1e3, sequences_per_second=1e3 / median, speedup_vs_dense=1.0,
                   effective_tflops=2.0 * linear_weights * tokens / median / 1e9)
        log(f"{row['dtype']} {row['phase']}: {median} ms, {row['tokens_per_second']} tokens/s, "
            f"error {row['max_error']}")


if __name__ == "__main__":
    sys.exit(main())

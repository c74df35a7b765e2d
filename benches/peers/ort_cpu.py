#!/usr/bin/env python3
"""ONNX Runtime's CPU provider on a BERT in f32, end to end: a peer of `sparse24 bench --model --device cpu`.

The graph is built here from the model's safetensors, of standard operators ("plain") and, by onnxruntime.transformers,
of fused ones ("fused"): one row each. Weights are embedded, so no other export is involved. Before anything is timed
embeddings of texts of several lengths, alone and as one padded batch, are compared with a forward pass in f64, and
with --reference (a JSON file of items with token_ids and normalized) also with those.

    pip install onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 safetensors==0.8.0 sympy==1.14.0
    python3 benches/peers/ort_cpu.py model/minilm [--threads 2] [--batch 32] [--seq 64] [--reference FILE] [--out FILE]

Writes JSON of the schema sparse24-model-bench/1. Everything else goes to stderr.
"""
import collections
import gc
import json
import math
import os
import sys
import tempfile

HERE = os.path.dirname(os.path.realpath(__file__))
# This folder's numpy.py and torch.py would be imported in place of the libraries.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != HERE]
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

sys.path.append(HERE)
import common  # noqa: E402
from common import log  # noqa: E402

sys.path.remove(HERE)

ALLOWED = 1e-4  # of an embedding's element, where those of its row are about 1


def load(folder):
    """(configuration, weights)"""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        cfg = json.load(file)
    if cfg["hidden_act"] != "gelu" or cfg.get("position_embedding_type", "absolute") != "absolute":
        sys.exit(f"{folder}: a BERT with exact GELU and absolute positions is wanted")
    return cfg, load_file(f"{folder}/model.safetensors")


def twin(cfg, W, ids):
    """The normalised embedding of one text in f64."""
    wide = lambda key: W[key].astype(np.float64)
    linear = lambda x, key: x @ wide(key + ".weight").T + wide(key + ".bias")

    def ln(x, key):
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + cfg["layer_norm_eps"])
        return x * wide(key + ".weight") + wide(key + ".bias")

    table = lambda name, rows: W[f"embeddings.{name}_embeddings.weight"][rows].astype(np.float64)
    x = ln(table("word", ids) + table("position", range(len(ids))) + table("token_type", 0), "embeddings.LayerNorm")
    heads = cfg["num_attention_heads"]
    for n in range(cfg["num_hidden_layers"]):
        k = f"encoder.layer.{n}."
        q, kk, v = (linear(x, f"{k}attention.self.{name}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
                    for name in ("query", "key", "value"))
        s = q @ kk.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        c = (p @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = ln(linear(c, k + "attention.output.dense") + x, k + "attention.output.LayerNorm")
        h = linear(x, k + "intermediate.dense")
        h *= 0.5 * (1.0 + np.vectorize(math.erf)(h / math.sqrt(2.0)))
        x = ln(linear(h, k + "output.dense") + x, k + "output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def build(cfg, W, path):
    H, L = cfg["hidden_size"], cfg["num_hidden_layers"]
    A, eps = cfg["num_attention_heads"], cfg["layer_norm_eps"]
    D = H // A
    nodes, inits = [], []

    def init(name, arr):
        inits.append(numpy_helper.from_array(np.asarray(arr, order="C"), name))  # (ascontiguousarray makes scalars 1-d)
        return name

    def op(kind, ins, out, **attrs):
        nodes.append(helper.make_node(kind, ins, [out], name=out + "_node", **attrs))
        return out

    f = lambda name, x: init(name, np.array(x, dtype=np.float32))
    i = lambda name, x: init(name, np.array(x, dtype=np.int64))
    one, half, sqrt2 = f("one", 1.0), f("half", 0.5), f("sqrt2", math.sqrt(2.0))
    sqrt_d, neg = f("sqrt_d", math.sqrt(D)), f("neg", -10000.0)
    l2eps, cnteps = f("l2eps", 1e-12), f("cnteps", 1e-9)
    ax0, ax1, ax2 = i("ax0", [0]), i("ax1", [1]), i("ax2", [2])
    c1 = i("c1", 1)
    split_shape, merge_shape = i("split_shape", [0, 0, A, D]), i("merge_shape", [0, 0, H])

    def ln(x, key, out):
        g, b = init(key + ".w", W[key + ".weight"]), init(key + ".b", W[key + ".bias"])
        return op("LayerNormalization", [x, g, b], out, axis=-1, epsilon=eps)

    def linear(x, key, out):
        w = init(key + ".wT", W[key + ".weight"].T)
        b = init(key + ".b", W[key + ".bias"])
        return op("Add", [op("MatMul", [x, w], out + "_mm"), b], out)

    # embeddings. The type row (always 0) is added to the position table in the graph:
    # both are constants, so ORT folds that Add when the session is created.
    word = op("Gather", [init("word_emb", W["embeddings.word_embeddings.weight"]), "input_ids"], "e_word")
    table = op("Add", [init("pos_emb", W["embeddings.position_embeddings.weight"]),
                       init("type0", W["embeddings.token_type_embeddings.weight"][0])], "e_postype")
    seq = op("Unsqueeze", [op("Gather", [op("Shape", ["input_ids"], "e_shape"), c1], "e_seq0", axis=0), ax0], "e_seq")
    pos = op("Unsqueeze", [op("Slice", [table, ax0, seq, ax0], "e_slice"), ax0], "e_pos")
    x = ln(op("Add", [word, pos], "e_sum"), "embeddings.LayerNorm", "e_out")

    m = op("Unsqueeze", [op("Unsqueeze", ["attention_mask", ax1], "m_u1"), ax2], "m_u2")
    m = op("Cast", [m], "m_f", to=TensorProto.FLOAT)
    mask = op("Mul", [op("Sub", [one, m], "m_inv"), neg], "m_bias")

    for n in range(L):
        k, o = f"encoder.layer.{n}.", f"l{n}_"
        heads = lambda name, perm: op("Transpose", [op("Reshape", [
            linear(x, f"{k}attention.self.{name}", o + name), split_shape], o + name + "_r")],
            o + name + "_t", perm=perm)
        q, kk, v = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
        s = op("Div", [op("MatMul", [q, kk], o + "qk"), sqrt_d], o + "scaled")
        p = op("Softmax", [op("Add", [s, mask], o + "masked")], o + "prob", axis=-1)
        c = op("Transpose", [op("MatMul", [p, v], o + "ctx")], o + "ctx_t", perm=[0, 2, 1, 3])
        c = op("Reshape", [c, merge_shape], o + "ctx_r")
        a = linear(c, k + "attention.output.dense", o + "attn")
        x = ln(op("Add", [a, x], o + "res1"), k + "attention.output.LayerNorm", o + "ln1")
        h = linear(x, k + "intermediate.dense", o + "ff1")
        e = op("Add", [op("Erf", [op("Div", [h, sqrt2], o + "g_div")], o + "g_erf"), one], o + "g_add")
        g = op("Mul", [op("Mul", [h, e], o + "g_mul"), half], o + "gelu")
        y = linear(g, k + "output.dense", o + "ff2")
        x = ln(op("Add", [y, x], o + "res2"), k + "output.LayerNorm", o + "ln2")

    # masked mean, then L2 norm
    pm = op("Cast", [op("Unsqueeze", ["attention_mask", ax2], "p_u")], "p_m", to=TensorProto.FLOAT)
    tot = op("ReduceSum", [op("Mul", [x, pm], "p_x"), ax1], "p_sum", keepdims=0)
    cnt = op("Max", [op("ReduceSum", [pm, ax1], "p_cnt", keepdims=0), cnteps], "p_cnt1")
    mean = op("Div", [tot, cnt], "p_mean")
    norm = op("Max", [op("ReduceL2", [mean], "p_l2", axes=[1], keepdims=1), l2eps], "p_norm")
    op("Div", [mean, norm], "embedding")

    vi = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "bert",
        [vi(name, TensorProto.INT64, ["batch", "seq"]) for name in ("input_ids", "attention_mask")],
        [vi("embedding", TensorProto.FLOAT, ["batch", H])], inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="sparse24 peer")
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, path)


def fuse(src, dst, cfg):
    """onnxruntime.transformers offline optimizer. Returns the counts of fused operators."""
    from onnxruntime.transformers import optimizer
    m = optimizer.optimize_model(src, model_type="bert", num_heads=cfg["num_attention_heads"],
                                 hidden_size=cfg["hidden_size"],
                                 opt_level=0)  # the default, 1, imports torch; ORT's own passes run at load time anyway
    m.save_model_to_file(dst)
    return {k: v for k, v in m.get_fused_operator_statistics().items() if v}


def session(path, threads, dump=None):
    so = ort.SessionOptions()
    so.intra_op_num_threads = threads
    so.inter_op_num_threads = 1
    so.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    so.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    so.log_severity_level = 3
    if dump:
        so.optimized_model_filepath = dump
    return ort.InferenceSession(path, so, providers=["CPUExecutionProvider"])


def ops_run(path):
    """The operators that ORT really runs after its own graph optimisations (stderr only)."""
    dump = path + ".run"
    session(path, 1, dump)
    return dict(collections.Counter(n.op_type for n in onnx.load(dump).graph.node).most_common())


def check(s, items):
    """The largest distance of an element from the reference, over the root mean square of its embedding: of the texts
    one by one, and of all as one padded batch. Infinite if one is NaN."""
    run = lambda ids, mask: s.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    n = max(len(ids) for ids, _ in items)
    padded, mask = np.zeros((2, len(items), n), np.int64)
    for row, (ids, _) in enumerate(items):
        padded[row, :len(ids)], mask[row, :len(ids)] = ids, 1
    got = [run(np.array([ids], np.int64), np.ones((1, len(ids)), np.int64))[0] for ids, _ in items]
    got += list(run(padded, mask))
    want = [reference for _, reference in [*items, *items]]
    off = [float(np.abs(y - r).max() / np.sqrt((r * r).mean())) for y, r in zip(got, want, strict=True)]
    return math.inf if any(map(math.isnan, off)) else max(off)


def main():
    p = common.parser(__doc__, products=False)
    p.add_argument("model", help="folder with config.json and model.safetensors")
    p.add_argument("--batch", type=common.positive, default=32)
    p.add_argument("--seq", type=common.positive, default=64)
    p.add_argument("--reference", help="JSON file of embeddings to compare with, too")
    args = p.parse_args()
    cfg, weights = load(args.model)
    if args.seq > cfg["max_position_embeddings"]:
        p.error(f"--seq: the model takes at most {cfg['max_position_embeddings']} tokens")
    with tempfile.TemporaryDirectory() as work:
        return run(args, cfg, weights, work)


def run(args, cfg, weights, work):
    environment = common.environment_of(args, "onnxruntime", ort.__version__, {"onnx": onnx.__version__},
                                        common.cpu(args.threads, None))
    rng = np.random.default_rng(args.seed)
    texts = [rng.integers(0, cfg["vocab_size"], min(length, args.seq)) for length in (33, 7, args.seq)]
    items = [(ids, twin(cfg, weights, ids)) for ids in texts]
    if args.reference:
        with open(args.reference, encoding="utf-8") as file:
            items += [(i["token_ids"], np.array(i["normalized"], np.float64)) for i in json.load(file)["items"]]
    if args.break_weight:
        key = "encoder.layer.0.intermediate.dense.weight"
        weights[key] = weights[key].copy()
        weights[key].flat[np.abs(weights[key]).argmax()] *= -1.0

    plain, fused = os.path.join(work, "plain.onnx"), os.path.join(work, "fused.onnx")
    build(cfg, weights, plain)
    paths = {"plain": plain}
    try:
        log("fused by onnxruntime.transformers:", fuse(plain, fused, cfg))
        paths["fused"] = fused
    except ImportError as e:
        log(f"no fused row: onnxruntime.transformers cannot be imported: {e}")

    ids = rng.integers(0, cfg["vocab_size"], size=(args.batch, args.seq), dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}  # all real, no padding
    hidden, inner = cfg["hidden_size"], cfg["intermediate_size"]
    linear_weights = cfg["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * inner)
    rows = []
    for name, path in paths.items():
        log(f"{name}: operators run:", ops_run(path))
        rows.append(measure(args, cfg, session(path, args.threads), name, items, feed, linear_weights))
        gc.collect()  # the session's thread pool ends here, before the next variant is timed
    if len(rows) == 1 and rows[0]["verified"]:
        rows[0]["speedup_vs_dense"] = 1.0
    common.write({"schema": "sparse24-model-bench/1", "environment": environment, "model": args.model,
                  "weights": "folder", "layers": cfg["num_hidden_layers"], "hidden": hidden,
                  "linear_weights": linear_weights, "batch": args.batch, "seq": args.seq, "rows": rows}, args.out)
    return common.FINE if all(row["verified"] for row in rows) else common.WRONG


def measure(args, cfg, s, name, items, feed, linear_weights):
    """Verifies and times one variant."""
    worst = check(s, items)
    again = [args.model, "--threads", str(args.threads), "--batch", str(args.batch), "--seq", str(args.seq)]
    again += ["--seed", str(args.seed), *(["--reference", args.reference] if args.reference else [])]
    row = {"op": "dense", "vector": None, "dtype": "f32", "kernels": [name], "dense_layers": 0,
           # As sparse24 counts: query, key and value are one.
           "linear_layers": 4 * cfg["num_hidden_layers"],
           "median_ms": None, "min_ms": None, "max_ms": None, "samples": 0, "calls_per_sample": 1, "clock": None,
           "parts": None, "sequences_per_second": None, "effective_tflops": None, "speedup_vs_dense": None,
           "weight_bytes": 4 * linear_weights, "max_error": worst if math.isfinite(worst) else None,
           "allowed_error": ALLOWED, "verified": worst <= ALLOWED,
           "command": common.command_line(*again, *(["--quick"] if args.quick else []))}
    if not row["verified"]:
        row["failure"] = f"an output is {worst:.2e} off, {ALLOWED:.0e} is allowed"
        log(f"failed: {name}: {row['failure']}")
        return row
    built = common.Built(lambda: s.run(None, feed), lambda: None)
    samples, sample, warm_up = common.policy(args)
    calls = common.calibrate(built, sample, warm_up)
    gc.collect()
    gc.disable()
    times = [built.time(calls) * 1e3 / calls for _ in range(samples)]
    gc.enable()
    row.update(common.summary(times))
    median = row["median_ms"]
    row.update(samples=samples, calls_per_sample=calls, clock="host_wall",
               sequences_per_second=args.batch / median * 1e3,
               effective_tflops=2.0 * linear_weights * args.batch * args.seq / median / 1e9)
    log(f"{name}: {median} ms, error {worst}")
    return row


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""How fast ONNX Runtime's CPU provider embeds with all-MiniLM-L6-v2 in f32: a peer of `sparse24 bench --model`.

The graph is built here from the model's safetensors, of standard operators ("plain") and, by onnxruntime.transformers,
of fused ones ("fused"); the faster one counts. Weights are embedded, so no other export is involved. With --reference
(a JSON file of items with token_ids and normalized) embeddings are compared before anything is timed.

    pip install onnxruntime==1.32.0 onnx numpy safetensors sympy
    python3 benches/peers/ort_cpu.py model/minilm [--threads 2] [--batch 32] [--seq 64] [--reference FILE]

stdout: one line of JSON. Everything else goes to stderr.
"""
import argparse, collections, gc, json, math, os, statistics, sys, tempfile, time
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
import onnxruntime as ort
from safetensors.numpy import load_file

TOL = 1e-4  # of normalised embeddings against the reference


def log(*a):
    print(*a, file=sys.stderr, flush=True)


def build(folder, path):
    cfg = json.load(open(f"{folder}/config.json"))
    assert cfg["hidden_act"] == "gelu" and cfg["position_embedding_type"] == "absolute"
    W = load_file(f"{folder}/model.safetensors")
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
        nodes, "minilm",
        [vi("input_ids", TensorProto.INT64, ["batch", "seq"]), vi("attention_mask", TensorProto.INT64, ["batch", "seq"])],
        [vi("embedding", TensorProto.FLOAT, ["batch", H])], inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="sparse24 peer")
    model.ir_version = 8
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return cfg


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
    """Max |ORT - reference| of the normalised embeddings, unpadded one by one and as one padded batch."""
    ids = [it["token_ids"] for it in items]
    ref = np.array([it["normalized"] for it in items], dtype=np.float64)
    single = []
    for t, r in zip(ids, ref):
        a = np.array([t], dtype=np.int64)
        single.append(float(np.abs(s.run(None, {"input_ids": a, "attention_mask": np.ones_like(a)})[0][0] - r).max()))
    n = max(map(len, ids)) + 5
    a = np.zeros((len(ids), n), np.int64)
    m = np.zeros_like(a)
    for r, t in enumerate(ids):
        a[r, :len(t)], m[r, :len(t)] = t, 1
    padded = np.abs(s.run(None, {"input_ids": a, "attention_mask": m})[0] - ref).max(axis=1)
    return single, padded.tolist()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="folder with config.json and model.safetensors")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seq", type=int, default=64)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--runs", type=int, default=15)
    p.add_argument("--reference", help="JSON file of embeddings to compare with")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        run(a, work)


def run(a, work):
    plain, fused = os.path.join(work, "plain.onnx"), os.path.join(work, "fused.onnx")
    cfg = build(a.model, plain)
    paths, note = {"plain": plain}, None
    try:
        log("fused by onnxruntime.transformers:", fuse(plain, fused, cfg))
        paths["fused"] = fused
    except ImportError as e:
        note = f"onnxruntime.transformers not importable: {e}"
        log(note)

    items = json.load(open(a.reference))["items"] if a.reference else []
    rng = np.random.default_rng(1)
    ids = rng.integers(1000, cfg["vocab_size"], size=(a.batch, a.seq), dtype=np.int64)
    ids[:, 0], ids[:, -1] = 101, 102  # [CLS] ... [SEP], all real, no padding
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    res = {}
    for name, path in paths.items():
        log(f"{name}: operators run:", ops_run(path))
        s = session(path, a.threads)
        worst = None
        if items:
            single, padded = check(s, items)
            worst = max(single + padded)
            log(f"{name}: max abs diff per sentence, unpadded {single}, padded batch {padded}")
            if not worst < TOL:
                sys.exit(f"{name}: WRONG RESULT, max abs diff {worst} >= {TOL}")
        for _ in range(a.warmup):
            s.run(None, feed)
        ts = []
        gc.disable()
        for _ in range(a.runs):
            t0 = time.perf_counter()
            s.run(None, feed)
            ts.append((time.perf_counter() - t0) * 1e3)
        gc.enable()
        log(f"{name}: ms", [round(t, 2) for t in ts])
        res[name] = {"median_ms": round(statistics.median(ts), 3), "min_ms": round(min(ts), 3),
                     "max_ms": round(max(ts), 3), "max_abs_diff": worst}
        del s  # its thread pool ends here, before the next variant is timed
        gc.collect()

    best = min(res, key=lambda k: res[k]["median_ms"])
    out = {"engine": "onnxruntime " + ort.__version__, "model": "all-MiniLM-L6-v2 f32", "batch": a.batch, "seq": a.seq,
           "threads": a.threads, "warmup": a.warmup, "runs": a.runs, "best": best, **res[best],
           "sentences_per_s": round(a.batch / res[best]["median_ms"] * 1e3, 1), "variants": res}
    if note:
        out["note"] = note
    print(json.dumps(out))


if __name__ == "__main__":
    main()

"""Makes torch_prune.json: masks by torch.nn.utils.prune, of weights without ties.

    python3 torch_prune.py

Needs torch. A case is a list of steps that are applied one after the other to one tensor, or of global_unstructured to
several. Masks are row-major strings of 0 and 1. Of the random methods there is only how many weights they remove.
"""
import json
import pathlib

import torch
import torch.nn.utils.prune as prune

HERE = pathlib.Path(__file__).parent


def module(tensor):
    one = torch.nn.Module()
    one.weight = torch.nn.Parameter(tensor.clone())
    return one


def apply(one, step):
    how = dict(step)
    method = getattr(prune, how.pop("method"))
    if isinstance(how.get("n"), str):
        how["n"] = float(how["n"])
    method(one, "weight", **how)


def bits(mask):
    return "".join("1" if kept else "0" for kept in mask.flatten().tolist())


def main():
    torch.manual_seed(24)
    tensors = {
        "a": torch.randn(12, 20),
        "b": torch.randn(7, 9),
        "c": torch.randn(6, 5, 3, 3),
        # Each row and each column has another number of zeros.
        "zeros": torch.randn(8, 8).tril(),
    }
    l1 = lambda amount: {"method": "l1_unstructured", "amount": amount}
    ln = lambda amount, n, dim: {"method": "ln_structured", "amount": amount, "n": n, "dim": dim}
    lists = [(name, [l1(amount)]) for name in "abc" for amount in [0, 0.0, 0.1, 0.3, 0.5, 7, 1.0]]
    norms = [1, 2, 3, 0.5, -1, "inf", "-inf"]
    lists += [(name, [ln(amount, n, dim)]) for name in "abc" for n in norms for dim in [0, 1] for amount in [0.5, 2]]
    lists += [("zeros", [ln(3, 0, dim)]) for dim in [0, 1]]
    for name in "abc":
        lists += [
            (name, [ln(0.25, 2, 0), l1(0.3)]),
            (name, [l1(0.3), l1(0.3)]),
            (name, [l1(0.5), ln(0.5, 1, 1), l1(5)]),
            (name, [ln(2, 1, 0), ln(0.5, "-inf", 0)]),
            (name, [ln(1, 1, 0), ln(1, 1, 1), ln(0.5, 2, 0)]),
        ]
    cases = []
    for name, steps in lists:
        one = module(tensors[name])
        for step in steps:
            apply(one, step)
        cases.append({"tensor": name, "steps": steps, "mask": bits(one.weight_mask)})

    together = []
    for before, amount in [(None, 0.4), (None, 25), (None, 0.0), (ln(0.5, 2, 0), 0.4), (l1(0.2), 100)]:
        modules = [module(tensors[name]) for name in "abc"]
        if before:
            for one in modules:
                apply(one, before)
        prune.global_unstructured([(one, "weight") for one in modules], prune.L1Unstructured, amount=amount)
        masks = [bits(getattr(one, "weight_mask", torch.ones_like(one.weight))) for one in modules]
        together.append({"tensors": list("abc"), "before": before, "amount": amount, "masks": masks})

    random = []
    for name in "abc":
        for method, dim in [("random_unstructured", None), ("random_structured", 0), ("random_structured", 1)]:
            for amount in [0.0, 0.5, 0.7, 3]:
                one = module(tensors[name])
                step = {"method": method, "amount": amount} | ({} if dim is None else {"dim": dim})
                apply(one, step)
                random.append({"tensor": name, "step": step, "removed": int((one.weight_mask == 0).sum())})

    out = {
        "torch": torch.__version__,
        "tensors": {name: {"shape": list(t.shape), "weights": t.flatten().tolist()} for name, t in tensors.items()},
        "cases": cases,
        "global": together,
        "random": random,
    }
    (HERE / "torch_prune.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()

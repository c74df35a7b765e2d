"""Makes efficientnet_tiny.safetensors and efficientnet.json: a tiny EfficientNet-Lite with random weights, and what torch
makes of two images.

    python3 efficientnet.py

Needs torch and safetensors. Every kind of layer of the real model is there, an image of odd size, whose padding is
uneven at stride 2, and batch norms with factors of both signs and a zero. The image is given by a rule that the test
has, too.
"""
import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
CONFIG = {
    "model_type": "efficientnet_lite",
    "image_size": 17,
    "image_mean": [127.0, 120.0, 100.0],
    "image_std": [128.0, 64.0, 50.0],
    "stem_channels": 8,
    "kernel_sizes": [3, 5],
    "strides": [1, 2],
    "expand_ratios": [1, 2],
    "out_channels": [4, 8],
    "num_block_repeats": [1, 2],
    "hidden_dim": 12,
    "hidden_act": "relu6",
    "batch_norm_eps": 0.001,
    "num_labels": 5,
}


def weights():
    torch.manual_seed(23)
    tensors = {}

    def convolution(name, out, into, kernel, norm):
        tensors[f"{name}.weight"] = torch.randn(out, into, kernel, kernel) * (4 / (into * kernel * kernel)) ** 0.5
        gamma = (torch.rand(out) + 0.5) * torch.where(torch.rand(out) < 0.3, -1.0, 1.0)
        gamma[out // 2] = 0.0
        tensors[f"{norm}.weight"] = gamma
        tensors[f"{norm}.bias"] = torch.randn(out)
        tensors[f"{norm}.running_mean"] = torch.randn(out) * 0.5
        tensors[f"{norm}.running_var"] = torch.rand(out) + 0.2

    convolution("_conv_stem", 8, 3, 3, "_bn0")
    channels, i = 8, 0
    for kernel, expand, out, blocks in zip(
        CONFIG["kernel_sizes"], CONFIG["expand_ratios"], CONFIG["out_channels"], CONFIG["num_block_repeats"]
    ):
        for _ in range(blocks):
            block, wide = f"_blocks.{i}.", channels * expand
            if expand != 1:
                convolution(block + "_expand_conv", wide, channels, 1, block + "_bn0")
            convolution(block + "_depthwise_conv", wide, 1, kernel, block + "_bn1")
            convolution(block + "_project_conv", out, wide, 1, block + "_bn2")
            channels, i = out, i + 1
    convolution("_conv_head", 12, channels, 1, "_bn1")
    tensors["_fc.weight"], tensors["_fc.bias"] = torch.randn(5, 12), torch.randn(5)
    return tensors


def forward(tensors, x):
    def same(x, name, stride=1, groups=1):
        w = tensors[f"{name}.weight"].double()
        k, size = w.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + k - size, 0)
        before = pad // 2
        return F.conv2d(F.pad(x, (before, pad - before) * 2), w, stride=stride, groups=groups)

    def norm(x, name):
        mean, variance, gamma, beta = (
            tensors[f"{name}.{part}"].double() for part in ["running_mean", "running_var", "weight", "bias"]
        )
        return F.batch_norm(x, mean, variance, gamma, beta, eps=CONFIG["batch_norm_eps"])

    x = F.relu6(norm(same(x, "_conv_stem", 2), "_bn0"))
    i = 0
    for stride, expand, blocks in zip(CONFIG["strides"], CONFIG["expand_ratios"], CONFIG["num_block_repeats"]):
        for j in range(blocks):
            block, inputs = f"_blocks.{i}.", x
            if expand != 1:
                x = F.relu6(norm(same(x, block + "_expand_conv"), block + "_bn0"))
            step = stride if j == 0 else 1
            x = F.relu6(norm(same(x, block + "_depthwise_conv", step, x.shape[1]), block + "_bn1"))
            x = norm(same(x, block + "_project_conv"), block + "_bn2")
            if step == 1 and inputs.shape == x.shape:
                x = x + inputs
            i += 1
    x = F.relu6(norm(same(x, "_conv_head"), "_bn1"))
    return F.linear(x.mean((2, 3)), tensors["_fc.weight"].double(), tensors["_fc.bias"].double())


def image(which):
    """Channel c of pixel p is a byte of a multiplicative hash."""
    size = CONFIG["image_size"]
    channel = [(n + 1000 * which) * 2654435761 >> 13 & 255 for n in range(3 * size * size)]
    pixels = torch.tensor(channel).reshape(-1, 3)
    mean, std = torch.tensor(CONFIG["image_mean"]), torch.tensor(CONFIG["image_std"])
    return ((pixels.double() - mean) / std).T.reshape(1, 3, size, size)


def main():
    tensors = weights()
    with torch.no_grad():
        logits = [forward(tensors, image(which))[0].tolist() for which in range(2)]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "efficientnet_tiny.safetensors")
    (HERE / "efficientnet.json").write_text(json.dumps({"config": CONFIG, "logits": logits}) + "\n")


if __name__ == "__main__":
    main()

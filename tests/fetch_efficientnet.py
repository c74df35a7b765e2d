"""Makes a folder with config, weights and class names of the checkpoint of EfficientNet-Lite0. fetch-efficientnet.sh
runs it, with `numpy` and `safetensors`.

    python3 fetch_efficientnet.py FILE.pth NAMES.json FOLDER

The checkpoint is of torch's old form: pickles, then the raw numbers of each storage. It is read here without torch, of
which nothing else is needed. Tensors lie in other orders than their shapes say (their strides do); safetensors has none
of these, so they are brought into order. The same file always gives the same bytes.
"""
import collections
import json
import pathlib
import pickle
import sys

import numpy as np
from safetensors.numpy import save_file

TYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

# Tan & Le 2019 (arXiv:1905.11946), table 1, in the lite variant: no squeeze and excitation, ReLU6, and stem and head of
# fixed width. Lists have an entry for each stage.
CONFIG = {
    "model_type": "efficientnet_lite",
    "architectures": ["EfficientNetLite0"],
    "image_size": 224,
    "image_mean": [127.0, 127.0, 127.0],
    "image_std": [128.0, 128.0, 128.0],
    "stem_channels": 32,
    "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "strides": [1, 2, 2, 2, 1, 2, 1],
    "expand_ratios": [1, 6, 6, 6, 6, 6, 6],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
    "num_block_repeats": [1, 2, 2, 3, 3, 4, 1],
    "hidden_dim": 1280,
    "hidden_act": "relu6",
    "batch_norm_eps": 0.001,
}


class Storage:
    """Numbers that tensors are views of; they come after the pickle."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.numbers = None


class Tensor:
    def __init__(self, storage, offset, shape, strides):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self):
        """In the order of its shape."""
        of = self.storage.numbers[self.offset :]
        strides = [stride * of.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(of, self.shape, strides))


class Unpickler(pickle.Unpickler):
    """Of what a checkpoint needs; other names are refused, as a pickle may call anything."""

    def __init__(self, file):
        super().__init__(file)
        self.storages = {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, shape, strides)
        if module == "torch" and name in TYPES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")

    def persistent_load(self, identifier):
        _, kind, key, _, _, view = identifier
        if view is not None:
            raise pickle.UnpicklingError("a storage is a part of another")
        return self.storages.setdefault(key, Storage(TYPES[kind]))


def read(path):
    """The tensors of a checkpoint, by name."""
    with open(path, "rb") as file:
        if pickle.load(file) != 0x1950A86A20F9469CFC6C:
            sys.exit(f"{path}: is no checkpoint of torch's old form")
        if pickle.load(file) != 1001 or not pickle.load(file)["little_endian"]:
            sys.exit(f"{path}: is of another version or byte order")
        unpickler = Unpickler(file)
        tensors = unpickler.load()
        for key in pickle.load(file):
            storage = unpickler.storages[key]
            count = int.from_bytes(file.read(8), "little")
            storage.numbers = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
    return {name: tensor.array() for name, tensor in tensors.items()}


def main():
    checkpoint, names, folder = sys.argv[1:]
    folder = pathlib.Path(folder)
    folder.mkdir()
    tensors = {name: array for name, array in read(checkpoint).items() if array.dtype == np.float32}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    labels = json.loads(pathlib.Path(names).read_text(encoding="utf-8"))
    config = CONFIG | {"id2label": {str(i): name for i, name in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""2:4 structured sparsity: prune, compress and multiply weights of numpy and torch.

In a 2:4 matrix at most two of every four consecutive weights of a row are
non-zero. `prune` chooses which, `compress` keeps them in about half the bytes,
and a `Linear` layer multiplies by them on a GPU or on the CPU. `Encoder` and
`Generator` run whole models, `load_file` and `save_file` read and write
checkpoints, and `bench` measures, each result verified first. `sparse24.torch`
puts 2:4 layers into torch's modules.

Examples
--------
>>> import numpy as np
>>> import sparse24
>>> w = np.random.default_rng(24).standard_normal((8, 16), dtype=np.float32)
>>> pruned = sparse24.prune(w)
>>> compressed = sparse24.compress(pruned)
>>> compressed.shape, compressed.values.shape
((8, 16), (8, 8))
>>> bool((sparse24.decompress(compressed) == pruned).all())
True
>>> layer = sparse24.Linear(compressed, activation="relu", device="cpu")
>>> layer(np.ones((3, 16), np.float32)).shape
(3, 8)
"""

from ._bench import bench
from ._device import Device, devices
from ._files import load_file, save_file
from ._linear import Linear
from ._native import VERSION as __version__
from ._sparse import Sparse24, compress, decompress, prune
from ._text import Encoder, Generated, Generator

__all__ = [
    "Device",
    "Encoder",
    "Generated",
    "Generator",
    "Linear",
    "Sparse24",
    "__version__",
    "bench",
    "compress",
    "decompress",
    "devices",
    "load_file",
    "prune",
    "save_file",
]

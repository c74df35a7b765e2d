#!/usr/bin/env python3
"""ONNX Runtime's WebGPU provider (Dawn): a peer of `sparse24 bench` on the same GPU. One MatMul in f32, no 2:4.

    pip install onnxruntime-webgpu==1.27.0 onnx==1.23.2 numpy==2.4.6
    python3 benches/peers/ort_webgpu.py [--shapes MxNxK,...] [--quick] [--out FILE] [--device-name NAME --kind KIND]

Weights are the graph's initializer; activations and results stay on the GPU, and no transfer is timed. A sample ends
with the first output's arrival on the host, a constant part of a millisecond. Before a row is timed ONNX Runtime's
profile must say that its WebGPU provider ran the MatMul. The adapter's name is asked of Vulkan: the first of the
best kind, as Dawn chooses; elsewhere (D3D12, Metal) say --device-name and --kind.

On software: VK_ICD_FILENAMES=<SwiftShader's vk_swiftshader_icd.json>; Dawn refuses old llvmpipe (Mesa 22.3).
"""
import ctypes
import ctypes.util
import gc
import json
import os
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
# This folder's numpy.py and torch.py would be imported in place of the libraries.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != HERE]
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

sys.path.append(HERE)
import common  # noqa: E402

sys.path.remove(HERE)

PROVIDER = "WebGpuExecutionProvider"
KINDS = {2: "discrete", 1: "integrated", 3: "virtual", 4: "software"}  # VkPhysicalDeviceType, best first


def session(nodes, x, y, constants, profile=None):
    """A session of a graph from the shape x to the shape y."""
    f32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "peer", [helper.make_tensor_value_info("x", f32, x)], [helper.make_tensor_value_info("y", f32, y)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="sparse24 peer")
    model.ir_version = 8
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    # Else Python's wrapper goes on with the CPU where there is no adapter.
    return ort.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER], enable_fallback=False)


def matmul(w, n, profile=None):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    return session([node], [n, w.shape[1]], [n, w.shape[0]], {"w": w.T}, profile)


def assert_provider(w, x):
    """Runs once with a profile, which says where each node ran."""
    with tempfile.TemporaryDirectory() as folder:
        s = matmul(w, x.shape[0], os.path.join(folder, "profile"))
        s.run(None, {"x": x})
        with open(s.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
    ran = [e["args"] for e in events if e.get("cat") == "Node" and e["args"].get("op_name") and "provider" in e["args"]]
    products = {a["provider"] for a in ran if any(p in a["op_name"] for p in ("MatMul", "Gemm"))}
    if products != {PROVIDER}:
        raise RuntimeError(f"MatMul ran on {', '.join(sorted(products)) or 'nothing that the profile names'}")


class Product:
    """A MatMul with all that it needs on the GPU. Sessions share a device, whose queue runs in order."""

    def __init__(self, w, x):
        n, (m, k) = x.shape[0], w.shape
        self.matmul = matmul(w, n)
        # Python cannot upload: a graph that does nothing leaves its output there.
        self.upload = session([helper.make_node("Add", ["x", "zero"], ["y"])], [n, k], [n, k], {"zero": np.float32(0)})
        # Python cannot wait either: to read one number of the result does.
        ends = {"from": np.array([0, 0]), "to": np.array([1, 1]), "axes": np.array([0, 1])}
        self.first = session([helper.make_node("Slice", ["x", *ends], ["y"])], [n, m], [1, 1], ends)
        uploading = self.upload.io_binding()
        uploading.bind_cpu_input("x", x)
        uploading.bind_output("y", "gpu", 0)
        self.upload.run_with_iobinding(uploading)
        self.uploading = uploading  # owns x on the GPU
        self.call_io, self.wait_io = self.matmul.io_binding(), self.first.io_binding()
        self.call_io.bind_ortvalue_input("x", uploading.get_outputs()[0])
        self.call_io.bind_output("y", "gpu", 0)

    def call(self):
        self.matmul.run_with_iobinding(self.call_io)

    def wait(self):
        self.wait_io.bind_ortvalue_input("x", self.call_io.get_outputs()[0])
        self.wait_io.bind_output("y", "cpu")
        self.first.run_with_iobinding(self.wait_io)

    def output(self):
        return self.call_io.copy_outputs_to_cpu()[0]

    def seconds(self, calls):
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        self.wait()
        return time.perf_counter() - start

    def __del__(self):
        # Buffers must go before the sessions that own their device.
        self.wait_io = self.call_io = self.uploading = None


def build(w, _, x):
    assert_provider(w, x)
    product = Product(w, x)
    return common.Built(product.call, product.output, product.seconds, {"transfers_timed": False})


class Application(ctypes.Structure):
    """VkApplicationInfo."""
    _fields_ = [("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("name", ctypes.c_char_p),
                ("version", ctypes.c_uint32), ("engine", ctypes.c_char_p), ("engine_version", ctypes.c_uint32),
                ("api", ctypes.c_uint32)]


class Properties(ctypes.Structure):
    """VkPhysicalDeviceProperties2 as far as it is read."""
    _fields_ = [("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("api", ctypes.c_uint32),
                ("driver_version", ctypes.c_uint32), ("vendor", ctypes.c_uint32), ("id", ctypes.c_uint32),
                ("kind", ctypes.c_uint32), ("name", ctypes.c_char * 256), ("rest", ctypes.c_uint64 * 256)]


class Driver(ctypes.Structure):
    """VkPhysicalDeviceDriverProperties."""
    _fields_ = [("type", ctypes.c_uint32), ("next", ctypes.c_void_p), ("id", ctypes.c_uint32),
                ("name", ctypes.c_char * 256), ("info", ctypes.c_char * 256), ("version", ctypes.c_uint8 * 4)]


def adapters():
    """What Vulkan has: (kind, name, driver) in its order. Empty where there is no Vulkan."""
    path = "vulkan-1" if os.name == "nt" else ctypes.util.find_library("vulkan") or "libvulkan.so.1"
    try:
        vk = ctypes.CDLL(path)
    except OSError:
        return []
    application = Application(api=(1 << 22) | (1 << 12))  # Vulkan 1.1
    create = (ctypes.c_uint64 * 8)(1, 0, 0, ctypes.addressof(application))  # VkInstanceCreateInfo
    instance = ctypes.c_void_p()
    if vk.vkCreateInstance(create, None, ctypes.byref(instance)):
        return []
    count = ctypes.c_uint32()
    vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    devices = (ctypes.c_void_p * count.value)()
    vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    found = []
    for device in devices:
        driver = Driver(type=1000196000)
        properties = Properties(type=1000059001, next=ctypes.addressof(driver))
        vk.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(device), ctypes.byref(properties))
        found.append((KINDS.get(properties.kind, "other"), properties.name.decode(),
                      f"{driver.name.decode()} {driver.info.decode()}".strip() or None))
    vk.vkDestroyInstance(instance, None)
    return found


def main():
    p = common.parser(__doc__, threads=False)
    p.add_argument("--device-name", help="the adapter's name, where Vulkan is not asked")
    p.add_argument("--kind", choices=tuple(KINDS.values()), help="what the adapter is")
    args = p.parse_args()
    if (args.device_name is None) != (args.kind is None):
        p.error("--device-name and --kind go together")
    if PROVIDER not in ort.get_available_providers():
        sys.exit(f"this onnxruntime has no {PROVIDER}: pip install onnxruntime-webgpu")
    try:
        assert_provider(np.ones((64, 64), np.float32), np.ones((64, 64), np.float32))
    except Exception as e:
        sys.exit(f"{PROVIDER} does not run here: {str(e).strip().splitlines()[-1]}")
    if args.device_name:
        device = common.Device(args.device_name, args.kind)
        reproduce = ["--device-name", args.device_name, "--kind", args.kind]
    else:
        order = list(KINDS.values())
        found = sorted((a for a in adapters() if a[0] in order), key=lambda a: order.index(a[0]))
        if not found:
            sys.exit("Vulkan tells no adapter's name: say --device-name and --kind")
        kind, name, driver = found[0]
        device, reproduce = common.Device(name, kind, driver, "vulkan"), []
    libraries = {"onnx": onnx.__version__}
    way = common.Way("dense", "ort_matmul", build)
    code = common.run(args, "onnxruntime-webgpu", ort.__version__, libraries, device, [way], reproduce)
    gc.collect()
    return code


if __name__ == "__main__":
    sys.exit(main())

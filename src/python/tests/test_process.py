"""What belongs to a process: the GIL, key presses, forks, the time that an import takes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import sparse24

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks as POSIX has them")


def start(code, *arguments):
    """A Python of its own, which prints READY when what is to be interrupted begins."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


INTERRUPTED = """
    import signal, sys, time
    # What starts the tests in the background has it ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import numpy as np
    import sparse24
    def begin():
        print("READY", flush=True)
        return time.perf_counter()
    {prepare}
    started = begin()
    try:
        {work}
        print("ended by itself")
    except KeyboardInterrupt:
        print("interrupted")
    """

LONG = {
    "prune": (
        "w = np.random.default_rng(1).standard_normal((1024, 1024), dtype=np.float32)",
        "[sparse24.prune(w, method='sparsegpt', inputs=w) for _ in range(99)]",
    ),
    "bench": ("", "sparse24.bench([(1024, 512, 1024)] * 99, device='cpu')"),
    "encode": (
        "encoder = sparse24.Encoder(sys.argv[1], device='cpu')",
        "encoder.encode(['the cat sat on the mat . dog ran'] * 4_000_000)",
    ),
    "generate": (
        "generator = sparse24.Generator(sys.argv[2], device='cpu')",
        "[generator.generate('a', max_tokens=40) for _ in range(10**9)]",
    ),
}


@posix
@pytest.mark.parametrize("what", LONG)
def test_a_key_press_ends_what_takes_long(what, tiny_bert, tiny_llama):
    prepare, work = LONG[what]
    process = start(INTERRUPTED.format(prepare=prepare, work=work), tiny_bert.folder, tiny_llama[0])
    assert process.stdout.readline() == "READY\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert output == "interrupted\n"
    assert time.monotonic() - pressed < 20


def test_other_threads_go_on_while_something_is_computed():
    w = np.random.default_rng(1).standard_normal((512, 512), dtype=np.float32)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.perf_counter()
    sparse24.prune(w, method="sparsegpt", inputs=w)
    ended = time.perf_counter()
    done.set()
    thread.join()
    within = [at for at in ticks if started < at < ended]
    # It gets a turn every few milliseconds; with the GIL held it would get none.
    assert len(within) > (ended - started) / 0.1 and len(within) >= 2, (len(within), ended - started)


@posix
def test_use_after_a_fork_is_an_error_and_no_hang(tiny_bert):
    code = """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import numpy as np
        import sparse24
        encoder = sparse24.Encoder(sys.argv[1], device="cpu")
        encoder.encode(["cat"])
        layer = sparse24.Linear(np.eye(4, dtype=np.float32), device="cpu")
        layer(np.ones((1, 4), np.float32))
        uses = [
            lambda: encoder.encode(["cat"]), lambda: layer(np.ones((1, 4), np.float32)),
            lambda: sparse24.Device("cpu"), lambda: sparse24.prune(np.eye(4, dtype=np.float32)),
            lambda: sparse24.compress(np.eye(4, dtype=np.float32)), lambda: sparse24.devices(),
            lambda: sparse24.bench("8x8x8", device="cpu", quick=True),
        ]
        child = os.fork()
        if child == 0:
            for use in uses:
                try:
                    use()
                    print("no error", flush=True)
                except RuntimeError as e:
                    print("forked" if "was forked from process" in str(e) and "spawn" in str(e) else e, flush=True)
            # It ends as any process does, with all that it has.
            del encoder, uses
            sys.exit(0)
        _, status = os.waitpid(child, 0)
        print("child", status)
        print("parent", encoder.encode(["cat"]).shape)
        """
    output, _ = start(code, tiny_bert.folder).communicate(timeout=60)
    assert output.splitlines() == ["forked"] * 7 + ["child 0", "parent (1, 40)"]


@posix
def test_a_child_may_use_it_if_the_parent_did_not(tiny_bert):
    code = """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import sparse24
        child = os.fork()
        if child == 0:
            print(sparse24.Encoder(sys.argv[1], device="cpu").encode(["cat"]).shape, flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        """
    output, _ = start(code, tiny_bert.folder).communicate(timeout=60)
    assert output.splitlines() == ["(1, 40)", "0"]


def _encoded(encoder):
    return encoder.encode(["the cat sat"])


def test_an_encoder_goes_to_processes_that_are_spawned(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, "2:4", device="cpu", threads=1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_encoded, (encoder,)), _encoded(encoder))


def test_an_import_brings_no_other_library():
    code = """
        import sys
        import sparse24
        print(sorted({"torch", "ray", "pandas", "ml_dtypes", "pyarrow"} & set(sys.modules)))
        """
    output, _ = start(code).communicate(timeout=60)
    assert output == "[]\n"

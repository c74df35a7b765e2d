"""Records of measurements."""

import numpy as np
import pytest
import sparse24


def test_records_are_verified_rows_of_one_table():
    records = sparse24.bench(
        ["64x8x64", (32, 4, 96)], ops=("dense", "sparse24", "auto", "masked"), device="cpu", quick=True
    )
    rows = [(r["name"], r["op"], r["vector"], r["m"], r["n"], r["k"]) for r in records]
    expected = [("dense", None), ("sparse24", 1), ("sparse24", 32), ("auto", 1), ("auto", 32), ("masked", None)]
    assert rows == [(name, op, v, *sizes) for name, sizes in [("64x8x64", (64, 8, 64)), ("32x4x96", (32, 4, 96))]
                    for op, v in expected]  # fmt: skip
    for record in records:
        assert record["verified"] and record["median_ms"] > 0, record
    assert [r["speedup_vs_dense"] for r in records[::6]] == [1.0, 1.0]


def test_records_are_a_data_frame_as_they_are():
    pandas = pytest.importorskip("pandas", reason="records become a DataFrame")
    frame = pandas.DataFrame(sparse24.bench("32x4x32", vector=1, device="cpu", quick=True))
    assert list(frame["op"]) == ["dense", "sparse24", "masked"] and (frame["median_ms"] > 0).all()


def test_layers_of_known_models():
    records = sparse24.bench("minilm", ops=["dense"], tokens=[1, 2], device="cpu", quick=True, dtype=np.float16)
    assert {(r["name"], r["n"]) for r in records} == {
        (f"minilm.{layer}", n) for layer in ["attention", "ffn_in", "ffn_out"] for n in [1, 2]
    }
    assert {r["dtype"] for r in records} == {"f16"}


@pytest.mark.parametrize("shape", ["64x64", "axbxc", "0x1x1", (1, 2), (1, -1, 4), "tinylm"])
def test_shapes_that_are_none_are_named(shape):
    with pytest.raises(ValueError, match="shape .*(is not out features|size of zero)"):
        sparse24.bench([shape], device="cpu", quick=True)


def test_operations_that_are_none_are_named():
    with pytest.raises(ValueError, match='operation "fast" is not one of'):
        sparse24.bench("8x8x8", ops=["fast"], device="cpu", quick=True)
    with pytest.raises(ValueError, match="names no operation"):
        sparse24.bench("8x8x8", ops=[], device="cpu")
    with pytest.raises(TypeError, match="dtype float64"):
        sparse24.bench("8x8x8", dtype="float64", device="cpu")


def test_what_is_too_large_for_the_machine_is_a_memory_error():
    with pytest.raises(MemoryError, match="out of memory: .* GiB for operands"):
        sparse24.bench((10**6, 10**6, 10**6), device="cpu", quick=True)
    with pytest.raises(ValueError, match="overflows"):
        sparse24.bench((2**40, 2**40, 4), device="cpu", quick=True)

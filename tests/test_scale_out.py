"""What docs/scale-out.md tells one to run: scripts that a shell can read, manifests that are YAML, settings that the config takes."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxgrpo.config.load import load_config
from jaxgrpo.train import main

PAGE = Path("docs/scale-out.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MANIFESTS = [
    manifest for kind, text in BLOCKS if kind == "yaml" for manifest in yaml.safe_load_all(text)
]


def container(kind: str) -> dict:
    return next(m for m in MANIFESTS if m["kind"] == kind)["spec"]["template"]["spec"][
        "containers"
    ][0]


@pytest.mark.parametrize("script", [text for kind, text in BLOCKS if kind == "sh"])
def test_a_shell_reads_the_scripts(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_the_manifests_are_of_what_they_should_be_and_name_each_others_services() -> None:
    assert [m["kind"] for m in MANIFESTS] == ["Service", "Job", "Service", "StatefulSet"]
    job, servers = MANIFESTS[1], MANIFESTS[3]
    assert job["spec"]["template"]["spec"]["subdomain"] == MANIFESTS[0]["metadata"]["name"]
    assert servers["spec"]["serviceName"] == MANIFESTS[2]["metadata"]["name"]
    assert f"--processes={job['spec']['completions']}" in container("Job")["args"]


def test_the_trainers_flags_are_those_of_the_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    offered = capsys.readouterr().out
    flags = [argument.partition("=")[0] for argument in container("Job")["args"]]
    assert len(flags) == 6 and all(flag in offered for flag in flags)


@pytest.mark.parametrize("where", ["Kubernetes", "Slurm"])
def test_the_servers_overrides_fit_the_config(where: str) -> None:
    """The config names servers that are there and GPUs to train on; one that serves has neither, but a GPU of its own."""
    if where == "Kubernetes":
        overrides = [
            a.removeprefix("--set=")
            for a in container("StatefulSet")["args"]
            if a.startswith("--set=")
        ]
    else:
        script = next(
            text for kind, text in BLOCKS if "serve_vllm" in text and kind == "sh"
        ).replace("$((8000 + SLURM_LOCALID))", "8000")
        overrides = [
            quoted or plain
            for quoted, plain in re.findall(r'--set (?:"([^"]*)"|([^\s\']+))', script)
        ]
    config = load_config("configs/multi_host.py", overrides)
    assert (config.vllm.urls, config.vllm.gpus, config.training.gpus) == ((), (0,), ())
    assert (config.vllm.host, config.vllm.port) == ("0.0.0.0", 8000)

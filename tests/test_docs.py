"""What documents show works as it is written."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml

from nvcnn.settings import Evaluation, Export, Prediction, Settings, parse

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def code_of(page: str) -> str:
    """Returns the page's first block of Python."""
    return dedent(re.search(r"^( *)```python\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)[2])


def test_the_example_trains_ten_steps(tmp_path):
    (tmp_path / "example.py").write_text(code_of("docs/python.md"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NVCNN_KERNELS": "auto"}
    run = subprocess.run(
        [sys.executable, tmp_path / "example.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    loss = float(re.fullmatch(r"loss (\d\.\d+), top-1 \d+ %\n", run.stdout)[1])
    assert 0 < loss < 2.3  # it has learned something of its one batch: ten classes at random are ln 10 = 2.3


def test_the_model_of_the_page_is_one(tmp_path):
    (tmp_path / "tiny.py").write_text(code_of("docs/add-a-model.md"))
    spec = spec_from_file_location("tiny", tmp_path / "tiny.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Tiny(num_classes=10)
    logits = model(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    logits.sum().backward()
    assert logits.shape == (2, 10)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page):
    programs = {"train": Settings, "eval": Evaluation, "predict": Prediction, "export": Export}
    for name, flags in re.findall(r"^    .*?python launch/(\w+)\.py ([^#\n]*)", page.read_text(), re.MULTILINE):
        if name in programs and "..." not in flags:
            parse(programs[name], shlex.split(flags))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(("code", "queued"), [(0, ""), (3, "requeue 42\n"), (2, "")])
def test_the_batch_script_goes_on_where_its_time_was_over(tmp_path, code, queued):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"srun() {{ return {code}; }}\nscontrol() {{ echo $*; }}\n")
    environment = os.environ | {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    command = ["bash", ROOT / "docs" / "train.sbatch"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (code, queued, "")


def test_the_job_for_kubernetes_starts_a_rank_for_each_gpu():
    job = yaml.safe_load((ROOT / "docs" / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    replicas, slots = job["spec"]["mpiReplicaSpecs"], job["spec"]["slotsPerWorker"]
    assert replicas.keys() == {"Launcher", "Worker"}
    pods = {name: replica["template"]["spec"] for name, replica in replicas.items()}
    for pod in pods.values():
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    launcher, worker = (pods[name]["containers"][0] for name in ("Launcher", "Worker"))
    arguments = launcher["args"]
    assert int(arguments[arguments.index("-np") + 1]) == replicas["Worker"]["replicas"] * slots
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == str(slots)
    settings = parse(Settings, arguments[arguments.index("launch/train.py") + 1 :])
    assert launcher["command"][-1] == settings.log_dir  # where restart.sh looks
    waits = {
        name: int(arguments[arguments.index(f"oob_tcp_keepalive_{name}") + 1]) for name in ("time", "intvl", "probes")
    }
    assert waits["time"] + waits["intvl"] * waits["probes"] < settings.rank_timeout


@pytest.mark.parametrize(
    ("codes", "times", "started", "code"),
    [
        ("0", 3, 1, 0),
        ("1 3 0", 3, 3, 0),  # a failure, a signal
        ("lost 0", 3, 2, 0),  # mpiexec has lost a host, and says 0
        ("2 0", 3, 1, 2),  # bad usage
        ("1 2 0", 3, 3, 0),  # a port that the one before still holds
        ("1 1 1 0", 2, 3, 1),
        ("lost lost 0", 1, 2, 1),
        ("signal 0", 3, 1, 3),  # it had come to the loop, which passes it on
    ],
)
def test_the_loop_starts_again_until_it_is_trained(tmp_path, codes, times, started, code):
    (tmp_path / "train").write_text(
        """codes=($1); n=$(cat n); echo $((n + 1)) >n; echo '{"event": "start", "step": 0, "steps": 40}' >>metrics.jsonl
        case ${codes[n]} in
          0) touch checkpoint-00000040.pt;;
          lost) exit 0;;
          signal) trap 'exit 3' USR1; kill -TERM $PPID; while true; do read -t 1; done <> <(:);;
        esac
        exit ${codes[n]}"""
    )
    (tmp_path / "n").write_text("0")
    command = ["bash", ROOT / "docs" / "restart.sh", str(times), ".", "bash", "train", codes]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PAUSE": "0"}, capture_output=True, text=True)
    assert (run.returncode, run.stdout, int((tmp_path / "n").read_text())) == (code, "", started), run.stderr

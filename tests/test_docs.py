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

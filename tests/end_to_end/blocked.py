"""Runs launch/train.py where nothing but torch, triton and what torch itself needs can be imported."""

import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path

BLOCKED = (
    *("horovod", "mpi4py", "nvidia", "tensorboard", "matplotlib", "tqdm"),
    *("numpy", "PIL", "google_crc32c", "yaml", "torchvision", "timm"),
)


class Finder(PathFinder):
    """Finds what Python's own does, but for what is blocked."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in BLOCKED else super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
script = Path(__file__).parents[2] / "launch/train.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")

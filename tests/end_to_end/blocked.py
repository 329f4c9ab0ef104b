"""launch/train.py where nothing but torch, triton and what torch itself needs can be imported."""

import runpy
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

BLOCKED = (
    *("horovod", "mpi4py", "nvidia", "tensorboard", "matplotlib", "tqdm"),
    *("numpy", "PIL", "google_crc32c", "yaml", "torchvision", "timm"),
)


class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
script = Path(__file__).parents[2] / "launch/train.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")

"""What decodes the images: DALI on the GPU, DALI on the CPU, or Pillow in worker processes."""

from importlib.util import find_spec
from typing import Any

import torch

from nvcnn.data.dali import EvaluationData, TrainingData
from nvcnn.data.dataset import Dataset
from nvcnn.data.options import EvaluationOptions, TrainingOptions
from nvcnn.data.pillow_workers import WorkerEvaluationData, WorkerTrainingData
from nvcnn.data.resharded import ReshardedData
from nvcnn.program import InputError


def choose_backend(asked: str | None, device: torch.device) -> str:
    """Returns `asked`, or DALI on `device` if that is None. Raises InputError when it cannot run here.

    Nothing else is taken instead without being asked for.
    """
    backend = asked or ("dali_gpu" if device.type == "cuda" else "dali_cpu")
    if backend == "dali_gpu" and device.type != "cuda":
        raise InputError("--data_backend=dali_gpu: there is no GPU here: give dali_cpu, or leave the flag out")
    if backend != "torch" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise InputError(
            f"--data_dir needs NVIDIA DALI{f' (--data_backend={backend})' if asked else ''}: "
            "pip install nvidia-dali-cuda130; or --data_backend=torch, which is slower and needs only Pillow"
        )
    return backend


def open_training(
    dataset: Dataset, backend: str, *, state: dict[str, Any] | None = None, **options: Any
) -> TrainingData | ReshardedData | WorkerTrainingData:
    """Returns the reader of the split "train". options: the fields of TrainingOptions. state: where to go on."""
    how = TrainingOptions(**options)
    if backend == "torch":
        return WorkerTrainingData(dataset, how, state)
    if state and "began" in state:
        return ReshardedData(dataset, how, state, decode_on_gpu=backend == "dali_gpu")
    return TrainingData(dataset, how, state, decode_on_gpu=backend == "dali_gpu")


def open_evaluation(dataset: Dataset, backend: str, **options: Any) -> EvaluationData | WorkerEvaluationData:
    """Returns the reader of the split "validation". options: the fields of EvaluationOptions."""
    how = EvaluationOptions(**options)
    if backend == "torch":
        return WorkerEvaluationData(dataset, how)
    return EvaluationData(dataset, how, decode_on_gpu=backend == "dali_gpu")

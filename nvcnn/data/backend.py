"""What decodes the images: DALI on the GPU, DALI on the CPU, or Pillow in worker processes."""

from importlib.util import find_spec
from typing import Any

import torch

from nvcnn.data.dataset import Dataset
from nvcnn.data.pipeline import EvaluationData, TrainingData
from nvcnn.data.workers import WorkerEvaluationData, WorkerTrainingData
from nvcnn.program import InputError


def choose_backend(asked: str | None, device: torch.device) -> str:
    """`asked`, else DALI on `device`. Raises InputError when it cannot run here: there is no silent fallback."""
    backend = asked or ("dali_gpu" if device.type == "cuda" else "dali_cpu")
    if backend == "dali_gpu" and device.type != "cuda":
        raise InputError("--data_backend=dali_gpu: there is no GPU here: give dali_cpu, or leave the flag out")
    if backend != "torch" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise InputError(
            f"--data_dir needs NVIDIA DALI{f' (--data_backend={backend})' if asked else ''}: pip install nvcnn[dali]; "
            "or --data_backend=torch, slower, which needs Pillow alone"
        )
    return backend


def open_training(dataset: Dataset, backend: str, **options: Any) -> TrainingData | WorkerTrainingData:
    if backend == "torch":
        return WorkerTrainingData(dataset, **options)
    return TrainingData(dataset, decode_on_gpu=backend == "dali_gpu", **options)


def open_evaluation(dataset: Dataset, backend: str, **options: Any) -> EvaluationData | WorkerEvaluationData:
    if backend == "torch":
        return WorkerEvaluationData(dataset, **options)
    return EvaluationData(dataset, decode_on_gpu=backend == "dali_gpu", **options)

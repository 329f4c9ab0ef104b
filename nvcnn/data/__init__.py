"""Samples of a data directory to uint8 batches on the training device."""

from nvcnn.data.backend import choose_backend, open_evaluation, open_training
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.data.dali import EvaluationData, TrainingData
from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.pillow_workers import WorkerEvaluationData, WorkerTrainingData
from nvcnn.data.synthetic import SyntheticData

__all__ = [
    "Batch",
    "Dataset",
    "EvaluationData",
    "SyntheticData",
    "TrainingData",
    "WorkerEvaluationData",
    "WorkerTrainingData",
    "choose_backend",
    "find_dataset",
    "open_evaluation",
    "open_training",
    "prepare_input",
]

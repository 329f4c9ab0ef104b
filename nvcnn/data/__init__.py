"""Records to uint8 batches on the training device."""

from nvcnn.data.batch import Batch, prepare_input
from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.pipeline import EvaluationData, TrainingData
from nvcnn.data.synthetic import SyntheticData

__all__ = ["Batch", "Dataset", "EvaluationData", "SyntheticData", "TrainingData", "find_dataset", "prepare_input"]

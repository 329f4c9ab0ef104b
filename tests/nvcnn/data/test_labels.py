"""Labels from which nothing can be learned, or which come in order, are said before a run."""

import pytest

from nvcnn.data.labels import doubts
from nvcnn.distributed import Transport
from nvcnn.plan import find_training_data
from nvcnn.program import InputError, Launch
from nvcnn.settings import Settings
from nvcnn.train import Run
from tests.samples import write_split


class Labels(list):
    """A source of nothing but labels; None for a sample that cannot be read."""

    def read(self, i):
        if self[i] is None:
            raise InputError(f"sample {i} cannot be read")
        return b"", self[i]

    def firsts(self):
        return [0]


SAME = "all 64 images looked at, of 9000, have the label 7: if all have it, there is nothing to learn"
IN_ORDER = "the first 64 images all have the label 0: shuffle when shards are made"


@pytest.mark.parametrize(
    ("labels", "backend", "said"),
    [
        ([7] * 9000, "torch", SAME),
        ([None, *[7] * 8999], "torch", SAME.replace("64", "63")),
        ([1] * 8, "dali_cpu", SAME.replace("64", "8").replace("9000", "8").replace("label 7", "label 1")),
        ([i // 900 for i in range(9000)], "dali_cpu", IN_ORDER),
        ([i // 900 for i in range(9000)], "torch", None),
        ([i // 400 for i in range(4000)], "dali_cpu", None),  # DALI mixes all of them
        ([i % 10 for i in range(9000)], "dali_gpu", None),
        ([0] * 8900 + [1] * 100, "dali_cpu", SAME.replace("label 7", "label 0")),
        ([0] * 100 + [int(i % 17 == 0) for i in range(8900)], "dali_cpu", None),  # most are of one class
        ([None] * 9000, "dali_cpu", None),
    ],
)
def test_labels_that_are_looked_at(labels, backend, said):
    found = doubts(Labels(labels), backend)
    assert len(found) == (said is not None)
    assert not said or found[0].startswith(said)


def test_a_run_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_split(tmp_path, "train", images=8, shards=2, label=lambda i: 3)
    flags = {"batch_size": 4, "num_batches": 1, "num_classes": 9, "data_backend": "torch", "conv": "torch"}
    settings = Settings(model="trivial", data_dir=str(tmp_path), **flags)
    assert Run(settings, find_training_data(settings), Transport(Launch()), None).loop() == 0
    assert "\nInput:       torch\n  all 8 images looked at, of 8, have the label 3: " in capsys.readouterr().out

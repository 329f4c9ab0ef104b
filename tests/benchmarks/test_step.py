import copy

import pytest
import torch

import nvcnn
from benchmarks import step


@pytest.fixture
def case(device) -> step.Case:
    return step.Case(device, "resnet18", 2, 32, torch.float32)


def test_every_peer_has_a_row_measured_or_with_its_reason(case):
    def absent(_):
        raise ModuleNotFoundError("No module named 'absent'")

    def broken(_):
        return lambda: 1 // 0

    written: list[list[dict]] = []
    peers = {"torchvision": step.torchvision, "absent": absent, "broken": broken}
    rows = step.compare(case, peers, rounds=2, repeat=1, write=lambda rows: written.append(copy.deepcopy(rows)))
    assert [row["name"].rpartition("/ ")[2] for row in rows] == list(peers)
    assert rows[0]["unit"] == "images/s"
    assert min(rows[0][key] for key in ("ours", "peer", "ratio")) > 0
    assert "torchvision" in rows[0]["note"]
    assert [row["note"] for row in rows[1:]] == [
        "ModuleNotFoundError: No module named 'absent'",
        "ZeroDivisionError: integer division or modulo by zero",
    ]
    # Written as it goes: a run that is ended during the second peer leaves the first, and the second by name.
    assert [len(rows) for rows in written] == [1, 1, 2, 2, 3, 3]
    assert written[2][0] == rows[0]
    assert "ended while" in written[2][1]["note"]


def test_ours_with_another_algorithm_has_a_row(case):
    (row,) = step.compare(case, {"nvcnn, --conv=triton": step.OURS["nvcnn, --conv=triton"]}, rounds=1, repeat=1)
    assert row["ratio"] > 0, row["note"]
    assert row["note"] == f"nvcnn {nvcnn.__version__}"


def test_timm_has_a_row_too(case):
    (row,) = step.compare(case, {"timm": step.timm}, rounds=1, repeat=1)
    assert row["ratio"] > 0, row["note"]


def test_a_peer_has_the_fastest_cudnn_and_leaves_ours_as_it_was(case):
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, images):
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark))
            return super().forward(images.mean((2, 3)))

    before = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    step.synthetic(case, Model(3, 1000))()
    assert seen == [(True, True)]
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_plain_loop_trains(device, dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    loop = step.plain_loop(model, device=device, dtype=dtype)
    images, labels = torch.randn(16, 3, 2, 2, device=device), torch.arange(16, device=device) % 4
    losses = [float(loop(images, labels)) for _ in range(50)]
    assert losses[-1] < losses[10] < losses[0]


def test_a_gpu_that_is_not_here_is_bad_usage(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["step", "--device=cuda"])
    with pytest.raises(SystemExit) as stopped:
        step.main()
    assert stopped.value.code == 2
    assert "--device=cuda: no GPU here" in capsys.readouterr().err

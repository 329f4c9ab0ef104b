import copy
from types import SimpleNamespace

import pytest
import torch

import nvcnn
from benchmarks import peers, step
from nvcnn.distributed import Transport
from nvcnn.machine import use_device
from nvcnn.program import Launch


@pytest.fixture
def case(device) -> step.Case:
    return step.Case(device, "resnet18", 2, 32, torch.float32)


def test_every_peer_has_a_row_measured_or_with_its_reason(case):
    def absent(_):
        raise ModuleNotFoundError("No module named 'absent'")

    def broken(_):
        return lambda: 1 // 0

    written: list[list[dict]] = []
    others = {"torchvision": step.torchvision, "absent": absent, "broken": broken}
    rows = step.compare(case, others, rounds=2, repeat=1, write=lambda rows: written.append(copy.deepcopy(rows)))
    assert [row["name"].rpartition("/ ")[2] for row in rows] == list(others)
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


def test_ours_with_another_algorithm_and_timm_have_a_row_too(case):
    others = {"nvcnn, --conv=triton": step.OURS["nvcnn, --conv=triton"], "timm": step.timm}
    ours, timm = step.compare(case, others, rounds=1, repeat=1)
    assert ours["ratio"] > 0, ours["note"]
    assert ours["note"] == f"nvcnn {nvcnn.__version__}; both with {peers.CUDNN}"
    assert timm["ratio"] > 0, timm["note"]


def rules() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.enabled, cudnn.benchmark, cudnn.deterministic


def test_a_peer_has_the_rules_of_ours_for_cudnn_and_leaves_them_as_they_were(case, monkeypatch):
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, images):
            seen.append(rules())
            return super().forward(images.mean((2, 3)))

    before = rules()
    step.synthetic(case, Model(3, 1000))()
    assert seen == [(True, True, True)]
    assert rules() == before
    # What a run on a GPU sets for itself:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0"))
    with torch.backends.cudnn.flags(enabled=True):
        use_device(Transport(Launch()))
        assert [rules()] == seen


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

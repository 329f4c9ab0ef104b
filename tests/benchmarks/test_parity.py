"""The table of parity says what is there: equal models are equal, and one that is not is seen."""

import json

import pytest
import torch

from benchmarks import parity
from nvcnn.models import MODELS


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet18", marks=pytest.mark.full)])
def test_a_row_of_the_table(name):
    row = parity.row(name)
    assert row["reference"] == {"lenet": "a plain build", "resnet18": "torchvision"}[name]
    assert (row["parameters"], row["GMACs"]) == {"lenet": (2_172_840, 0.014), "resnet18": (11_689_512, 1.814)}[name]
    assert max(row[f"{what}, float64"] for what in ("logits", "loss", "gradient")) < 1e-9
    assert row["logits, fp32"] < 1e-3


@pytest.mark.parametrize("fault", ["epsilon", "a weight"])
def test_a_difference_is_seen(fault):
    ours, theirs, _ = parity.pair("resnet18")
    if fault == "epsilon":
        ours.bn1.eps = 1e-4
    else:
        ours.layer4[1].conv2.weight.data[3, 2, 1, 0] += 1e-3
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    results = [parity.results(model, x.to(memory_format=torch.channels_last), True) for model in (ours, theirs)]
    assert min(parity.differences(*results).values()) > 1e-9


def test_every_model_has_a_peer_with_as_many_parameters():
    for name in MODELS:
        with torch.device("meta"):
            whole = parity.build_model(name, num_classes=10, seed=1)
            theirs, _ = parity.peer(name, 10)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in whole.parameters()), name


def test_unknown_models_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["parity", "resnet51"])
    with pytest.raises(SystemExit):
        parity.main()
    assert "unknown: resnet51; there are trivial, lenet" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["parity", "lenet", f"--json={tmp_path / 'rows.json'}"])
    assert parity.main() == 0
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["model"] == "lenet"

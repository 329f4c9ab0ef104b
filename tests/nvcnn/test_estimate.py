"""What a dry run says of time and learning rates."""

import json
from pathlib import Path

import pytest
import torch

from nvcnn.estimate import MEASURED, duration, picture, table_of_times
from nvcnn.roofline import GPUS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "-"),
        (0.0234, "0.023 s"),
        (9.94, "9.9 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (12732, "3 h 32 min"),
    ],
)
def test_durations_are_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_the_picture_is_of_the_rates():
    rates = torch.cat([torch.linspace(0, 0.4, 8), torch.full((8,), 0.4), torch.full((16,), 0.2)])
    assert picture(rates, epochs=16, columns=16, rows=2) == [
        "     0.4 |  ▃█████",
        "         |▂▇██████████████",
        "       0 +----------------",
        "          0      16 epochs",
    ]


def test_a_rate_that_stays_0_has_a_picture():
    assert len(picture(torch.zeros(1), epochs=1)) == 10


def test_eight_gpus_share_the_images():
    floors = {gpu.name: 0.5 for gpu in GPUS}
    lines = table_of_times(lambda gpus: 8000 - gpus, 100, floors, {"H200": 50})
    assert lines[0].split() == ["images/s", "of", "one", "1", "GPU", "8", "GPUs"]
    assert lines[3].split() == ["H200", "at", "least", "200", "40", "s", "5", "s"]
    assert lines[4].split() == ["H200", "as", "measured", "50", "3", "min", "20", "s"]


@pytest.mark.parametrize("place", MEASURED, ids=lambda place: place[0])
def test_measured_figures_are_those_of_the_results(place):
    model, size, batch = place
    for gpu, figure in MEASURED[place].items():
        (file,) = RESULTS.glob(f"nvidia-{gpu.lower()}*.json")
        sections = json.loads(file.read_text())["sections"]
        found = []
        for name in ("step", "step-tuned", "step-auto") if model == "resnet50" else (f"step-{model}",):
            for row in sections.get(name, {"rows": ()})["rows"]:
                if row["name"] == "nvcnn --conv=auto":
                    found.append(row["images/s"])
                elif row["name"].startswith(f"step, {model}, batch {batch}, {size} x {size}, float16: nvcnn /"):
                    found.append(row["ours"])
        assert max(found) == figure

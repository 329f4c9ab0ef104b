"""What a report says is counted by the book, whatever the ranks and batches; no text of others is markup in it."""

import re
from html.parser import HTMLParser

import pytest
import torch

from nvcnn.program import InputError
from nvcnn.report import MISTAKES, Tally, check_directory, findings, page, table, write

NAMES = ["cat", "<b>dog</b>", 'e"el', "no image"]
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 0])
LOGITS = torch.tensor(
    [
        [9.0, 0, 0, 0],
        [0, 3, 0, 0],
        [0, 2, 0, 0],
        [0, 9, 0, 0],
        [5, 0, 0, 0],
        [0, 0, 7, 0],
        [0, 4, 0, 0],
        [float("inf"), 0, 0, 0],
    ]
)
IMAGES = torch.arange(8 * 6 * 5 * 3).reshape(8, 6, 5, 3).to(torch.uint8)


def tally(device, *batches, first=0, mistakes=MISTAKES):
    """Returns that of the images of these numbers, batch by batch."""
    found = Tally(first, mistakes)
    for numbers in batches:
        images, labels, logits = (values[list(numbers)].to(device) for values in (IMAGES, LABELS, LOGITS))
        found.add(images, labels, logits, logits.argmax(1))
    return found


def found(device="cpu", **options):
    return findings([tally(device, range(8), **options)], NAMES, 4)


def test_classes_are_counted(device):
    whole = found(device)
    assert [(row.name, row.images, row.right, row.called) for row in whole.classes] == [
        ("cat", 4, 1, 2),
        ("<b>dog</b>", 2, 1, 4),
        ('e"el', 2, 1, 1),
        ("no image", 0, 0, 0),
    ]
    assert whole.pairs == [(2, 0, 1), (1, 1, 0), (1, 2, 1)]
    assert whole.not_finite == 1
    assert [row["top1"] for row in whole.as_json()] == [25, 50, 50, None]
    assert [re.split("  +", line.strip()) for line in table(whole)[1:]] == [
        ["50.00 %", "100.00 %", "2", 'e"el', "<b>dog</b> (50.0 %)"],
        ["50.00 %", "25.00 %", "2", "<b>dog</b>", "cat (50.0 %)"],
        ["25.00 %", "50.00 %", "4", "cat", "<b>dog</b> (50.0 %)"],
    ]


def test_mistakes_are_the_most_confident_first(device):
    """Of images whose logits are not finite there is no probability."""
    mistakes = found(device).mistakes
    assert [(m.image, m.label, m.predicted) for m in mistakes] == [(4, 1, 0), (6, 2, 1), (1, 0, 1), (2, 0, 1)]
    assert -mistakes[0].minus_probability == pytest.approx(LOGITS[4].softmax(0)[0].item())
    assert all(torch.equal(m.picture, IMAGES[m.image]) for m in mistakes)
    assert [m.image for m in found(device, mistakes=2).mistakes] == [4, 6]
    assert found(device, mistakes=0).mistakes == []


def test_ranks_find_what_one_does():
    parts = [tally("cpu", range(2), range(2, 3)), tally("cpu", first=3), tally("cpu", range(3, 8), first=3)]
    one, other = found(), findings(parts, NAMES, 4)
    assert (one.classes, one.pairs, one.not_finite) == (other.classes, other.pairs, other.not_finite)
    assert [m[:4] for m in one.mistakes] == [m[:4] for m in other.mistakes]


class Reader(HTMLParser):
    """Lists tags, what they load, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_no_other_file_and_escapes_names():
    text = page(found(), {"Data": "<i>here</i>"}, lambda i: f"a&b<u>{i}</u>")
    read = Reader(text)
    assert {"b", "i", "u"} & set(read.tags) == {"b"}
    assert read.tags.count("b") == read.tags.count("img") == 4  # what the mistakes were taken for
    assert all(source.startswith("data:image/") for source in read.sources)
    assert {"<b>dog</b>", "<i>here</i>", "a&b<u>4</u>"} <= set(read.text)
    assert "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert 'title="&lt;b&gt;dog&lt;/b&gt; taken for cat: 1 of 2"' in text


def test_a_matrix_too_large_to_read_is_left_out():
    classes = 300
    many = Tally(0, 0)
    labels = torch.arange(classes)
    many.add(torch.zeros(classes, 1, 1, 3), labels, torch.eye(classes), (labels + 1) % classes)
    text = page(findings([many], None, classes), {}, str)
    assert "Confusion matrix" not in text
    assert "100 of 300 pairs" in text
    assert text.count("<tr>") < 2 * classes
    assert "class 299" in text


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--report=.*/file/report: .*/file is a file: give a directory"):
        check_directory(tmp_path / "file/report")
    new = tmp_path / "new/report"
    check_directory(new)
    assert not (tmp_path / "new").exists()
    path = write(new, found(), {}, str)
    before = path.read_bytes()
    assert before.startswith(b"<!DOCTYPE html>")
    with pytest.raises(ZeroDivisionError):
        write(new, found(), {}, lambda i: 1 / 0)
    (tmp_path / "no").symlink_to("/proc/version")
    with pytest.raises(InputError, match=r"--report=.*/no: cannot be written"):
        write(tmp_path / "no", found(), {}, str)
    assert [(file, file.read_bytes()) for file in new.iterdir()] == [(path, before)]

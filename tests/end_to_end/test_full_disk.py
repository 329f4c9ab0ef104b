"""A run on a disk that is full: a small tmpfs, which needs root and a mount namespace of its own."""

import os
import subprocess

import pytest

from nvcnn import checkpoint, plot

SMALL = """
mount -t tmpfs -o size="$1" none "$2" || exit 99
disk=$2 copy=$3; shift 3
"$@"; code=$?
cp -r "$disk/." "$copy"
exit $code
"""


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs root, and to be allowed to mount")
def test_two_ranks_go_on_and_what_was_saved_is_whole(launch, records, tmp_path):
    """There is room for one checkpoint, and no second one beside it: rank 0 alone fails, three times."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    copy.mkdir()
    prefix = ("unshare", "-m", "sh", "-c", SMALL, "sh", "20m", run, copy)
    arguments = ("--model=lenet", "--num_classes=10", f"--data_dir={records}", "--batch_size=32", "--num_epochs=2")
    arguments += (f"--log_dir={run}", "--on_save_error=continue", "--display_every=100")
    text = launch.train(*arguments, ranks=2, prefix=prefix, code=2)
    first, last, best = checkpoint.path_of(run, 10), checkpoint.path_of(run, 20), run / checkpoint.BEST
    failed = "{}: cannot be written (No space left on device); the last good checkpoint is " + str(first)
    assert f"Checkpoint written to {first}" in text
    assert f"Not saved after step 10: {failed.format(best)}; training goes on, and tries again in 60 s" in text
    assert f"Not saved after step 20: {failed.format(last)}" in text
    assert f"Not saved after step 20: {failed.format(best)}" in text
    assert f"train.py: {failed.format(last)}" in text
    assert "Traceback" not in text
    assert [path.name for path in checkpoint.in_directory(copy)] == [first.name]
    assert checkpoint.load(copy / first.name)
    assert not (copy / ".part").exists()
    assert [event["step"] for event in plot.read(copy) if event["event"] == "eval"] == [10, 20]

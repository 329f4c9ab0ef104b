"""Every data set is written by one machinery, whatever stops a run or was there before; the program starts it."""

import errno
import itertools
import json
import multiprocessing
import os
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from nvcnn.data.dataset import find_dataset
from nvcnn.data.tfrecord import decode_example
from nvcnn.prepare import folder, formats, shards, write
from nvcnn.prepare.blueprint import Blueprint
from nvcnn.prepare.progress import progress
from nvcnn.prepare.verify import verify
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import contents, flip, inodes, records, run
from tests.raw_imagenet import photograph, unpack
from tests.samples import file_of

SHARD = "train-00003-of-00006"


def test_the_number_of_workers_changes_no_byte(folders, prepared, tmp_path):
    run(folders, tmp_path / "out", 3)
    assert contents(tmp_path / "out") == contents(prepared)


def test_the_seed_changes_the_order(folders, prepared, tmp_path):
    run(folders, tmp_path / "out", seed=2)
    one, other = (records(directory, "train") for directory in (prepared, tmp_path / "out"))
    assert one != other
    assert sorted(one) == sorted(other)
    labels = [decode_example(record)["image/class/label"][0] for record in one]
    assert sum(a == b for a, b in itertools.pairwise(labels)) < len(labels) / 2  # shuffled, not by class


# Killed runs


def test_a_killed_run_leaves_no_worker_and_goes_on_where_it_was(folders, prepared, tmp_path, monkeypatch, capfd):
    """The run is killed when both of its workers are in the middle of a shard."""
    out, written = tmp_path / "out", shards.Summed.write
    reader, writer = os.pipe()

    def write_or_hang(summed, data):
        if any(name in summed.file.name for name in (SHARD, "train-00004")) and summed.size:
            os.write(writer, b".")
            time.sleep(60)
            os._exit(1)  # so that it ends even where the end of the run does not end it
        return written(summed, data)

    with monkeypatch.context() as patched:
        patched.setattr(shards.Summed, "write", write_or_hang)
        process = multiprocessing.get_context("fork").Process(target=run, args=(folders, out, 2))
        process.start()
    os.close(writer)
    assert [os.read(reader, 1) for _ in range(2)] == [b".", b"."]
    process.kill()
    process.join()
    ended, _, _ = select.select([reader], [], [], 30)  # at the end of a pipe that no process has open any more
    assert ended, "a worker outlives the run"
    assert os.read(reader, 1) == b""
    os.close(reader)
    kept = inodes(out)
    assert sorted(kept) == [f"train-0000{i}-of-00006" for i in range(3)]
    assert len(list(out.glob(".*.tmp"))) == 2
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=r"--data_dir=.*: prepare\.py has not finished there"):
            find_dataset(out, num_classes=None, label_base=None, split=split)
    capfd.readouterr()
    run(folders, out, 2)
    printed = capfd.readouterr().out
    assert "train-00002" not in printed
    assert f"{SHARD}: 8 images" in printed
    assert kept.items() <= inodes(out).items()
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("point", ["shard", "index", "part", "dataset.json", "manifest.json", "removal"])
def test_killed_at_a_certain_point_it_ends_with_the_same_bytes(folders, prepared, tmp_path, monkeypatch, point):
    """The points lie between any two of the steps by which files appear."""
    out, replace = tmp_path / "out", os.replace
    last = {"shard": SHARD, "index": f"{SHARD}.idx", "part": f"{SHARD}.json"}.get(point, point)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def replace_or_die(source, target):
        die() if Path(target).name == last else replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_or_die)
        if point == "removal":
            patched.setattr(write.shutil, "rmtree", die)
        process = multiprocessing.get_context("fork").Process(target=run, args=(folders, out))
        process.start()
        process.join()
    assert process.exitcode != 0
    assert contents(out) != contents(prepared)
    run(folders, out)
    assert contents(out) == contents(prepared)


# A directory that was begun or finished before


def test_a_complete_directory_is_left_alone(folders, prepared, capfd):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    run(folders, prepared)
    assert capfd.readouterr().out.endswith(f"Class folders in {prepared} is complete\n")
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def change_json(path: Path, change) -> None:
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))


LOST = {
    "a shard": lambda d: (d / SHARD).unlink(),
    "an index": lambda d: (d / "validation-00000-of-00002.idx").unlink(),
    "dataset.json": lambda d: (d / "dataset.json").unlink(),
    "class names": lambda d: change_json(d / "dataset.json", lambda text: text.pop("class_names")),
    "sums": lambda d: change_json(d / "manifest.json", lambda text: (text.pop("files"), text.pop("sha256"))),
    "the size of a shard": lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes() + b"more"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_is_lost_is_made_again(folders, prepared, copy, lost):
    kept = (copy / "train-00005-of-00006").stat().st_ino
    LOST[lost](copy)
    run(folders, copy)
    assert contents(copy) == contents(prepared)
    assert (copy / "train-00005-of-00006").stat().st_ino == kept


@pytest.fixture(scope="module")
def stopped(folders, tmp_path_factory) -> Path:
    """Returns a directory with all shards, where the run was stopped before it wrote the files beside them."""

    def stop(*_):
        raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(write, "beside", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folders, out)
    return out


OTHER = {
    "seed": ({"seed": 2}, r"begun with --seed=1, now with --seed=2"),
    "max_side": ({"max_side": 30}, r"begun without --max_side, now with --max_side=30"),
    "check": ({"check": "decode"}, r"begun with --check=structure, now with --check=decode"),
    "format": ({"file_format": "webdataset"}, r"holds dataset|holds train-00000-of-00006"),
    "shards": ({"shards": (7, 2)}, r"holds train-00000-of-00006, .* or the flags it was begun with"),
    "fewer splits": ({"val": None}, r"holds validation-"),
}


@pytest.mark.parametrize("which", ["prepared", "stopped"])
@pytest.mark.parametrize("other", OTHER)
def test_other_flags_are_refused(folders, request, which, other):
    changes, what = OTHER[other]
    out = request.getfixturevalue(which)
    before = contents(out)
    with pytest.raises(InputError, match=rf"--out={out}: .*({what})"):
        run(folders, out, **changes)
    assert contents(out) == before


@pytest.mark.parametrize("change", ["added", "longer", "class"])
def test_other_sources_are_refused(raw, prepared, tmp_path, change):
    train, val = unpack(raw, tmp_path / "raw")
    one = train / "n02119789" / "n02119789_4.JPEG"
    if change == "added":
        one.with_name("new.jpg").write_bytes(file_of(photograph(1, 1)))
    elif change == "longer":
        one.write_bytes(one.read_bytes() + b"\0")
    else:
        (train / "n02119789").rename(train / "n02119790")
        (val / "n02119789").rename(val / "n02119790")
    what = "with other classes" if change == "class" else "made from other images"
    with pytest.raises(InputError, match=rf"--out={prepared}: .*{what}"):
        run((train, val), prepared)


def test_validation_images_where_there_were_none(folders, tmp_path):
    run(folders, tmp_path / "out", val=None)
    with pytest.raises(InputError, match=r"--out=.*: was begun without validation images: do so now, or give another"):
        run(folders, tmp_path / "out")


def made(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if text is None else path.write_text(text)


OURS = r"was not written by prepare\.py: delete it, and prepare"
REFUSED = {  # what --out is before the run, and what is said of it
    "a file": (lambda out: made(out, ""), r"cannot be made \(File exists\)"),
    "another file in it": (lambda out: made(out / "thesis.tex", ""), r"holds thesis\.tex"),
    "a directory for a shard": (lambda out: made(out / SHARD), f"holds {SHARD}, which is not of this data set"),
    "a directory for the manifest": (lambda out: made(out / "manifest.json"), r"holds manifest\.json, which is not of"),
    "flags not ours": (lambda out: made(out / ".unfinished/flags", "[]"), rf"\.unfinished/flags: {OURS}"),
    "a part not ours": (
        lambda out: made(out / f".unfinished/{SHARD}.json", '{"images": 1}'),
        rf"{SHARD}\.json: {OURS}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_out_with_something_else(folders, tmp_path, case):
    prepare, what = REFUSED[case]
    prepare(tmp_path / "out")
    with pytest.raises(InputError, match=rf"{tmp_path}/out.*{what}"):
        run(folders, tmp_path / "out")


def test_an_out_that_cannot_be_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"--out=.*out: is not readable and writable"):
        run(folders, tmp_path / "out")


def test_a_directory_of_another_data_set_is_refused(prepared):
    with pytest.raises(InputError, match="holds Class folders, not other"):
        write.begun(Blueprint("other", (), {}, {}, folder.encode_file, ""), prepared)


def test_two_runs_at_once(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "LOCK_WAIT", 0.1)
    with write.locked(tmp_path), pytest.raises(InputError, match=r"--out=.*another prepare\.py is writing"):
        run(folders, tmp_path)


def test_more_shards_than_images(folders, tmp_path):
    with pytest.raises(InputError, match=r"--shards: 24 validation shards, but 23 validation images: give fewer"):
        run(folders, tmp_path / "out", shards=(1, 24))


def test_a_full_disk(folders, prepared, tmp_path, monkeypatch):
    """The disk is full when a run begins, at a record, and beside a shard; the same command goes on."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, function in ((write, "write_json"), (formats, "write_record"), (shards, "write_json")):
        with monkeypatch.context() as patched:
            patched.setattr(module, function, full)
            with pytest.raises(InputError, match=r"--out=.*No space left on device: make room"):
                run(folders, tmp_path / "out", 2)
    run(folders, tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(prepared)


# Images that cannot be read

BAD = {
    "n01440764/n01440764_2.JPEG": (lambda data: b"", "is empty"),
    "n02012849/n02012849_3.JPEG": (lambda data: data[:-20], "image file is truncated"),
    "n02012849/n02012849_4.JPEG": (lambda data: data[:30], "is not an image, or is cut short in its header"),
    "n03126707/n03126707_5.JPEG": (lambda data: b"<html>not found</html>", "is not an image"),
}


@pytest.fixture
def spoilt(raw, tmp_path) -> tuple[Path, Path]:
    train, val = unpack(raw, tmp_path / "spoilt")
    for name, (spoil, _) in BAD.items():
        (train / name).write_bytes(spoil((train / name).read_bytes()))
    return train, val


def test_unreadable_images_fail_the_run_at_its_end(raw, prepared, spoilt, tmp_path, capfd):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"4 unreadable images.*n01440764_2\.JPEG: is empty: .*--skip_bad") as error:
        run(spoilt, out, 2)
    assert "\n" not in str(error.value)
    printed = capfd.readouterr().out
    for name, (_, why) in BAD.items():
        assert f"{name}: " in printed
        assert why in printed
    assert not {"dataset.json", "manifest.json"} & contents(out).keys()
    written = inodes(out)
    assert len(written) >= 4  # all but those with unreadable images
    for name in BAD:  # repaired, the run goes on, and is that of the good images
        (spoilt[0] / name).write_bytes(raw.images["train"][name][0])
    run(spoilt, out)
    assert contents(out) == contents(prepared)
    assert written.items() <= inodes(out).items()


def test_unreadable_images_can_be_left_out(prepared, spoilt, tmp_path, capfd):
    out = tmp_path / "out"
    with pytest.raises(InputError):
        run(spoilt, out)
    run(spoilt, out, skip_bad=True)
    assert "46 train images, 23 validation images, 2 encoded anew, 4 unreadable left out" in capfd.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"] == {"train": 46, "validation": 23}
    assert sorted(name for part in manifest["shards"].values() for name, _ in part["bad"]) == sorted(BAD)
    run(spoilt, tmp_path / "at once", 2, skip_bad=True)
    assert contents(tmp_path / "at once") == contents(out)
    verify(out, 2)
    left, whole = (set(records(directory, "*")) for directory in (out, prepared))
    assert left < whole
    assert len(whole - left) == 4


def test_a_terminal_gets_a_bar_and_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(173) as update:
        update(173, "train-00000: 172 images", ["ant/1.jpg: is empty"])
    out, err = capsys.readouterr()
    assert "173/173" in err
    assert out == "ant/1.jpg: is empty\n"


# The program


def test_the_program_prepares_and_verifies(raw, folders, tmp_path, main, capfd):
    train, val = folders
    how = ["--max_side=50", "--quality=80", "--seed=3", "--workers=2"]
    assert main(["folder", f"--train={train}", f"--val={val}", f"--out={tmp_path}/a", "--shards=3,1", *how]) == 0
    raws = [f"--train={raw.train}", f"--val={raw.val}", f"--devkit={raw.devkit}"]
    assert main(["imagenet", *raws, f"--out={tmp_path}/b", "--shards=3,1", *how, "--format=webdataset"]) == 0
    for name in ("a", "b"):
        capfd.readouterr()
        assert main([f"--verify={tmp_path}/{name}"]) == 0
        assert "4 shards with 73 images are as they were written" in capfd.readouterr().out
    assert main(["folder", f"--out={tmp_path}/a", "--verify", "--workers=1"]) == 0
    flip(tmp_path / "a" / "validation-00000-of-00001", 40)
    with pytest.raises(InputError, match="validation-00000-of-00001: record 0"):
        main([f"--verify={tmp_path}/a"])
    with pytest.raises(InputError, match="begun with --quality=80, now with --quality=95"):
        main(["folder", f"--train={train}", f"--val={val}", f"--out={tmp_path}/a", "--shards=3,1"])


@pytest.mark.parametrize(("module", "library"), [("PIL.Image", "Pillow"), ("google_crc32c", "google-crc32c")])
def test_without_a_library_that_it_needs(main, folders, tmp_path, monkeypatch, module, library):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs? {library}: pip install .*{library.lower()}"):
        main(["folder", f"--train={folders[0]}", f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "said"), [([], "stopped; the same command goes on"), (["--verify"], "stopped\n")])
def test_ctrl_c(main, monkeypatch, capsys, given, said):
    def interrupted(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr("nvcnn.prepare.flags.prepare", interrupted)
    assert main(["folder", "--train=y", "--out=x", *given]) == 3
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", ["imagenet, folder, cifar10, fashion-mnist", "--verify=DIR"]),
        ("imagenet21k", ["imagenet21k"]),
        ("fashion-mnist", ["--out"]),
        ("imagenet --out=x", ["imagenet needs --train"]),
        ("folder --train=absent --out=x", ["--train=absent", "No such file"]),
        ("folder --train=x --val=y --val_share=0.1 --out=x", ["--val_share", "--val"]),
        ("folder --train=x --out=x --shards=8", ["--shards=8: must be two integers TRAIN,VAL of at least 1"]),
        ("folder --train=x --out=x --shards=0,1", ["--shards=0,1: must be two integers"]),
        ("folder --train=x --out=x --workers=-1", ["--workers=-1: must be from 1 to 4096"]),
        ("fashion-mnist --out=x --workers=4097", ["--workers=4097: must be from 1 to 4096"]),
        ("folder --train=x --out=x --quality=101", ["--quality=101: must be from 1 to 100"]),
        ("folder --train=x --out=x --val_share=1", ["--val_share=1.0: must be above 0 and below 1"]),
        ("folder --train=x --out=x/out", ["--out=x/out", "is inside --train=x", "outside"]),
        ("imagenet --train=x --val=x/val --out=x/val", ["--out=x/val", "is inside --train=x"]),
        ("cifar10 --out=x", ["cifar10 needs --source"]),
        ("cifar10 --source=absent --out=x", ["--source=absent"]),
        ("imagenet --train=x --out=x --max-side=9", ["--max-side=9"]),
        ("--verify=absent", ["absent/manifest.json", "is missing"]),
    ],
)
def test_bad_usage(main, tmp_path, monkeypatch, given, names):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main(given.split())
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())

"""The machinery under every data set: killed runs, workers, other flags and sources, bad images; and the program."""

import errno
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from nvcnn.data.tfrecord import decode_example, read_records
from nvcnn.prepare import folder, formats, shards, write
from nvcnn.prepare.blueprint import Blueprint
from nvcnn.prepare.verify import verify
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import contents, flip, run
from tests.raw_imagenet import photograph, unpack
from tests.samples import file_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_no_byte(folders, prepared, tmp_path, workers):
    run(folders, tmp_path / "out", workers)
    assert contents(tmp_path / "out") == contents(prepared)


def test_the_seed_changes_the_order(folders, prepared, tmp_path):
    run(folders, tmp_path / "out", seed=2)
    one, other = (
        [r for path in sorted(d.glob("train-*-of-00012")) for r in read_records(path)]
        for d in (prepared, tmp_path / "out")
    )
    assert one != other
    assert sorted(one) == sorted(other)
    labels = [decode_example(record)["image/class/label"][0] for record in one]
    assert sum(a == b for a, b in itertools.pairwise(labels)) < len(labels) / 2  # shuffled, not by class


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def killed_until_done(folders, out: Path, kills: int, **changes) -> int:
    """Runs with that many SIGKILLs at random moments before one is left to end; how many found shards unfinished."""
    moment = random.Random(7)
    started = time.monotonic()
    run(folders, out.with_name("timed"), 2, **changes)
    duration = time.monotonic() - started
    kept: dict[str, int] = {}
    in_the_middle = 0
    for _ in range(kills):
        process = multiprocessing.get_context("fork").Process(target=run, args=(folders, out, 2), kwargs=changes)
        process.start()
        time.sleep(moment.uniform(0, 0.9 * duration))
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        end = time.monotonic() + 5
        while any(map(alive, workers)):
            assert time.monotonic() < end, "a worker outlives the run"
            time.sleep(0.01)
        if not out.exists():
            continue
        if (out / "manifest.json").exists():  # it was done: from the start again
            shutil.rmtree(out)
            kept = {}
            continue
        shards = {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}
        assert kept.items() <= shards.items()  # what was finished is not written again
        kept = shards
        in_the_middle += 0 < len(shards) < 16
    run(folders, out, 2, **changes)
    shards = {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}
    assert kept.items() <= shards.items()
    return in_the_middle


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_it_ends_with_the_same_bytes(folders, tmp_path, kills):
    in_the_middle = killed_until_done(folders, tmp_path / "out", kills, max_side=30)  # slow enough to be hit
    assert in_the_middle or kills < 20
    assert contents(tmp_path / "out") == contents(tmp_path / "timed")


@pytest.mark.parametrize("point", ["first byte", "shard", "index", "part", "dataset.json", "manifest.json", "removal"])
def test_killed_at_a_certain_point_it_ends_with_the_same_bytes(folders, prepared, tmp_path, monkeypatch, point):
    """Between any two of the steps by which a file appears."""
    out = tmp_path / "out"
    replace, remove, written = os.replace, write.shutil.rmtree, shards.Summed.write

    def replace_or_die(source, target):
        name = Path(target).name
        if (point, name) in {
            ("shard", "train-00003-of-00012"),
            ("index", "train-00003-of-00012.idx"),
            ("part", "train-00003-of-00012.json"),
            (point, point),
        }:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def remove_or_die(*arguments, **options):
        if point == "removal":
            os.kill(os.getpid(), signal.SIGKILL)
        remove(*arguments, **options)

    def write_or_die(summed, data):
        if point == "first byte" and "train-00003" in summed.file.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return written(summed, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_or_die)
        patched.setattr(write.shutil, "rmtree", remove_or_die)
        patched.setattr(shards.Summed, "write", write_or_die)
        process = multiprocessing.get_context("fork").Process(target=run, args=(folders, out))
        process.start()
        process.join()
    assert process.exitcode != 0
    assert contents_or_none(out) != contents(prepared)
    run(folders, out)
    assert contents(out) == contents(prepared)


def contents_or_none(directory: Path):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} | {
        path.name: b"" for path in directory.iterdir() if path.is_dir()
    }


def test_a_complete_directory_is_left_alone(folders, prepared, capfd):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    run(folders, prepared)
    assert capfd.readouterr().out.endswith(f"Class folders in {prepared} is complete\n")
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize("lost", ["train-00007-of-00012", "validation-00000-of-00004.idx", "dataset.json"])
def test_what_is_lost_is_made_again(folders, prepared, copy, lost):
    (copy / lost).unlink()
    run(folders, copy)
    assert contents(copy) == contents(prepared)


@pytest.mark.parametrize("other", ["dataset.json", "manifest.json"])
def test_what_stands_beside_the_shards_is_made_again(folders, prepared, copy, other):
    text = json.loads((copy / other).read_text())
    text.pop("class_names", text.pop("files", None))
    (copy / other).write_text(json.dumps(text))
    shard = (copy / "train-00007-of-00012").stat().st_ino
    run(folders, copy)
    assert contents(copy) == contents(prepared)
    assert (copy / "train-00007-of-00012").stat().st_ino == shard


def test_a_shard_of_another_size_is_made_again(folders, prepared, copy):
    with open(copy / "train-00007-of-00012", "ab") as file:
        file.write(b"more")
    run(folders, copy)
    assert contents(copy) == contents(prepared)


OTHER = {
    "seed": ({"seed": 2}, r"begun with --seed=1, now with --seed=2"),
    "max_side": ({"max_side": 30}, r"begun without --max_side, now with --max_side=30"),
    "check": ({"check": "decode"}, r"begun with --check=structure, now with --check=decode"),
    "format": ({"file_format": "webdataset"}, r"holds dataset|holds train-00000-of-00012"),
    "shards": ({"shards": (13, 4)}, r"holds train-00000-of-00012, .* or the flags it was begun with"),
    "fewer splits": ({"val": None}, r"holds validation-"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", OTHER)
def test_other_flags_are_refused(folders, copy, tmp_path, monkeypatch, finished, other):
    changes, what = OTHER[other]
    out = copy
    if not finished:
        out = tmp_path / "begun"
        with monkeypatch.context() as patched:
            patched.setattr(write, "beside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(folders, out)
    before = contents_or_none(out)
    with pytest.raises(InputError, match=rf"--out={out}: .*({what})"):
        run(folders, out, **changes)
    assert contents_or_none(out) == before


@pytest.mark.parametrize("change", ["added", "longer", "class"])
def test_other_sources_are_refused(raw, copy, tmp_path, change):
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
    with pytest.raises(InputError, match=rf"--out={copy}: .*{what}"):
        run((train, val), copy)


def test_validation_images_where_there_were_none(folders, tmp_path):
    run(folders, tmp_path / "out", val=None)
    with pytest.raises(InputError, match=r"--out=.*: was begun without validation images: do so now, or give another"):
        run(folders, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("train-00003-of-00012", "holds train-00003-of-00012, which is not of this data set"),
        ("manifest.json", r"holds manifest\.json, which is not of this data set"),
    ],
)
def test_a_directory_where_a_file_belongs(folders, tmp_path, name, what):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=rf"--out=.*: {what}"):
        run(folders, tmp_path / "out")


def test_flags_that_cannot_be_read(folders, tmp_path):
    (tmp_path / "out" / ".unfinished").mkdir(parents=True)
    (tmp_path / "out" / ".unfinished" / "flags").write_text("[]")
    with pytest.raises(InputError, match=r"\.unfinished/flags: was not written by prepare\.py: delete it, and prepare"):
        run(folders, tmp_path / "out")


def test_a_part_that_is_not_ours(folders, copy):
    settings = json.loads((copy / "manifest.json").read_text())["made_from"]
    (copy / "manifest.json").unlink()
    (copy / ".unfinished").mkdir()
    (copy / ".unfinished" / "flags").write_text(json.dumps(settings))
    (copy / ".unfinished" / "train-00003-of-00012.json").write_text('{"images": 1}')
    with pytest.raises(
        InputError, match=r"train-00003-of-00012\.json: was not written by prepare\.py: delete it, and prepare"
    ):
        run(folders, copy)


def test_a_directory_of_another_data_set_is_refused(prepared):
    with pytest.raises(InputError, match="holds Class folders, not other"):
        write.begun(Blueprint("other", (), {}, {}, folder.encode_file, ""), prepared)


def test_two_runs_at_once(folders, prepared, copy, monkeypatch):
    (copy / "manifest.json").unlink()
    monkeypatch.setattr(write, "LOCK_WAIT", 0.2)
    with write.locked(copy), pytest.raises(InputError, match=r"--out=.*another prepare\.py is writing"):
        run(folders, copy)
    run(folders, copy)
    assert contents(copy) == contents(prepared)


def test_more_shards_than_images(folders, tmp_path):
    with pytest.raises(InputError, match=r"--shards: 24 validation shards, but 23 validation images: give fewer"):
        run(folders, tmp_path / "out", shards=(1, 24))


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "function"), [(write, "write_json"), (formats, "write_record"), (shards, "write_json")]
)
def test_a_full_disk(folders, prepared, tmp_path, monkeypatch, module, function):
    with monkeypatch.context() as patched:
        patched.setattr(module, function, full_disk)
        with pytest.raises(InputError, match=r"--out=.*No space left on device: make room"):
            run(folders, tmp_path / "out", 2)
    run(folders, tmp_path / "out", 2)
    assert contents(tmp_path / "out") == contents(prepared)


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
    assert not {"dataset.json", "manifest.json"} & {path.name for path in out.iterdir()}
    written = {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}
    assert len(written) >= 12  # all but those with unreadable images
    for name in BAD:  # repaired, the run goes on, and is that of the good images
        (spoilt[0] / name).write_bytes(raw.images["train"][name][0])
    run(spoilt, out)
    assert contents(out) == contents(prepared)
    assert written.items() <= {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}.items()


def test_unreadable_images_can_be_left_out(prepared, spoilt, tmp_path, capfd):
    out = tmp_path / "out"
    with pytest.raises(InputError):
        run(spoilt, out)
    run(spoilt, out, skip_bad=True)
    assert "180 train images" not in (printed := capfd.readouterr().out)
    assert "146 train images, 23 validation images, 2 encoded anew, 4 unreadable left out" in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images"] == {"train": 146, "validation": 23}
    assert sorted(name for part in manifest["shards"].values() for name, _ in part["bad"]) == sorted(BAD)
    at_once = tmp_path / "at once"
    run(spoilt, at_once, 2, skip_bad=True)
    assert contents(at_once) == contents(out)
    verify(out, 2)
    left = {r for path in out.glob("*-of-?????") for r in read_records(path)}
    whole = {r for path in prepared.glob("*-of-?????") for r in read_records(path)}
    assert left < whole
    assert len(whole - left) == 4


def test_a_terminal_gets_a_bar_and_what_is_wrong(spoilt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(spoilt, tmp_path / "out", skip_bad=True)
    out, err = capsys.readouterr()
    assert "173/173" in err
    assert "train-00000" not in out
    assert "n01440764/n01440764_2.JPEG: is empty" in out


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("launch_prepare", ROOT / "launch" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_program_prepares_and_verifies(raw, folders, tmp_path, main, capfd):
    train, val = folders
    images = ["--max_side=50", "--quality=80", "--seed=3", "--workers=2"]
    assert main(["folder", f"--train={train}", f"--val={val}", f"--out={tmp_path}/a", "--shards=3,1", *images]) == 0
    raws = [f"--train={raw.train}", f"--val={raw.val}", f"--devkit={raw.devkit}"]
    assert main(["imagenet", *raws, f"--out={tmp_path}/b", "--shards=3,1", *images, "--format=webdataset"]) == 0
    for name in ("a", "b"):
        capfd.readouterr()
        assert main([f"--verify={tmp_path}/{name}"]) == 0
        assert "4 shards with 173 images are as they were written" in capfd.readouterr().out
        assert main(["folder", f"--out={tmp_path}/{name}", "--verify", "--workers=1"]) == 0
    flip(tmp_path / "a" / "validation-00000-of-00001", 40)
    with pytest.raises(InputError, match="validation-00000-of-00001: record 0"):
        main([f"--verify={tmp_path}/a"])
    with pytest.raises(InputError, match="begun with --quality=80, now with --quality=95"):
        main(["folder", f"--train={train}", f"--val={val}", f"--out={tmp_path}/a", "--shards=3,1"])


def test_without_pillow(main, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"needs Pillow: pip install nvcnn\[images\]"):
        main(["folder", f"--train={folders[0]}", f"--out={tmp_path}/out"])


def test_without_google_crc32c(main, folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(InputError, match=r"need google-crc32c: pip install nvcnn\[images\]"):
        main(["folder", f"--train={folders[0]}", f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "said"), [([], "stopped; the same command goes on"), (["--verify"], "stopped\n")])
def test_ctrl_c(main, monkeypatch, capsys, given, said):
    def interrupted(flags):
        raise KeyboardInterrupt

    monkeypatch.setitem(main.__globals__, "prepare", interrupted)
    assert main(["folder", "--train=y", "--out=x", *given]) == 3
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], ["imagenet, folder, cifar10, fashion-mnist", "--verify=DIR"]),
        (["imagenet", "--out=x"], ["imagenet needs --train"]),
        (["folder", "--train=absent", "--out=x"], ["--train=absent", "No such file"]),
        (["folder", "--train=x", "--val=y", "--val_share=0.1", "--out=x"], ["--val_share", "--val"]),
        (
            ["folder", "--train=x", "--out=x", "--shards=8"],
            ["--shards=8: must be two integers TRAIN,VAL of at least 1"],
        ),
        (["folder", "--train=x", "--out=x", "--shards=0,1"], ["--shards=0,1: must be two integers"]),
        (["folder", "--train=x", "--out=x", "--workers=-1"], ["--workers=-1: must be at least 1"]),
        (["folder", "--train=x", "--out=x", "--quality=101"], ["--quality=101: must be from 1 to 100"]),
        (["folder", "--train=x", "--out=x", "--val_share=1"], ["--val_share=1.0: must be above 0 and below 1"]),
        (["folder", "--train=x", "--out=x/out"], ["--out=x/out", "is inside --train=x", "outside"]),
        (["imagenet", "--train=x", "--val=x/val", "--out=x/val"], ["--out=x/val", "is inside --train=x"]),
        (["cifar10", "--out=x"], ["cifar10 needs --source"]),
        (["cifar10", "--source=absent", "--out=x"], ["--source=absent"]),
        (["imagenet", "--train=x", "--out=x", "--max-side=9"], ["--max-side=9"]),
        (["--verify=absent"], ["absent/manifest.json", "is missing"]),
    ],
)
def test_bad_usage(main, tmp_path, monkeypatch, given, names):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main(given)
    for name in names:
        assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())

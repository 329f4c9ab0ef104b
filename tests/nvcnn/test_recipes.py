"""A recipe is a file of flags, weaker than the command line and stronger than the defaults."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nvcnn import recipes
from nvcnn.plan import plan
from nvcnn.program import InputError
from nvcnn.settings import Settings, as_json, differences, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path):
    """Returns a function that writes a recipe, and returns the flag for it."""

    def write(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return f"--recipe={tmp_path / 'mine.yaml'}"

    return write


def test_the_command_line_wins_over_the_recipe_and_that_over_defaults(recipe):
    flag = recipe("model: resnet50\nbatch_size: 256\nfp16: true\nlearning_rate: 1e-3\ncrop_area: [0.25, 1]\nkeep: 5\n")
    s = parse(Settings, ["-b", "32", flag, "--nofp16", "--seed=7"])
    assert (s.model, s.batch_size, s.fp16, s.seed) == ("resnet50", 32, False, 7)
    assert (s.learning_rate, s.crop_area, s.keep, s.num_batches) == (1e-3, (0.25, 1.0), 5, 50)
    flags = [
        "--model=resnet50",
        "--batch_size=32",
        "--seed=7",
        "--learning_rate=0.001",
        "--crop_area=0.25,1",
        "--keep=5",
    ]
    spelled = parse(Settings, flags)
    assert asdict(s) == asdict(spelled) | {"recipe": flag.partition("=")[2]}
    assert differences(spelled, as_json(s)) == []  # a run goes on with the recipe, or with its flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch-size: 3", "mine.yaml, line 2: batch-size: is no flag; did you mean batch_size?"),
        ("recipe: other", "mine.yaml, line 2: recipe: is no flag"),
        ("model: vgg16", "mine.yaml, line 2: model: comes twice"),
        ("fp16: yes", "mine.yaml, line 2: fp16: yes: must be true or false"),
        ("keep: {3: 4}", "mine.yaml, line 2: keep: must be a value"),
        ("keep: three", r"mine.yaml, line 2: .*--keep: invalid int value: 'three'"),
        ("conv: fast", r"mine.yaml, line 2: .*--conv: invalid choice: 'fast'"),
        ("keep: 0", r"--keep=0: must be at least 1 \(.*mine.yaml, line 2\)$"),
        ("fp16: true", r"--fp16 and --bf16: choose one \(.*mine.yaml, line 2\)$"),
        ("keep: [", "mine.yaml: is not YAML: .* line 3"),
        ("seed: &a !!python/object/apply:os.abort []\nkeep: *a", "line 2: seed: has no value"),
        ("data_dir:", "mine.yaml, line 2: data_dir: has no value: give one, or remove the line"),
        ("log_dir: ~", "mine.yaml, line 2: log_dir: has no value"),
        ("fp16: null", "mine.yaml, line 2: fp16: has no value"),
        ("init: ''", "mine.yaml, line 2: init: has no value"),
        ("crop_area: [0.5, null]", "mine.yaml, line 2: crop_area: has no value"),
        (f"init: &a {'a' * 99}\nlog_dir: [*a, *a]", "mine.yaml, line 3: log_dir: is longer than the file"),
        ("? &a [b]\n: 3", "mine.yaml, line 2: what begins there: is no flag"),
        (f"keep: {'[' * 600}", "mine.yaml: is not YAML: maximum recursion"),
        ('init: "\\UFFFFFFFF"', "mine.yaml: is not YAML"),
        ("#" * 9000, "mine.yaml: has more than 8192 bytes"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_line(recipe, text, message):
    with pytest.raises(InputError, match=message) as error:
        parse(Settings, [recipe(f"model: lenet\n{text}\n"), "--bf16"])
    assert "\n" not in str(error.value)


def test_an_error_of_the_command_line_is_not_the_recipe_s(recipe):
    with pytest.raises(InputError, match=r"^--keep=0: must be at least 1$"):
        parse(Settings, [recipe("model: lenet\nkeep: 2"), "--keep=0"])


def test_a_length_of_the_command_line_is_that_of_the_run():
    """Whichever of the two flags for it a recipe has."""
    s = parse(Settings, ["--recipe=resnet50", "--num_batches=100"])
    assert (s.num_epochs, s.num_batches, s.batch_size) == (None, 100, 256)
    asked = ["--recipe=resnet50-16", "--num_batches=100"]
    with pytest.raises(InputError, match=r"--train_size=160:12,192 needs --data_dir.*resnet50-16\.yaml, line \d+\)$"):
        parse(Settings, asked)
    assert parse(Settings, [*asked, "--train_size=160"]).num_epochs is None


def test_num_epochs_wins_over_a_recipe_s_num_batches(recipe):
    s = parse(Settings, [recipe("model: lenet\nnum_batches: 7"), "--num_epochs", "2", "--data_dir=d"])
    assert (s.num_epochs, s.num_batches) == (2, 50)


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--recipe=nosuch", "--help"])
    assert "--recipe RECIPE" in capsys.readouterr().out


def test_a_recipe_that_there_is_not(recipe, tmp_path):
    with pytest.raises(InputError, match=f"--recipe=resnet: give one of {', '.join(recipes.installed())}, or a FILE"):
        parse(Settings, ["--recipe=resnet"])
    with pytest.raises(InputError, match=r"no\.yaml: No such file"):
        parse(Settings, [f"--recipe={tmp_path / 'no.yaml'}"])
    with pytest.raises(InputError, match=r"mine\.yaml: must have a flag and its value on each line"):
        parse(Settings, [recipe("- batch_size")])


def test_an_installed_package_has_its_recipes(monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: lenet")
    monkeypatch.setattr(recipes, "PLACES", (tmp_path / "none", tmp_path))
    assert list(recipes.installed()) == ["mine"]
    assert parse(Settings, ["--recipe=mine"]).model == "lenet"
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(InputError, match="--recipe=mine: no recipes are installed"):
        parse(Settings, ["--recipe=mine"])


@pytest.mark.parametrize("name", recipes.installed())
def test_every_recipe_can_be_tried_without_its_data(name):
    settings = parse(Settings, [f"--recipe={name}", "--dry_run"])
    run = plan(settings, None, ranks=8)
    assert run.steps == settings.num_epochs * (settings.num_images // (8 * settings.batch_size))
    assert settings.learning_rate


@pytest.mark.parametrize(
    ("page", "name"), [("Makefile", "fashion-mnist"), ("README.md", "fashion-mnist"), ("README.md", "resnet50")]
)
def test_the_commands_that_are_shown_are_the_recipes(page, name):
    """They differ in directories, and in what a dry run asks for."""
    asked = parse(Settings, [f"--recipe={name}", "--data_dir=d"])
    text = re.sub(r"\\\n", "", (ROOT / page).read_text())
    (command,) = re.findall(
        rf"(?:mpiexec|\$launcher) .*launch/train\.py (--model={asked.model} .*)$", text, re.MULTILINE
    )
    shown = parse(Settings, command.split())
    own = {key: getattr(asked, key) for key in ("data_dir", "log_dir", "num_images", "recipe")}
    assert replace(shown, **own) == asked


def test_the_page_has_every_recipe():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    epochs = {name: parse(Settings, [f"--recipe={name}", "--dry_run"]).num_epochs for name in recipes.installed()}
    assert {name: int(n) for name, n in rows} == epochs

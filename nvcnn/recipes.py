"""Recipes: YAML files of flags by their own names, which are nvcnn's (recipes/NAME.yaml), or a user's."""

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nvcnn.files import to_read
from nvcnn.program import InputError

PLACES = (Path(__file__).resolve().parent.parent / "recipes", Path(sys.prefix) / "share" / "nvcnn" / "recipes")
SWITCH = {"true": "", "false": "no"}
LONGEST = 1 << 13  # bytes of a file; PyYAML takes seconds for as many brackets, by their square
NULL = "tag:yaml.org,2002:null"


class Line(NamedTuple):
    """A flag of a recipe, as a command line has it."""

    where: str
    flag: str
    argument: str


def installed() -> dict[str, Path]:
    """Returns the files of the recipes that come with nvcnn, by name, in order."""
    return dict(sorted((file.stem, file) for place in reversed(PLACES) for file in place.glob("*.yaml")))


def find(recipe: str) -> Path:
    """Returns the file of --recipe. Raises InputError, with the names that there are, for one that there is not."""
    if recipe.endswith((".yaml", ".yml")):
        return Path(os.path.expanduser(recipe))
    if not (files := installed()):
        places = " nor in ".join(map(str, PLACES))
        raise InputError(
            f"--recipe={recipe}: no recipes are installed, neither in {places}: give a FILE.yaml of your own"
        )
    if recipe not in files:
        raise InputError(f"--recipe={recipe}: give one of {', '.join(files)}, or a FILE.yaml of your own")
    return files[recipe]


def read(recipe: str, flags: Mapping[str, bool]) -> Iterator[Line]:
    """Yields the flags of a recipe in its order. flags: those there are, and whether they are switches.

    Values stay texts, which the flags' own readers understand, so nothing in the file can become another object.
    Raises InputError, which names file and line, for a key that is no flag or comes twice, and for what is no value.
    """
    try:
        import yaml
    except ImportError:
        raise InputError(f"--recipe={recipe} needs PyYAML: pip install pyyaml") from None

    path = find(recipe)
    try:
        with to_read(path).open("rb") as file:
            data = file.read(LONGEST + 1)
        node = yaml.compose(data, Loader=yaml.SafeLoader) if len(data) <= LONGEST else None
    except OSError as error:
        raise InputError(f"--recipe={recipe}: {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # PyYAML lets some of Python's through
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if len(data) > LONGEST:
        raise InputError(f"{path}: has more than {LONGEST} bytes, so it is no recipe")
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}: must have a flag and its value on each line, as in 'batch_size: 256'")
    seen: set[str] = set()
    for key, value in node.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        flag = key.value if isinstance(key, yaml.ScalarNode) else "what begins there"
        if flag not in flags:
            near = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), flags, 1)
            raise InputError(f"{where}: {flag}: is no flag" + (f"; did you mean {near[0]}?" if near else ""))
        if flag in seen:
            raise InputError(f"{where}: {flag}: comes twice: remove one")
        seen.add(flag)
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(part, yaml.ScalarNode) for part in parts):
            raise InputError(f"{where}: {flag}: must be a value, or a list of values")
        if sum(len(part.value) for part in parts) > len(data):  # aliases, *name, stand for a long value many times
            raise InputError(f"{where}: {flag}: is longer than the file: write it without aliases")
        if not parts or any(part.tag == NULL or not part.value for part in parts):
            raise InputError(f"{where}: {flag}: has no value: give one, or remove the line")
        text = ",".join(part.value for part in parts)
        if not flags[flag]:
            yield Line(where, flag, f"--{flag}={text}")
        elif text in SWITCH:
            yield Line(where, flag, f"--{SWITCH[text]}{flag}")
        else:
            raise InputError(f"{where}: {flag}: {text}: must be true or false")

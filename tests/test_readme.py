"""README and docs say what is so; rooms and style are as agreed."""

import functools
import inspect
import re
import shlex
import textwrap

import pytest
from PIL import Image

import sample
import train
import unitok
import vqrae
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def readme_commands():
    """Every call of train.py and sample.py in README.md as (script, arguments)."""
    parts = README.split("```")  # text, code, text, ...
    quoted = [line for code in parts[1::2] for line in code.splitlines()]
    quoted += [inline.replace("\n", " ") for text in parts[::2] for inline in re.findall(r"`([^`]+)`", text)]
    for line in quoted:
        found = re.search(r"(?:python|node 8) (train|sample)\.py([^#;]*)", line)
        if found:
            yield found[1], tuple(shlex.split(found[2]))


@pytest.mark.parametrize("script, arguments", dict.fromkeys(readme_commands()),
                         ids=lambda value: value if isinstance(value, str) else " ".join(value)[:50])
def test_every_command_in_the_readme_is_understood(script, arguments):
    placeholders = {"$q": "vq", "$i": "gaussian", "N": "2", "NAME": "tiny", "...": None}
    words = [placeholders.get(word, word) for word in arguments]
    {"train": train, "sample": sample}[script].parse_args([word for word in words if word is not None])


def test_the_readme_has_commands():
    assert len(list(readme_commands())) > 25


def test_every_name_in_the_readme_exists():
    code = "".join((ROOT / f"{module}.py").read_text() for module in ("vqrae", "unitok", "train", "sample"))
    modules = {"vqrae": vqrae, "unitok": unitok, "train": train, "sample": sample}
    names = set(re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", README))
    assert len(names) > 40
    for name in sorted(names):
        first, *rest = name.split(".")
        if first in modules and rest and not (ROOT / name).exists():
            places, first, rest = [modules[first]], rest[0], rest[1:]
        else:
            places = list(modules.values())
        found = [place for place in places if hasattr(place, first)]
        if found and all(isinstance(getattr(place, first), type) for place in found):
            assert not rest or hasattr(getattr(found[0], first), rest[0]), name
        elif not found:  # a file, a key of summary.json, a choice of a flag
            assert (ROOT / name).exists() or name in code or name in ("git", "transformers", "webdataset"), name


def excerpts():
    """Code that README.md quotes: the quoted thing's name, and its lines in one piece or in several."""
    for name, code in re.findall(r"```python\n# (vqrae\.[\w.]+)\n(.*?)```", README, re.DOTALL):
        yield name, [textwrap.dedent(piece).strip("\n") for piece in re.split(r"^\.\.\.$", code, flags=re.MULTILINE)]


@pytest.mark.parametrize("name, pieces", list(excerpts()), ids=lambda value: value if isinstance(value, str) else "")
def test_code_in_the_readme_is_the_code(name, pieces):
    source = inspect.getsource(functools.reduce(getattr, name.split(".")[1:], vqrae)).splitlines()
    for piece in pieces:
        size = len(piece.splitlines())
        assert piece in [textwrap.dedent("\n".join(source[i:i + size])) for i in range(len(source) - size + 1)], piece


def test_the_readme_quotes_every_part_of_the_paper():
    assert len(list(excerpts())) >= 10


def test_every_picture_in_the_readme_is_there():
    pictures = re.findall(r"\]\((assets/[^)]+)\)", README)
    assert len(pictures) > 5
    for picture in pictures:
        with Image.open(ROOT / picture) as image:
            image.verify()

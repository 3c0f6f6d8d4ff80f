"""README and docs say what is so: commands, names, code, pictures and links; rooms and style are as agreed."""

import ast
import functools
import inspect
import json
import re
import shlex
import textwrap

import pytest
import torch
from PIL import Image

from conftest import ROOT, module_of, needs


def texts_of(*patterns):
    """The files in the repository's own folders that fit, by their path in it."""
    paths = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def words_of(notebook):
    """What a notebook says between its code."""
    cells = json.loads(notebook)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


PAGES = texts_of("README.md", "CHANGELOG.md", "docs/*.md")
PAGES |= {page: words_of(notebook) for page, notebook in texts_of("docs/*.ipynb").items()}
CODE = texts_of("*.py", "support/*.py", "experiments/*.py", "tests/*.py", "data/*/*.py")


def modules():
    """vqrae.py and all that stands in the root or in support/, without the tests."""
    return [module_of(script) for script in CODE
            if script.startswith("support/") or "/" not in script and not script.startswith(("test_", "conftest"))]


# --- commands ---


def commands():
    """Every call of a script of ours on the pages, as (script, arguments)."""
    for page in PAGES.values():
        parts = page.split("```")  # text, code, text, ...
        quoted = [line for code in parts[1::2] for line in code.splitlines()]
        quoted += [inline.replace("\n", " ") for text in parts[::2] for inline in re.findall(r"`([^`]+)`", text)]
        for line in quoted:
            found = re.search(r"(?:python|node \d+) ([\w/]+\.py)([^#;]*)", line)
            if found and found[1] != "mine.py":  # tests/test_extend.py has those
                yield found[1], tuple(shlex.split(found[2]))


@pytest.mark.parametrize("script, arguments", dict.fromkeys(commands()),
                         ids=lambda value: value if isinstance(value, str) else " ".join(value)[:50])
def test_every_command_on_the_pages_is_understood(script, arguments):
    if script == "data/imagenet/prepare.py":
        needs("datasets")
    placeholders = {"$q": "vq", "$i": "gaussian", "N": "2", "NAME": "tiny", "...": None}
    words = [word for word in (placeholders.get(word, word) for word in arguments) if word is not None]
    if hasattr(module_of(script), "parse_args") and inspect.signature(module_of(script).parse_args).parameters:
        module_of(script).parse_args(words)
    else:
        assert all(f'"{word}"' in CODE[script] for word in words if word.startswith("--"))


def test_the_pages_have_commands():
    assert len(list(commands())) > 40 and {script for script, _ in commands()} >= {"train.py", "sample.py"}


# --- names, code, pictures, links ---


@pytest.mark.parametrize("page", PAGES)
def test_every_name_on_the_pages_exists(page):
    code, places = "".join(CODE.values()), modules()
    for name in sorted(set(re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", PAGES[page]))):
        if exists(name, places):
            continue
        first = name.split(".")[0]
        own = [place for place in places if hasattr(place, first)]
        assert not own or not all(isinstance(getattr(place, first), type) for place in own), name
        # a key of summary.json, a choice of a flag, another's program
        assert name in code or name in ("git", "transformers", "datasets"), name


def exists(name, places):
    """Whether a name is a file's, a module's, or something in a module."""
    if (ROOT / name).exists() or any(place.__name__ in (name, f"support.{name}") for place in places):
        return True
    for place in places:
        for prefix in ("", f"{place.__name__}.", f"{place.__name__.removeprefix('support.')}."):
            try:
                if name.startswith(prefix):
                    functools.reduce(getattr, name.removeprefix(prefix).split("."), place)
                    return True
            except AttributeError:
                pass
    return False


def excerpts():
    """Code that the pages quote: the quoted thing's name, and its lines in one piece or in several."""
    for page in PAGES.values():
        for name, code in re.findall(r"```python\n# ([\w.]+)\n(.*?)```", page, re.DOTALL):
            pieces = re.split(r"^\.\.\.$", code, flags=re.MULTILINE)
            yield name, [textwrap.dedent(piece).strip("\n") for piece in pieces]


@pytest.mark.parametrize("name, pieces", list(excerpts()), ids=lambda value: value if isinstance(value, str) else "")
def test_code_on_the_pages_is_the_code(name, pieces):
    script = max((script for script in CODE if name.startswith(script.removesuffix(".py").replace("/", ".") + ".")),
                 key=len)
    path = name.removeprefix(script.removesuffix(".py").replace("/", ".") + ".").split(".")
    source = inspect.getsource(functools.reduce(getattr, path, module_of(script))).splitlines()
    for piece in pieces:
        size = len(piece.splitlines())
        assert piece in [textwrap.dedent("\n".join(source[i:i + size])) for i in range(len(source) - size + 1)], piece


def test_the_companion_quotes_every_part_of_the_paper():
    assert len(list(excerpts())) >= 10


def test_what_the_readme_shows_of_the_library_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = re.findall(r"```python\n(?!# )(.*?)```", PAGES["README.md"], re.DOTALL)
    assert shown
    for code in shown:
        exec(code, {"images": torch.rand(2, 3, 64, 64)})


def test_every_picture_on_the_pages_is_there():
    pictures = {ROOT / page for page in PAGES for page in re.findall(r"\((?:\.\./)?(assets/[^)]+)\)", PAGES[page])}
    assert len(pictures) > 5
    for picture in pictures:
        with Image.open(picture) as image:
            image.verify()


def anchors(text):
    """What GitHub calls the headings of a page in links to them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_between_the_pages_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not link.startswith(("http://", "https://")):
            file, _, heading = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), link
            assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


# --- the arrows: who may import whom ---

LOWER = {  # what each room may import of ours; experiments and tests import what they like
    "support": {"support"},
    "vqrae": {"support"},
    "presets": {"support", "vqrae"},
    "unitok": {"support", "vqrae", "presets"},
    "export": {"support", "vqrae", "presets"},
    "train": {"support", "vqrae", "presets", "unitok", "export"},
    "sample": {"support", "vqrae", "presets", "unitok", "export"},
    "demo": {"support", "vqrae", "presets", "unitok"},
    "data": {"support", "vqrae", "presets", "unitok", "export", "prepare"},
}


def imports(script):
    """What a file imports, as (module, name), wherever in it."""
    for node in ast.walk(ast.parse(CODE[script])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def room_of(script):
    return script.split("/")[0].removesuffix(".py")


OURS = {room_of(script) for script in CODE} | {"prepare"}


def test_a_room_imports_only_rooms_below_it():
    for script in CODE:
        if room_of(script) in LOWER:
            found = {module.split(".")[0] for module, _ in imports(script)} & OURS
            assert found <= LOWER[room_of(script)], script


def test_no_room_imports_a_test():
    for script in CODE:
        if not room_of(script).startswith(("test", "conftest")):
            assert not [module for module, _ in imports(script) if module.startswith(("test", "conftest"))], script


def test_the_paper_takes_little_from_support():
    found = {}
    for module, name in imports("vqrae.py"):
        if module.startswith("support"):
            found.setdefault(module, set()).add(name)
    assert set(found) <= {f"support.{name}" for name in ("checks", "files", "hub", "images", "metrics", "networks",
                                                    "quick", "text")}
    assert found["support.images"] == {"resize_to"} and found["support.quick"] == {"quick_products"}
    assert found["support.metrics"] == {"codebook_usage", "psnr"}


def test_images_know_nothing_of_sets():
    assert "support.sets" not in {module for module, _ in imports("support/images.py")}


@pytest.mark.parametrize("driver", ["train.py", "sample.py"])
def test_one_line_of_a_driver_names_unitok(driver):
    assert len(re.findall(r"\bunitok\b", CODE[driver])) == 1


# --- style ---


def test_no_line_is_longer_than_120_characters():
    assert [f"{script}:{i}" for script, code in CODE.items()
            for i, line in enumerate(code.splitlines(), 1) if len(line) > 120] == []


def test_no_function_is_longer_than_60_lines():
    assert [f"{script}: {node.name}" for script, code in CODE.items() for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60] == []

"""requirements.txt has what the main job and the tests need; nothing needs requirements-extra.txt until it is asked."""

import ast
import importlib.metadata
import re
import subprocess
import sys

import pytest

from conftest import ROOT

MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage"}  # where a package has another name


def packages(file):
    """The packages that a requirements file names."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [re.match(r"[\w-]+", line)[0] for line in lines if line.strip() and not line.startswith("#")]


def module_of(package):
    return MODULES.get(package, package.replace("-", "_"))


NEEDED, EXTRA = packages("requirements.txt"), packages("requirements-extra.txt")
MAIN = sorted(path for pattern in ("*.py", "support/*.py") for path in ROOT.glob(pattern)
              if not path.name.startswith(("test_", "conftest", "__init__")))
TESTS = sorted(path for pattern in ("test_*.py", "conftest.py", "tests/*.py") for path in ROOT.glob(pattern))


def imports(path):
    """The modules that a file imports, whether at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


BLOCKED = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_every_module_can_be_imported_without_the_optional_packages():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MAIN]
    assert {"vqrae", "train", "sample", "support.follow", "support.sets"} <= set(modules)
    code = BLOCKED.format(blocked=[module_of(package) for package in EXTRA], modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_that_is_imported_is_named_and_nothing_is_named_twice():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"support", "experiments"}
    named = {module_of(package) for package in NEEDED + EXTRA}
    for path in MAIN + TESTS:
        assert set(imports(path)) - ours - set(sys.stdlib_module_names) <= named, path.name
    assert len(named) == len(NEEDED + EXTRA)


@pytest.mark.parametrize("package", NEEDED)
def test_what_is_required_is_imported(package):
    used = {name for path in MAIN + TESTS for name in imports(path)}
    assert module_of(package) in used


@pytest.mark.parametrize("package", EXTRA)
def test_an_optional_package_is_none_that_a_required_one_brings(package):
    for needed in NEEDED:
        brought = [re.match(r"[\w-]+", text)[0] for text in importlib.metadata.requires(needed) or []
                   if "extra ==" not in text]
        assert package not in brought, needed

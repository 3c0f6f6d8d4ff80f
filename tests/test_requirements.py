"""requirements.txt has what the main job and the tests need; nothing needs requirements-extra.txt until it is asked."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

MODULES = {"pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage"}  # where a package has another name
BROUGHT = {"scipy", "pyarrow"}  # by scikit-learn and by datasets, which are nothing without them


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


def test_every_module_can_be_imported_without_the_optional_packages():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MAIN]
    assert {"vqrae", "train", "sample", "support.follow", "support.sets"} <= set(modules)
    blocked = dict.fromkeys(map(module_of, EXTRA))  # None in sys.modules stands for a module that is not there
    code = f"import importlib, sys; sys.modules.update({blocked}); list(map(importlib.import_module, {modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_that_is_imported_is_named_and_nothing_is_named_twice():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"support", "experiments"}
    named = {module_of(package) for package in NEEDED + EXTRA}
    for path in MAIN + TESTS:
        assert set(imports(path)) - ours - set(sys.stdlib_module_names) <= named | BROUGHT, path.name
    assert len(named) == len(NEEDED + EXTRA)


@pytest.mark.parametrize("package", NEEDED)
def test_what_is_required_is_imported(package):
    used = {name for path in MAIN + TESTS for name in imports(path)}
    assert module_of(package) in used

"""Files: read with care, written in one step, and models in folders that hold config.json and model.safetensors."""

import hashlib
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


PRETRAINED = Path(__file__).resolve().parent.parent / "data/pretrained"  # the models that come with the code


class InputError(ValueError):
    """A mistake in the user's input that one sentence explains; the drivers print it without a traceback."""


def trained(folder):
    """The folder that a model is read from where none is named: `folder`, or the one that came with the code.

    Then a line says so. A tokenizer came of stage 2 alone. Where neither is there, it stays `folder`, for whoever reads
    it to complain.
    """
    folder = Path(folder)
    shipped = PRETRAINED / folder.name.replace("stage1", "stage2")
    if folder.exists() or not shipped.is_dir():
        return folder
    print(f"{folder} is not there; using {shipped}, which came with the code", file=sys.stderr)
    return shipped


def part_of(path):
    """Where `replacing` has a file written until it is whole."""
    return Path(path).with_name(f"{Path(path).name[:240]}.tmp")


@contextmanager
def replacing(path):
    """A path to write what then takes the place of `path` in one step: readers meet the old file or the new one.

    InputError when it cannot be written, say on a full disk; nothing half written is left behind then.
    """
    path, part = Path(path), part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path}, perhaps for want of room ({error}); what stood there before is kept"
                         ) from None
    finally:
        part.unlink(missing_ok=True)


def replace_text(path, text):
    """Write a file in one step: whoever reads it, whenever the power fails, meets the old text or the new one."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def replacing_all(folder):
    """A folder to write files into that then take their places in `folder`, all of them or, on an error, none.

    InputError when they cannot be written; what stood in `folder` before is kept then.
    """
    folder = Path(folder)
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            yield Path(part)
            for path in sorted(Path(part).rglob("*")):
                place = folder / path.relative_to(part)
                place.mkdir(exist_ok=True) if path.is_dir() else path.replace(place)
    except (OSError, SafetensorError, InputError) as error:
        said = re.sub(rf"{re.escape(str(folder))}/[.]part-\w+", lambda found: str(folder), str(error))
        if isinstance(error, InputError):
            raise InputError(said) from None
        raise InputError(f"cannot write into {folder}, perhaps for want of room ({said}); what stood there before is "
                         "kept") from None
    finally:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def same_file(one, other):
    """Whether two paths lead to one file or folder, by whatever names or links."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there
        return False


def keep_apart(out, **read):
    """InputError when a command that writes into `out` reads that folder too; what it reads, by the names of flags."""
    for flag, folder in read.items():
        if folder is not None and same_file(out, folder):
            raise InputError(f"{out} is written to and is what --{flag} {folder} reads, which would be lost; choose "
                             "another --out")


def digest(*pieces):
    """SHA-256 of tensors and bytes, one behind the other, as text."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece.cpu().contiguous().numpy().tobytes() if isinstance(piece, torch.Tensor) else piece)
    return found.hexdigest()


def check_fields(config, at_least_1=()):
    """InputError for a field of a config that no model could have: a config.json may hold anything.

    at_least_1: names of whole numbers that must not be 0.
    """
    for entry in fields(config):
        name, value, kind = entry.name, getattr(config, entry.name), entry.type
        if kind is int:
            least, most = int(name in at_least_1), 1000 if name == "depth" else 2**24
            good = type(value) is int and least <= value <= most
        elif kind is float:
            good = type(value) in (int, float) and 0 <= value <= 1e12
        elif kind is tuple:
            good = len(value) == 3 and all(type(x) in (int, float) and abs(x) <= 1e12 for x in value)
        else:
            good = isinstance(value, kind)
        if not good:
            raise InputError(f"{name} is {value!r}")


def read_json(path):
    """The parsed JSON file; InputError names the path when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_config(path):
    """The JSON object in a file, as a dict; InputError when it is missing, damaged or something else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object, which it should")
    return config


def read_safetensors(path):
    """The tensors of a safetensors file by name; InputError names the path when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the weights in {path}: {error}") from None


def check_weights(expected, weights, path):
    """InputError names the first tensor that is missing among the weights, or is not as the expected one."""
    for name, tensor in expected.items():
        if name not in weights:
            raise InputError(f"{path} has no tensor {name!r}, so it does not fit its config.json")
        if weights[name].shape != tensor.shape:
            expected, found = tuple(tensor.shape), tuple(weights[name].shape)
            raise InputError(f"{path}: tensor {name!r} has shape {found} where config.json asks for {expected}")
        if weights[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{path}: tensor {name!r} is of type {weights[name].dtype}, which is not read here")
        if not weights[name].isfinite().all():
            raise InputError(f"{path}: tensor {name!r} has values that are no numbers, so it is damaged")


def save_model(model, folder, text=None):
    """Write config.json, model.safetensors and, with a text tokenizer, tokenizer.json: all of them or none."""
    folder = Path(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with (replacing(folder / "tokenizer.json") if text else nullcontext() as text_part,
          replacing(folder / "config.json") as config_part, replacing(folder / "model.safetensors") as weights_part):
        if text:
            text_part.write_text(text.to_str(pretty=True), encoding="utf-8")
        config_part.write_text(json.dumps(asdict(model.config), indent=2) + "\n", encoding="utf-8")
        save_file(weights, weights_part)


def without_memory(path, kind, build):
    """The model that `build` makes of a config, without memory: it may ask for more than there is.

    InputError, with the path of the config, when it does not describe a model of this kind.
    """
    try:
        with torch.device("meta"):
            return build()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last for sizes that no memory has
        raise InputError(f"{path} does not describe {kind}: {str(error).splitlines()[0]}") from None


def load_model(folder, kind, maker, build, optional=()):
    """The model that `save_model` wrote, built from its config.json by `build`, in eval mode.

    `kind` and `maker` say, in the InputError about a missing or damaged folder, what it should be and what makes one.
    The tensors that `optional` names, which folders of earlier versions lack, stay as they are built.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model at {folder}: the folder does not exist; python train.py {maker}")
    saved = read_json(folder / "config.json")
    expected = without_memory(folder / "config.json", f"a {kind}", lambda: build(saved)).state_dict()
    weights = read_safetensors(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if name in weights or name not in optional}
    check_weights(expected, weights, folder / "model.safetensors")
    model = build(saved)
    model.load_state_dict({**model.state_dict(), **{name: weights[name] for name in expected}})
    return model.eval()

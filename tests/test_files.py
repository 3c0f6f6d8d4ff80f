"""Files: written in one step or not at all, and read with a sentence for whatever is wrong with them."""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from conftest import seeds
from support import files, hub
from support.files import InputError

# --- written in one step ---


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_replaced_as_a_whole_when_all_is_written(before, tmp_path):
    path = tmp_path / "deep/file.txt"
    if before:
        files.replace_text(path, before)
    with files.replacing(path) as part:
        part.write_text("half")
        assert (path.read_text() if path.exists() else None) == before
        part.write_text("new, all of it")
    assert path.read_text() == "new, all of it" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed"),
                                   SafetensorError("No space left on device")], ids=lambda error: type(error).__name__)
def test_what_cannot_be_written_is_a_sentence_and_what_stood_there_is_kept(error, tmp_path):
    files.replace_text(tmp_path / "file", "old")
    with pytest.raises(InputError, match="cannot write .*file, perhaps for want of room .*; what stood there before"):
        with files.replacing(tmp_path / "file") as part:
            part.write_text("half")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_an_interruption_leaves_nothing_half_written_and_stays_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "file") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_files_of_a_folder_take_their_places_together(tmp_path):
    files.replace_text(tmp_path / "out/a", "old")
    files.replace_text(tmp_path / "out/kept", "kept")
    with files.replacing_all(tmp_path / "out") as part:
        files.replace_text(part / "a", "new")
        files.replace_text(part / "deep/b", "new")
        assert (tmp_path / "out/a").read_text() == "old" and not (tmp_path / "out/deep").exists()
    found = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"a": "new", "b": "new", "kept": "kept"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "deep", "kept"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", [OSError, SafetensorError, InputError])
def test_of_a_folder_that_cannot_be_written_whole_nothing_changes(kind, before, tmp_path):
    if before:
        files.replace_text(tmp_path / "deep/out/a", "old")
    with pytest.raises(InputError, match=f"cannot write .*{tmp_path}/deep/out") as said:
        with files.replacing_all(tmp_path / "deep/out") as part:
            files.replace_text(part / "a", "new")
            raise kind(f"cannot write {part}/b")
    assert ".part" not in str(said.value)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["old"] * before
    assert (tmp_path / "deep/out").exists() == before


def test_a_text_is_written_as_utf_8_whatever_the_locale_says(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, level=2: encoding or "ascii")
    files.replace_text(tmp_path / "file", "\u732b\n")
    assert (tmp_path / "file").read_bytes() == "\u732b\n".encode()


@pytest.mark.parametrize("name", ["out", "out/", "./out", "link", "out/deep/.."])
def test_a_folder_that_is_read_is_not_written_to_by_whatever_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(InputError, match="is what --data .*out reads, which would be lost; choose another --out"):
        files.keep_apart(name, init=None, encoder="nobody/nothing", data=tmp_path / "out")
    files.keep_apart(tmp_path / "out/deep", data=tmp_path / "out")


# --- read with care ---


@pytest.mark.parametrize("content, sentence", [
    (None, "cannot read .*: No such file"), (b"{", "is not valid JSON"), (b"\xff\xfe{}", "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"), (b"[1, 2]", "holds no JSON object"), (b"7", "holds no JSON object"),
])
def test_a_config_that_cannot_be_read_is_a_sentence_with_its_path(content, sentence, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=sentence) as error:
        files.read_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@dataclass
class Sizes:
    """Fields of every kind that the configs of models have."""

    width: int = 8
    depth: int = 2
    tokens: int = 0
    scale: float = 1.0
    mean: tuple = (0.1, 0.2, 0.3)
    name: str = "x"
    bias: bool = True


@given(st.integers(1, 2**24), st.integers(0, 2**24), st.floats(0, 1e12), st.tuples(*[st.floats(-1e12, 1e12)] * 3),
       st.text(), st.booleans())
def test_sizes_that_a_model_could_have_are_none_of_check_fields_business(width, tokens, scale, mean, name, bias):
    files.check_fields(Sizes(width, 1000, tokens, scale, mean, name, bias), at_least_1=("width", "depth"))


@pytest.mark.parametrize("name, value", [
    ("width", 0), ("width", -1), ("width", 2**24 + 1), ("width", 8.0), ("width", True), ("width", "8"), ("width", None),
    ("depth", 1001), ("tokens", -1), ("scale", float("nan")), ("scale", -0.5), ("scale", "1"), ("mean", (1, 2)),
    ("mean", ("a", "b", "c")), ("mean", (1.0, 2.0, float("inf"))), ("name", 3), ("bias", 1)])
def test_a_field_that_no_model_could_have_is_named_with_its_value(name, value):
    with pytest.raises(InputError, match=f"^{name} is "):
        files.check_fields(Sizes(**{name: value}), at_least_1=("width",))


@given(st.integers(1, 8), st.integers(1, 4), seeds)
def test_weights_in_shards_are_read_like_weights_in_one_file(tmp_path_factory, count, shards, seed):
    whole, parts = (tmp_path_factory.mktemp(name) for name in ("whole", "parts"))
    generator = torch.Generator().manual_seed(seed)
    weights = {f"layer.{i}": torch.randn(2, 3, generator=generator) for i in range(count)}
    save_file(weights, whole / "model.safetensors")
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in weights.items() if weight_map[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = [hub.read_checkpoint(folder) for folder in (whole, parts)]
    assert all(part.keys() == weights.keys() for part in found)
    assert all(torch.equal(part[name], tensor) for part in found for name, tensor in weights.items())


@pytest.mark.parametrize("damage, sentence", [
    (lambda weights: weights.pop("b"), "has no tensor 'b'"),
    (lambda weights: weights.update(b=torch.zeros(3, 2)), r"tensor 'b' has shape \(3, 2\) .* asks for \(2, 3\)"),
    (lambda weights: weights.update(b=torch.zeros(2, 3, dtype=torch.int8)), "tensor 'b' is of type torch.int8"),
    (lambda weights: weights["b"].fill_(float("nan")), "tensor 'b' has values that are no numbers"),
])
def test_the_first_weight_that_does_not_fit_is_named(damage, sentence):
    expected = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    weights = {name: tensor.clone() for name, tensor in expected.items()} | {"more": torch.zeros(1)}
    files.check_weights(expected, weights, "here")  # more than is asked for is no obstacle
    damage(weights)
    with pytest.raises(InputError, match=f"^here.*{sentence}"):
        files.check_weights(expected, weights, "here")


# --- models in folders ---


class Model(torch.nn.Linear):
    """The least that save_model and load_model ask of a model: a config, a dataclass, and weights."""

    def __init__(self, width, tokens=0, **rest):
        super().__init__(width, 3)
        self.config = Sizes(width, tokens=tokens)


def load(folder):
    return files.load_model(folder, "Model", "--stage 1 makes one", lambda saved: Model(**saved))


def test_a_saved_model_is_loaded_with_its_weights_and_in_eval_mode(tmp_path):
    model = Model(5)
    files.save_model(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


def test_a_full_disk_leaves_the_model_that_stood_there(tmp_path, monkeypatch):
    first = Model(5)
    files.save_model(first, tmp_path)

    def full(weights, path):
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(InputError, match="cannot write .*model.safetensors.*No space left on device"):
        files.save_model(Model(7), tmp_path)
    assert torch.equal(load(tmp_path).weight, first.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json does not describe a Model"),
    (lambda folder: (folder / "config.json").write_text('{"depth": 2}'), "config.json does not describe a Model"),
    (lambda folder: (folder / "config.json").write_text('{"width": 99999999999}'), "has shape"),
    (lambda folder: (folder / "config.json").unlink(), "cannot read .*config.json"),
    (lambda folder: os.truncate(folder / "model.safetensors", 50), "cannot read the weights"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot read the weights"),
])
def test_a_damaged_folder_is_a_sentence_with_its_path(damage, sentence, tmp_path):
    files.save_model(Model(5), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=sentence) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_a_sentence_that_says_what_makes_one(tmp_path):
    with pytest.raises(InputError, match="no model at .*nothing.* python train.py --stage 1 makes one"):
        load(tmp_path / "nothing")


def test_a_local_folder_is_no_matter_for_the_hub_and_a_name_that_nobody_knows_is_a_sentence(tmp_path, monkeypatch):
    assert hub.hub_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no model at 'nobody/nothing': not a folder, and the hub says"):
        hub.hub_folder("nobody/nothing")


@pytest.mark.parametrize("folder, made, shipped, expected", [
    ("out/ar", ["out/ar"], ["ar"], "out/ar"), ("out/ar", ["out/stage2"], ["ar"], "pretrained/ar"),
    ("out/ar", [], ["stage2"], "out/ar"), ("out/stage1", [], ["stage2"], "pretrained/stage2"),
    ("out/stage1", ["out/stage1"], ["stage2"], "out/stage1"), ("out/caption", [], ["stage2", "ar"], "out/caption")])
def test_a_shipped_model_stands_in_for_one_that_was_not_trained_and_is_named(folder, made, shipped, expected, tmp_path,
                                                                             monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PRETRAINED", Path("pretrained"))
    for path in [*made, *(f"pretrained/{name}" for name in shipped)]:
        Path(path).mkdir(parents=True)
    assert files.trained(folder) == Path(expected)
    assert (f"using {expected}" in capsys.readouterr().err) == expected.startswith("pretrained")

"""Fuzzing: whatever goes in, what comes out is work or one sentence."""

import copy
import io
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import sample
import train
import vqrae
from conftest import seeds, small_captioner, small_model, text_lm, weights
from presets import CaptionConfig, GenerationConfig
from support.files import InputError
from support.images import ImageSet, read_image
from support.settings import flag, flags_of
from support.text import caption_of, text_of
from unitok import StageOneConfig

FUZZ = int(os.environ.get("FUZZ", 0))  # inputs of these tests together; `experiments/faults.py --fuzz` asks for many


def fuzz(*strategies, percent):
    def decorate(test):
        return settings(max_examples=-(-(FUZZ or 100) * percent // 100), derandomize=not FUZZ, database=None,
                        suppress_health_check=list(HealthCheck))(given(*strategies)(test))
    return decorate


@contextmanager
def nothing_but_sentences(seconds=30, memory=6 << 30):
    """Passes what users are told in a sentence; anything else that is raised is a failure, a hang too."""
    def hang(*_):
        raise AssertionError("it hangs")

    before, limits = signal.signal(signal.SIGALRM, hang), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(seconds)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, limits[1]))
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error)
    except SystemExit as stop:
        assert stop.code in (None, 0, 2) or str(stop.code).startswith("error: ") and "\n" not in str(stop.code)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


odd_words = st.sampled_from([
    "", " ", "-1", "0", "1", "2", "3", "7", "nan", "inf", "-inf", "1e308", "1e-308", "1e999", "9" * 40, "2147483648",
    str(2**63), str(2**64 - 1), "0x10", "1_0", "½", "２", "💥", "\udcff", "x" * 300, "{}", "cuda:99", "meta", "cpu",
    "--", "a/b", ".", "file", "folder", "picture.png", "missing"])

words = (odd_words | st.text(st.characters(exclude_characters="\0"), max_size=6) | st.integers().map(str)
         | st.floats().map(str))


@pytest.fixture(scope="session")
def fuzzed_folder(tmp_path_factory, encoder_folder, photo_folder):
    """A folder with a model of every kind, images and files of other kinds to run wild in."""
    folder = tmp_path_factory.mktemp("fuzz")
    small_model(codebook_size=32, codebook_dim=8).save_pretrained(folder / "vqrae")
    text_lm(codebook_size=32, image_tokens=16).save_pretrained(folder / "ar")
    small_model(seed=3, codebook_size=32, codebook_dim=8).save_pretrained(folder / "ar/vqrae")
    small_captioner().save_pretrained(folder / "caption")
    shutil.copytree(encoder_folder, folder / "encoder")
    shutil.copytree(photo_folder, folder / "images")
    shutil.copy(photo_folder / "class0/0.png", folder / "picture.png")
    (folder / "file").write_bytes(b"\0\xff")
    (folder / "folder").mkdir()
    return folder


@pytest.fixture
def wild(fuzzed_folder, monkeypatch):
    """The work of a fuzzing test happens in the folder, and nothing is fetched."""
    import huggingface_hub.constants

    monkeypatch.setattr(sample, "lpips_distance", lambda device: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(fuzzed_folder)
    return fuzzed_folder


# --- files ---


def damaged(draw, content):
    """Bytes that were some file's: cut short, with some changed, or with others put between."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["cut", "change", "insert", "remove"]))
        if how == "cut":
            del content[at:]
        elif how == "change" and content:
            content[at] = draw(st.integers(0, 255))
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del content[at:at + draw(st.integers(1, 40))]
    return bytes(content)


@st.composite
def image_bytes(draw):
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]))
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]))
    size = draw(st.sampled_from([(1, 1), (1, 3000), (40, 30), (5, 17), (700, 1)]))
    buffer = io.BytesIO()
    try:
        pixels = np.random.default_rng(draw(seeds)).integers(0, 256, size[0] * size[1] * 4, np.uint8).tobytes()
        Image.frombytes("RGBA", size, pixels).convert(mode).save(buffer, kind)
    except (OSError, ValueError):  # not every format has every mode
        assume(False)
    content = buffer.getvalue()
    if kind == "PNG" and draw(st.booleans()):  # whatever size it says that it has
        import zlib

        claimed = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "big") + draw(st.integers(0, 2**14)).to_bytes(4, "big")
        header = content[12:16] + claimed + content[24:29]
        content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    return damaged(draw, content) if draw(st.booleans()) else content


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Palette images with Transparency")
@fuzz(image_bytes() | st.binary(max_size=60), st.none() | seeds, percent=30)
def test_fuzzed_images_are_read_or_refused_in_a_sentence(wild, content, seed):
    Path("fuzzed").write_bytes(content)
    with nothing_but_sentences():
        image = ImageSet.prepare(read_image("fuzzed"), 16, seed)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8


odd_values = st.sampled_from([None, True, -1, 0, 1, 3, 5, 2**31, 10**30, 0.5, 1e308, float("nan"), "", "x", "gelu", [],
                              [1], [3, 3], {}, {"a": 1}])


@st.composite
def damaged_json(draw, text):
    """JSON with a value of the tree replaced or removed, or bytes that were JSON."""
    if draw(st.integers(0, 3)) == 0:
        return damaged(draw, text)
    tree = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys[:12]))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.integers(0, 4)) == 0:
                if draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    place[key] = copy.deepcopy(draw(odd_values))
                break
            place = place[key]
    return json.dumps(tree).encode()


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    weight_map = dict.fromkeys(tensors, "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@fuzz(st.data(), percent=38)
def test_fuzzed_models_are_loaded_or_refused_in_a_sentence(wild, qwen3_twin, data):
    kind, name = data.draw(st.sampled_from([
        ("encoder", "config.json"), ("encoder", "preprocessor_config.json"), ("encoder", "model.safetensors"),
        ("encoder", "model.safetensors.index.json"), ("vqrae", "config.json"), ("vqrae", "model.safetensors"),
        ("ar", "config.json"), ("ar", "tokenizer.json"), ("caption", "config.json"), ("caption", "model.safetensors"),
        ("qwen3", "config.json"), ("images", "index.json")]))
    shutil.rmtree("damaged", ignore_errors=True)
    if kind == "images":
        Path("damaged").mkdir()
        Image.new("RGB", (40, 20)).save("damaged/sheet.png")
        record = {"name": "a", "caption": "b", "category": "c", "split": "train"}
        Path("damaged/index.json").write_text(json.dumps({"sheets": [
            {"file": "sheet.png", "tile": 20, "style": "s", "images": [record, {**record, "split": "val"}]}]}))
    else:
        shutil.copytree(qwen3_twin[1] if kind == "qwen3" else kind, "damaged")
    if name == "model.safetensors.index.json":
        in_shards(Path("damaged"))
    content = Path("damaged", name).read_bytes()
    if name.endswith(".json"):
        content = data.draw(damaged_json(content))
    else:
        length = int.from_bytes(content[:8], "little")
        header = content[8:8 + length]
        header = data.draw(damaged_json(header)) if data.draw(st.booleans()) else header
        content = len(header).to_bytes(8, "little") + header + content[8 + length:]
        content = damaged(data.draw, content) if data.draw(st.booleans()) else content
    Path("damaged", name).write_bytes(content)
    images = torch.rand(1, 3, 16, 16)
    with nothing_but_sentences():
        if kind == "encoder":
            vqrae.load_encoder("damaged")(images)
        elif kind == "vqrae":
            vqrae.VQRAE.from_pretrained("damaged")(images)
        elif kind == "ar":
            vqrae.VisualLM.from_pretrained("damaged").extend([[1, 2]], 2)
        elif kind == "caption":
            vqrae.Captioner.from_pretrained("damaged").caption(images, most=3)
        elif kind == "qwen3":
            vqrae.load_qwen3("damaged", 8)
        else:
            images = ImageSet("damaged", "all", 16)
            [caption_of(record) + text_of(record) for record in images.records]
            images.fingerprint(), next(iter(images.batches(range(len(images)), 4)))


# --- commands ---


def tame(flags):
    """Flags that ask for nothing that would rightly take hours, or fill the disk outside of the test's folder."""
    for name, value in flags:
        number = int(value) if value.strip().removeprefix("-").isdecimal() and len(value) < 30 else 0
        most = {"--workers": 2, "--batch-size": 64, "--image-size": 64, "--output-patch-size": 64, "--count": 9,
                "--depth": 4, "--codes": 64, "--patches": 64, "--steps": 3, "--start-tokens": 256}.get(name, 2**15)
        assume(not most < number < 2**31)
        assume(name not in ("--out", "--data", "--init", "--model", "--encoder") or not value.startswith(("/", "..")))
        assume(name != "--data" or value not in ("", "."))  # pictures that earlier inputs have left
    return [f"{name}={value}" for name, value in flags]


train_flags = st.lists(st.tuples(st.sampled_from(
    [flag(name) for name in flags_of(CaptionConfig, GenerationConfig, StageOneConfig)]
    + ["--seed", "--out", "--checkpoint-every", "--log-every", "--evaluate-every", "--workers", "--device", "--init",
       "--preset", "--precision", "--nonsense", "--resume"]),
    words), max_size=3)


@fuzz(st.sampled_from(["1", "2", "ar", "caption"]), train_flags, st.booleans(), percent=15)
def test_fuzzed_arguments_of_train_end_in_work_or_a_sentence(wild, stage, flags, only_print):
    shutil.rmtree("out", ignore_errors=True)
    small = {"1": ["--encoder=encoder", "--image-size=16", "--codebook-size=32", "--codebook-dim=8",
                   "--start-tokens=256"],
             "2": ["--init=vqrae"], "ar": ["--tokenizer=vqrae"],
             "caption": ["--encoder=encoder", "--image-size=16"]}[stage]
    if stage in ("ar", "caption"):
        small += ["--width=16", "--depth=1", "--heads=2", "--kv-heads=1", "--head-width=8", "--mlp-width=16",
                  "--text-vocabulary=300"]
    arguments = ["--stage", stage, *small, "--data=images", "--batch-size=4", "--device=cpu", "--workers=0",
                 "--out=out/run", "--steps=1", *tame(flags), *["--print-config"] * only_print]
    with nothing_but_sentences():
        train.main(arguments)


sample_flags = st.lists(st.tuples(st.sampled_from(
    ["--model", "--device", "--out", "--batch-size", "--image-size", "--data", "--split", "--beside", "--encoder",
     "--frechet-encoder", "--frechet-size", "--teacher", "--clusters", "--count", "--cfg-scale", "--temperature",
     "--top-k", "--top-p", "--seed", "--format", "--shard-size", "--codes", "--patches", "--nonsense"]),
    words | st.sampled_from(["vqrae", "ar", "caption", "encoder", "images", "hf", "tokens", "all", "val"])), max_size=3)


@fuzz(st.sampled_from(["reconstruct", "evaluate", "evaluate ar", "evaluate caption", "codes", "generate", "caption",
                       "export"]), sample_flags, st.lists(words, max_size=2), percent=15)
def test_fuzzed_arguments_of_sample_end_in_work_or_a_sentence(wild, command, flags, rest):
    shutil.rmtree("out", ignore_errors=True)
    command, _, model = command.partition(" ")
    model = model or {"generate": "ar", "caption": "caption"}.get(command, "vqrae")
    arguments = [command, f"--model={model}", "--device=cpu", "--out=out"]
    arguments += {"generate": ["--count=1"], "export": ["--format=tokens"],
                  "evaluate": ["--frechet-encoder=encoder"]}.get(command, [])
    arguments += ["--data=images"] if command not in ("generate", "caption") else []
    with nothing_but_sentences():
        sample.main(arguments + tame(flags) + [word for word in rest if not word.startswith("/")])


@fuzz(st.data(), percent=2)
def test_fuzzed_checkpoints_and_logs_are_resumed_from_or_refused_in_a_sentence(wild, data):
    arguments = ["--stage=1", "--encoder=encoder", "--image-size=16", "--codebook-size=32", "--codebook-dim=8",
                 "--start-tokens=256",
                 "--data=images", "--batch-size=4", "--device=cpu", "--workers=0", "--steps=3", "--checkpoint-every=1",
                 "--log-every=1"]
    if not Path("whole").exists():
        train.main(arguments + ["--out=whole"])
    shutil.rmtree("killed", ignore_errors=True)
    shutil.copytree("whole", "killed")
    for name in data.draw(st.lists(st.sampled_from(["metrics.jsonl", "checkpoint/state.pt", "checkpoint/previous.pt",
                                                    "config.json", "model.safetensors", "summary.json"]), min_size=1)):
        path = Path("killed", name)
        path.write_bytes(damaged(data.draw, path.read_bytes()))
    Path("killed/model.safetensors").unlink()
    with nothing_but_sentences():
        train.main(arguments + ["--out=killed", "--resume"])
        assert weights(Path("killed")) == weights(Path("whole"))

"""What test files share: small models, folders of pictures, short training runs."""

import base64
import copy
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from tokenizers import Tokenizer

import train
import vqrae
from export import save_encoder
from presets import FIXED_BY_QWEN3
from support.run import Run, choose_device
from support.text import END_OF_TEXT, START_OF_IMAGE, train_text_tokenizer

# One thread a process, here and in what a test starts: at a test's sizes more of them wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # of packages that read this when they are imported
os.environ.update(HF_DATASETS_CACHE=CACHE.name, HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRACKIO_DIR=CACHE.name)

settings.register_profile("repeatable", max_examples=20, deadline=None, derandomize=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent

seeds = st.integers(0, 2**31)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="what tests/test_device.py computes on: cpu, cuda or mps")


@pytest.fixture(scope="session")
def device(request):
    """The torch device of --device."""
    return choose_device(request.config.getoption("--device"))


@functools.cache
def module_of(script):
    """The module in a file of ours, however it is called and wherever it is."""
    name = script.removesuffix(".py").replace("/", ".")
    if "/" not in script or script.startswith("support/"):
        return importlib.import_module(name)
    found = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def needs(*packages):
    """Skip a test, or all of a file, where a package of requirements-extra.txt is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is missing: pip install -r requirements-extra.txt")


# --- small models, and twins of them in transformers ---


def small_vit(image_size=16, patch_size=4, width=24, depth=2, heads=2):
    """Sizes at which a test takes milliseconds: 16 tokens of 24 channels an image."""
    return vqrae.ViTConfig(image_size, patch_size, width, depth, heads, mlp_width=2 * width)


def small_model(seed=0, q=4, quantizer="simvq", **changes):
    """A random VQRAE of 40 codes."""
    torch.manual_seed(seed)
    config = {"codebook_size": 40, "codebook_dim": 12, **changes}
    return vqrae.VQRAE(vqrae.VQRAEConfig(small_vit(), 16, q, quantizer=quantizer, **config)).eval()


SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 20, "patch_size": 4}


def family_twin(family, seed=0):
    """A small random encoder of transformers' own class, and a function of images in [0, 1] -> its patch tokens."""
    import transformers

    torch.manual_seed(seed)
    if family == "dinov2_with_registers":
        twin = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
            **SIZES, mlp_ratio=2, num_register_tokens=3))
    elif family == "siglip_vision_model":
        twin = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, intermediate_size=52))
    elif family == "clip_vision_model":
        twin = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, intermediate_size=48))
    else:
        sizes = {**SIZES, "image_size": [20, 20], "patch_size": [4, 4]}
        twin = transformers.InternVLVisionModel(transformers.InternVLVisionConfig(
            **sizes, intermediate_size=48, attention_bias=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms away from their trivial start
    twin.eval()

    def patch_tokens(images):
        traits = vqrae.FAMILIES[family][3]
        mean, std = (torch.tensor(traits.get(name, getattr(vqrae.ViTConfig, name)))[:, None, None]
                     for name in ("mean", "std"))
        options = {"interpolate_pos_encoding": True} if family in ("siglip_vision_model", "clip_vision_model") else {}
        with torch.no_grad():
            tokens = twin((images - mean) / std, **options).last_hidden_state
        return tokens[:, {"dinov2_with_registers": 4, "siglip_vision_model": 0}.get(family, 1):]

    return twin, patch_tokens


def small_lm(seed=0, **changes):
    """A random transformer over 30 tokens of text and 20 codes."""
    torch.manual_seed(seed)
    config = {"text_vocabulary": 30, "codebook_size": 20, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2,
              "head_width": 16, "mlp_width": 48, **changes}
    model = vqrae.VisualLM(vqrae.LMConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at 0.02 every logit would be nearly 0 and every property nearly true
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model


WORDS = ["noto red apple", "fluent red apple", "twemoji red apple", "noto cat face", "fluent flag: Chile"]


def text_lm(seed=0, codebook_size=20, image_tokens=9, **changes):
    """A random transformer with a text tokenizer trained on WORDS."""
    text = train_text_tokenizer(WORDS, 300)
    model = small_lm(seed, text_vocabulary=text.get_vocab_size(), codebook_size=codebook_size,
                     image_tokens=image_tokens, **changes)
    model.text = text
    return model


def small_captioner(seed=0):
    """A random captioner with the words of `text_lm`."""
    lm = text_lm(seed, codebook_size=0)
    torch.manual_seed(seed)
    model = vqrae.Captioner(vqrae.CaptionerConfig(small_vit(), 16, lm.config), lm.text)
    model.lm = lm
    return model.eval()


# --- folders of encoders, pictures and models ---


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A small random encoder as a checkpoint on disk."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(vqrae.Encoder(small_vit()), folder)
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Twelve pictures of colour ramps in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(12):
        ramp = np.linspace(0, 255, 24 * 20 * 3).reshape(20, 24, 3) * (i + 1) / 12
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(np.roll(ramp, i, axis=2).astype(np.uint8)).save(folder / f"class{i % 2}/{i}.png")
    return folder


@pytest.fixture
def saved_model(tmp_path):
    """The folder of a `small_model`."""
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def written_models(tmp_path):
    """Folders of a random generator and a random captioner."""
    text_lm(codebook_size=32, image_tokens=16).save_pretrained(tmp_path / "ar")
    small_model(seed=3, codebook_size=32, codebook_dim=8).save_pretrained(tmp_path / "ar/vqrae")
    small_captioner().save_pretrained(tmp_path / "caption")
    return {"ar": str(tmp_path / "ar"), "caption": str(tmp_path / "caption"), "vqrae": str(tmp_path / "ar/vqrae")}


@pytest.fixture(scope="module")
def qwen3_twin(tmp_path_factory):
    """A small random Qwen3 of transformers', and the folder it was saved in."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    twin = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, rope_theta=1e6, tie_word_embeddings=True, attention_bias=False, use_sliding_window=False,
        initializer_range=0.3)).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("qwen3")
    twin.save_pretrained(folder)
    return twin, folder


@pytest.fixture
def qwen3_with_text(qwen3_twin, tmp_path):
    """A folder of a random Qwen3 with a tokenizer of two words, and that tokenizer."""
    shutil.copytree(qwen3_twin[1], tmp_path / "qwen3")
    words = {"red": 0, "apple": 1, START_OF_IMAGE: 48, END_OF_TEXT: 49}
    text = Tokenizer(tokenizers.models.WordLevel(words, unk_token="red"))
    text.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text.save(str(tmp_path / "qwen3/tokenizer.json"))
    return tmp_path / "qwen3", text


# --- HTML of a page ---


def pictures_in(html):
    """The images in some HTML, as arrays (H, W, 3)."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for data in re.findall(r"data:image/png;base64,([^\"]*)", html)]


def cells_in(html):
    """The numbers of the buttons in some HTML."""
    return [int(cell) for cell in re.findall(r'data-cell="(\d+)"', html)]


# --- odd files ---


def edit(path, old, new):
    """Damage a text file: `new` in place of `old`, which must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


RED = (200, 40, 10)


def write_variants(folder):
    """The same red picture in every kind of file, and what each should read as."""
    image = Image.new("RGB", (30, 20), RED)
    image.save(folder / "rgb.png")
    image.quantize(4).save(folder / "palette.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    clear.paste(RED + (255,), (0, 0, 30, 20))
    clear.save(folder / "rgba.png")
    image.save(folder / "plain.webp", lossless=True)
    return ["rgb.png", "palette.png", "cmyk.tif", "rgba.png", "plain.webp"]


def swapped_profile():
    """The bytes of sRGB's ICC profile with red and green changed for each other."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"tmp ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp ", b"gXYZ", 1)


def normalise(images):
    """By ImageNet's mean and std, as DINOv2 and ConvNeXt expect."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (vqrae.ViTConfig.mean, vqrae.ViTConfig.std))
    return (images - mean) / std


# --- sets that datasets reads ---


def colour_of(i):
    """Three bytes that tell 2,000 images apart, however they are compressed."""
    return i % 16 * 16 + 8, i // 16 % 16 * 16 + 8, i // 256 * 32 + 16


def number_of(image):
    """Which image has that colour: (3, H, W) uint8 -> int."""
    red, green, blue = image.flatten(1).double().mean(1).tolist()
    return int(red // 16) + 16 * int(green // 16) + 256 * int(blue // 32)


def coloured_png(i):
    """The bytes of an image of colour i."""
    file = io.BytesIO()
    Image.new("RGB", (20, 16), colour_of(i)).save(file, "PNG")
    return file.getvalue()


def write_tars(folder, count, images):
    """WebDataset's tars: 00000.png, of colour i, with a mask, depth and captions, and what macOS adds to each file."""
    needs("datasets")  # without which nothing here reads them
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"some-{number:06}.tar", "w") as tar:
            for i in range(number * images, (number + 1) * images):
                sample = {"depth.png": coloured_png(900), "png": coloured_png(i), "seg.png": coloured_png(901),
                          "cls": b"3", "json": b'["one", "two"]', "txt": f" \u00e9t\u00e9 {i}\n".encode()}
                for kind, data in sample.items():
                    for name, content in ((f"v1/._{i:05}.{kind}", b"nothing"), (f"v1/{i:05}.{kind}", data)):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return folder


def pack(source, out, *more):
    """Pack images by data/imagenet/prepare.py, which is no module."""
    needs("datasets")
    packing = importlib.util.spec_from_file_location("packing", ROOT / "data/imagenet/prepare.py")
    prepare = importlib.util.module_from_spec(packing)
    packing.loader.exec_module(prepare)
    prepare.main(["--source", str(source), "--out", str(out), "--workers", "1", *more])


@pytest.fixture(scope="session")
def fake_imagenet(tmp_path_factory):
    """400 JPEGs of 40 x 32 pixels in 20 classes, one colour each, 20 of them in val/; and a file that is none."""
    folder = tmp_path_factory.mktemp("imagenet")
    for i in range(400):
        path = folder / ("val" if i % 20 == 7 else "train") / f"n{i % 100 // 5:04}" / f"image_{i:04}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), colour_of(i)).save(path, quality=95)
    whole = (folder / "train/n0003/image_0015.JPEG").read_bytes()
    (folder / "train/n0003/broken.JPEG").write_bytes(whole[:-20])
    return folder


@pytest.fixture(scope="session")
def packed(fake_imagenet, tmp_path_factory):
    """The set of `fake_imagenet`."""
    out = tmp_path_factory.mktemp("packed") / "set"
    pack(fake_imagenet, out)
    return out


# --- training runs ---


def short_arguments(encoder, photos, out):
    """Arguments of a training run that takes a second, its --out the last."""
    return ["--stage", "1", "--encoder", str(encoder), "--data", str(photos), "--image-size", "16",
            "--codebook-size", "32", "--codebook-dim", "8", "--start-tokens", "256", "--batch-size", "4",
            "--steps", "6", "--log-every", "2",
            "--evaluate-every", "4", "--checkpoint-every", "3", "--workers", "0", "--device", "cpu",
            "--out", str(out)]


@pytest.fixture
def short_run(encoder_folder, photo_folder, tmp_path):
    """Arguments of a training run in an empty folder."""
    return short_arguments(encoder_folder, photo_folder, tmp_path / "run")


@pytest.fixture(scope="session")
def first_stage(encoder_folder, photo_folder, tmp_path_factory):
    """The folder of a stage 1 that has run."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train.main(short_arguments(encoder_folder, photo_folder, folder))
    return folder


@pytest.fixture
def second_stage(first_stage, short_run, tmp_path):
    """Arguments of a short stage 2 whose discriminator sets in at step 3, on a stage 1 that has run."""
    shutil.copytree(first_stage, tmp_path / "first")
    keep = ("--data", "--batch-size", "--steps", "--log-every", "--evaluate-every", "--checkpoint-every", "--workers",
            "--device", "--out")
    kept = [part for flag in keep for part in (flag, short_run[short_run.index(flag) + 1])]
    return ["--stage", "2", "--init", str(tmp_path / "first"), "--discriminator-start", "3", "--warmup-steps", "1",
            "--discriminator-width", "32", *kept]


@pytest.fixture
def ar_run(encoder_folder, photo_folder, tmp_path):
    """Arguments of a short stage ar on a random tokenizer of 16 codes an image."""
    model = small_model(codebook_size=32, codebook_dim=8)
    model.save_pretrained(tmp_path / "tokenizer")
    return ["--stage", "ar", "--tokenizer", str(tmp_path / "tokenizer"), "--data", str(photo_folder), "--width", "32",
            "--depth", "2", "--heads", "2", "--kv-heads", "1", "--head-width", "16", "--mlp-width", "64",
            "--text-vocabulary", "300", "--batch-size", "4", "--steps", "6", "--log-every", "2", "--evaluate-every",
            "4", "--checkpoint-every", "3", "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]


@pytest.fixture
def caption_run(encoder_folder, ar_run):
    """Arguments of a short stage caption on the photos."""
    start = ar_run.index("--width")
    return ["--stage", "caption", "--encoder", str(encoder_folder), "--image-size", "16", "--data",
            ar_run[ar_run.index("--data") + 1], *ar_run[start:]]


def without_sizes(ar_run):
    """These arguments without the flags that a Qwen3 checkpoint has fixed, and their values."""
    fixed = {f"--{name.replace('_', '-')}" for name in FIXED_BY_QWEN3}
    return [word for before, word in zip([None, *ar_run], ar_run) if not {before, word} & fixed]


def make_run(arguments):
    """A training run that has not begun, and its stage."""
    args = train.parse_args(arguments)
    run = Run(args, train.settings_for(args, args.stage))
    return run, train.STAGES[args.stage][0](run, run.config)


def take_steps(run, stage, count):
    """Train for some steps and return the terms of the loss in each."""
    terms = []
    for _, batch in zip(range(count), stage.batches()):
        run.window = {}
        stage.step(batch)
        terms.append({name: total.item() for name, (total, _) in run.window.items()})
    return terms


def weights(folder):
    """The bytes of a model's weights."""
    return (folder / "model.safetensors").read_bytes()


def begin(arguments):
    """Leave a checkpoint as of a run that has been stopped before its first step."""
    run, _ = make_run(arguments)
    run.save()


def log_of(folder):
    """The lines of a run's metrics.jsonl, without how quick it was."""
    return [{name: value for name, value in json.loads(line).items() if name != "images_per_second"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped_at(step, arguments):
    """Train until the update of a step begins, and leave as if killed."""
    class Stopped(Exception):
        pass

    update = Run.update

    def stop(run):
        if run.done == step:
            raise Stopped
        update(run)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "update", stop)
        train.main(arguments)


def assert_resume_is_exact(command, tmp_path):
    """Train once in one go and once with two interruptions; weights, checkpoint and log lines must be the same."""
    train.main(command)
    whole, parts = tmp_path / "run", tmp_path / "parts"
    arguments = command[:-1] + [str(parts), "--resume"]

    for step in (2, 5):  # one before the first checkpoint, one between two checkpoints
        stopped_at(step, arguments)
    train.main(arguments)
    assert weights(parts) == weights(whole)
    assert log_of(parts) == log_of(whole)
    states = [torch.load(folder / "checkpoint/state.pt", weights_only=True) for folder in (parts, whole)]
    assert states[0].keys() == states[1].keys()
    # "lines" tell how quick it was; "rng" is where the order of images left it, and a step draws from its own seed.
    for name in states[0].keys() - {"seconds", "lines", "rng"}:
        assert_same(states[0][name], states[1][name], name)


def assert_same(one, other, name):
    """Two trees of dicts and lists with equal tensors and values in them."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for a, b in zip(one, other):
            assert_same(a, b, name)
    else:
        assert one == other, name


def command(*arguments):
    """How a script in the root is called from outside."""
    return [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]


def launch_ranks(*arguments, ranks=2):
    """Start a script as several processes, by a launcher that leads a group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(command + [str(argument) for argument in arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_ranks(launcher, limit):
    """The result of a launcher; after `limit` seconds it and its ranks are ended, and subprocess.TimeoutExpired comes.

    Every rank leads a group of its own, too, so that of the launcher does not hold them all.
    """
    try:
        stdout, stderr = launcher.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        processes = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in processes.splitlines()]
        for group in [launcher.pid, *(pid for pid, parent in pairs if parent == launcher.pid)]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        launcher.wait()
        raise
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)


@torch.no_grad()
def started_model(model, images):
    """A model whose projections and codes have started from the tokens of images, so that its codes differ."""
    patches = F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)
    model.start(model.encoder(images).flatten(0, 1), patches, generator=torch.Generator().manual_seed(0))
    model.reading.normal_(std=0.1)
    return model


@torch.no_grad()
def assert_paints_nearly_alike(model, dtype, alike, close):
    """A model in another precision chooses a share `alike` of the same codes, and paints to within `close`."""
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = started_model(model, images)
    other, out = copy.deepcopy(model).to(dtype), model(images)
    for seen in (images, images.to(dtype)):
        found = other(seen)
        assert found.features.dtype == dtype and found.z.dtype == torch.float32  # what the search compares
        if out.indices is None:
            torch.testing.assert_close(found.reconstruction.float(), out.reconstruction, rtol=0, atol=close)
            continue
        assert torch.equal(other.encode(seen)[1], found.indices)
        assert (found.indices == out.indices).float().mean() >= alike
        torch.testing.assert_close(other.decode(out.indices), model.decode(out.indices), rtol=0, atol=close)
        torch.testing.assert_close(other.decode(found.indices), found.reconstruction.float().clamp(0, 1), rtol=0,
                                   atol=close)
        torch.testing.assert_close(other.features_of(out.z_q).float(), model.features_of(out.z_q), rtol=0, atol=close)


def several_runs(path, before_last=""):
    """Write a script that trains one run after the other in one process group, all of argv[1], a JSON list of lists.

    A rank that is not the first ends its process with a run; here not before the last of them, before which comes a
    line of code more.
    """
    path.write_text(f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.nn.functional as F
import support.run
import train
import vqrae

class Left(Exception):
    pass

def leave(code):
    raise Left

def infinite_on_one_rank(*arguments):
    loss, terms = real(*arguments)
    steps.append(1)
    return loss + (torch.inf if os.environ["RANK"] == "1" and len(steps) == 3 else 0), terms  # with finite gradients

runs, leave_ranks, real, steps = json.loads(sys.argv[1]), support.run.leave_ranks, vqrae.stage1_loss, []
with support.run.one_sentence_errors(), support.run.process_group("cpu"):
    for arguments in runs:
        support.run.leave_ranks = leave_ranks if arguments is runs[-1] else leave
        if arguments is runs[-1]:
            {before_last or "pass"}
        args = train.parse_args(arguments)
        try:
            train.train(args, train.settings_for(args, args.stage))
        except Left:
            pass
""")
    return path


def assert_same_log(one, two):
    """The log lines of two runs, in their folders, have the same figures, up to the order of sums."""
    one, two = log_of(one), log_of(two)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4 if "perplexity" in name else 1e-5, abs=1e-5), name


def torchrun(*arguments, ranks=2, limit=240):
    """Run a script in the root as several processes, and wait for them, `limit` seconds at most."""
    return wait_for_ranks(launch_ranks(*arguments, ranks=ranks), limit)

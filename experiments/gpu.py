"""What a GPU makes of this repository, as one table and one line of JSON: within 8 minutes and with nothing to fetch.

    python experiments/gpu.py                          # every part that fits into --minutes
    python experiments/gpu.py --only resume generation
    python experiments/gpu.py --device cpu --small     # every part in small, to see that it runs

Each part is a process of its own: one that fails, hangs or is killed leaves a sentence in the table, and the others go
on. Weights are random and of the right sizes, pictures are made up. vector-quantize-pytorch is used where it is
installed. The figures of --small mean nothing.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
import vqrae  # noqa: E402
from export import save_encoder  # noqa: E402
from support.benchmark import benchmark, loader_rate, wait_for  # noqa: E402
from support.files import InputError  # noqa: E402
from support.run import Run, choose_device  # noqa: E402
from support.settings import number  # noqa: E402

# The encoders that two presets fetch, and the language model of a third.
ENCODERS = {
    "dinov2-s": {"image_size": 518, "patch_size": 14, "width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "siglip2-256": {"image_size": 256, "patch_size": 16, "width": 1152, "depth": 27, "heads": 16, "mlp_width": 4304,
                    "family": "siglip_vision_model", "activation": "gelu_pytorch_tanh",
                    **vqrae.FAMILIES["siglip_vision_model"][3]},
}
QWEN3 = {"text_vocabulary": 151936, "codebook_size": 16384, "width": 1024, "depth": 28, "heads": 16, "kv_heads": 8,
         "head_width": 128, "mlp_width": 3072}
FIRST_BATCH = {"dinov2-s": 1024, "siglip2-256": 512}  # halved until it fits

# The same for --small.
SMALL_ENCODER = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 1, "heads": 2, "mlp_width": 48}
SMALL_LM = {"text_vocabulary": 50, "codebook_size": 32, "width": 32, "depth": 2, "heads": 2, "kv_heads": 1,
            "head_width": 16, "mlp_width": 64}
SMALL_TRAINING = ["--image-size", "16", "--codebook-size", "32", "--codebook-dim", "8", "--start-tokens", "256",
                  "--batch-size", "4"]


@dataclass
class Place:
    """Where a part is measured: device, sizes, a folder for what parts write and share, and the end of the time."""

    device: str
    small: bool
    folder: Path
    end: float  # as time.time() tells it

    def encoder(self, name):
        """The folder of an encoder of ENCODERS, of random weights, as the hub would have it."""
        folder = self.folder / name
        if not (folder / "model.safetensors").exists():
            torch.manual_seed(0)
            sizes = {**ENCODERS[name], **(SMALL_ENCODER if self.small else {})}
            save_encoder(vqrae.Encoder(vqrae.ViTConfig(**sizes)), folder, torch.bfloat16)
        return folder

    def pictures(self):
        """A folder of JPEGs of 400 x 300 pixels, as photographs are stored: blurs of colour with some noise."""
        folder, part = self.folder / "pictures", self.folder / "pictures.tmp"
        if not folder.exists():
            part.mkdir(exist_ok=True)
            random = np.random.default_rng(0)
            for i in range(24 if self.small else 768):
                colours = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((400, 300))
                noise = random.normal(0, 8, (300, 400, 1))
                Image.fromarray((np.asarray(colours) + noise).clip(0, 255).astype(np.uint8)).save(part / f"{i}.jpg")
            part.rename(folder)
        return folder

    def workers(self):
        """--workers: as many processes as help to read images."""
        return ["--workers", "0" if self.small else str(min(16, os.cpu_count() or 1))]


# --- the parts: each returns a dict of figures, which may be words ---


def describe(place):
    """The device, and what a table of figures is worth nothing without."""
    device = choose_device(place.device)
    memory = {}
    if device.type == "cuda":
        traits = torch.cuda.get_device_properties(device)
        memory = {"name": traits.name, "memory, GB": traits.total_memory / 1e9, "CUDA": torch.version.cuda}
    return {"device": str(device), **memory, "CPU cores": os.cpu_count(), "torch": torch.__version__}


def run_tests(place):
    """tests/test_device.py on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_device.py", "--device",
               place.device, *(["-k", "nearest or greedily"] if place.small else [])]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                           timeout=max(1, place.end - time.time() - 2))
    print(ended.stdout + ended.stderr, file=sys.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", ended.stdout, re.MULTILINE)
    passed = re.search(r"(\d+) passed", ended.stdout)
    if ended.returncode or not passed:
        reason = ", ".join(failed) or ([None] + (ended.stdout + ended.stderr).split("\n"))[-2]
        raise InputError(f"{passed[1] if passed else 'no'} tests passed, but not: {reason}")
    return {"tests passed": int(passed[1])}


def train_tiny(place):
    """The tiny preset's stage 1 for 300 steps, to be held against what two CPU cores make of it."""
    out = place.folder / "tiny"
    small = ["--encoder", str(place.encoder("dinov2-s")), "--data", str(place.pictures()), *SMALL_TRAINING]
    train.main(["--stage", "1", "--steps", "5" if place.small else "300", "--device", place.device, "--log-every", "25",
                "--out", str(out), "--overwrite", *(small if place.small else [])])
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {"precision": summary["precision"], "PSNR, dB (a CPU: 22.92)": summary["val_psnr"],
            "SSIM (a CPU: 0.741)": summary["val_ssim"], "utilization": summary["val_utilization"],
            "images/s": summary["images_per_second"], "seconds with all figures": summary["seconds"]}


def train_to(arguments, stop=None):
    """Train up to a step, or to the end, and leave as if killed -> the run."""
    args = train.parse_args(arguments)
    run = Run(args, train.settings_for(args, args.stage))
    stage = train.STAGES[args.stage][0](run, run.config)
    for batch in run.steps(stage):
        stage.step(batch)
        if run.done == stop:
            break
    return run


def resume(place):
    """A run that goes through beside one that is stopped between two checkpoints and resumed, of stages 1 and 2.

    Once as CUDA likes it, and once with torch.use_deterministic_algorithms wherever an operation has such an algorithm.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the second way needs from the start
    common = ["--data", str(place.pictures()), "--steps", "8", "--checkpoint-every", "4", "--evaluate-every", "1000",
              "--warmup-steps", "1", "--device", place.device, *place.workers()]
    stage_1 = ["--stage", "1", "--encoder", str(place.encoder("dinov2-s")), *SMALL_TRAINING] if place.small else [
        "--stage", "1", "--codebook-size", "1024", "--start-tokens", "16384"]
    first = place.folder / "resume-first"
    stage_2 = ["--stage", "2", "--init", str(first), "--discriminator-start", "2",
               *(["--batch-size", "4"] if place.small else [])]
    figures = {}
    for way, deterministic in (("", False), (", deterministic algorithms", True)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for name, arguments in (("stage 1", stage_1), ("stage 2", stage_2)):
            folder = place.folder / f"resume-{name[-1]}-{deterministic}"
            whole = train_to([*arguments, *common, "--out", str(folder / "whole")])
            train_to([*arguments, *common, "--out", str(folder / "parts")], stop=6)
            parts = train_to([*arguments, *common, "--out", str(folder / "parts"), "--resume"])
            figures[f"{name}{way}"] = how_alike(whole, parts)
            if name == "stage 1":
                whole.average.save_pretrained(first)
    return figures


def how_alike(one, other):
    """Whether two runs have ended with the same weights and averages, in words."""
    pairs = [(tensor, twin) for a, b in ((one.model, other.model), (one.average, other.average))
             for tensor, twin in zip(a.state_dict().values(), b.state_dict().values())]
    if all(torch.equal(tensor, twin) for tensor, twin in pairs):
        return "bit-identical"
    return f"differs by up to {max((tensor - twin).abs().max().item() for tensor, twin in pairs):.1e}"


def largest_that_fits(measure, size):
    """measure(size), or of half as much where the memory is not enough, and so on down to 1."""
    while True:
        try:
            return measure(size)
        except RuntimeError as error:
            if size == 1 or not re.search("out of memory|CUBLAS_STATUS_ALLOC_FAILED", str(error)):
                raise
            print(f"{size} do not fit: {str(error).splitlines()[0]}", file=sys.stderr)
        size //= 2  # here, where the error no longer holds on to what has filled the memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def time_preset(place, name, compile=False):
    """`--benchmark` of a preset's stage 1, at the largest batch that fits: its steps on one batch, the loader beside.

    The perceptual loss is the encoder's own, since the paper's networks cannot be fetched.
    """
    if place.small and compile:  # a C++ compiler would take a minute
        torch.compile = functools.partial(torch.compile, backend="eager")
    arguments = ["--stage", "1", "--preset", name, "--encoder", str(place.encoder(name)), "--data",
                 str(place.pictures()), "--perceptual", "vfm", "--codebook-init", "gaussian", "--projection-init",
                 "random", "--device", place.device, "--out", str(place.folder / "none"), *place.workers(),
                 *(SMALL_TRAINING if place.small else ["--precision", "bf16"]), *(["--compile"] if compile else [])]

    def measure(size):
        args = train.parse_args([*arguments, "--batch-size", str(size)])
        run = Run(args, train.settings_for(args, "1"))
        stage = train.stage_1(run, run.config)
        batches = stage.batches()
        batch = next(batches)
        batches.close()
        loaded = loader_rate(run, stage, images=16 if place.small else 512)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            benchmark(run, replace(stage, batches=lambda: itertools.repeat(batch)))
        found = json.loads(told.getvalue().splitlines()[-1])
        z = torch.randn(1, size * stage.tokens_per_image, run.config.codebook_dim, device=run.device)
        quantizing = time_quantizer(run.model.quantizer, z, run.device)
        return {"batch": size, "images/s": found["images_per_second"],
                "share of a matrix product's rate": found["share_of_matmul"],
                "TFLOP/s": found["flop_per_second"] / 1e12, "of a product": found["matmul_flop_per_second"] / 1e12,
                "share of the quantizer": quantizing / found["seconds_per_step"],
                "peak memory, GB": (found["peak_memory_bytes"] or 0) / 1e9, "loader's images/s": loaded,
                "precision": found["precision"]}

    return largest_that_fits(measure, 4 if place.small else FIRST_BATCH[name])


def time_quantizer(quantizer, z, device, repeats=5):
    """Seconds of one pass forward and backward of a SimVQ, ours or vector-quantize-pytorch's, on z (1, n, e)."""
    z.requires_grad_()

    def step():
        z_q, _, *losses = quantizer(z)
        (z_q.square().mean() + sum(losses)).backward()
        z.grad = None
        quantizer.zero_grad()

    step()
    wait_for(device)
    begin = time.time()
    for _ in range(repeats):
        step()
    wait_for(device)
    return (time.time() - begin) / repeats


def compare_quantizers(place):
    """SimVQ forward and backward beside vector-quantize-pytorch's, in fp32 as both compute."""
    device = choose_device(place.device)
    tokens, codes, dim = (512, 256, 32) if place.small else (65536, 16384, 1536)
    makers = {"ours": lambda: vqrae.SimVQ(codes, dim)}
    figures = {"tokens": tokens, "codes": codes, "dimensions": dim}
    try:
        theirs = importlib.import_module("vector_quantize_pytorch")
        makers["theirs"] = lambda: theirs.SimVQ(dim=dim, codebook_size=codes, rotation_trick=False)
    except ImportError:
        figures["vector-quantize-pytorch"] = "not installed"
    for name, make in makers.items():
        torch.manual_seed(0)
        quantizer, z = make().to(device), torch.randn(1, tokens, dim, device=device)
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        figures[f"{name}, ms"] = 1000 * time_quantizer(quantizer, z, device)
        if device.type == "cuda":
            figures[f"{name}, GB beside it"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return figures


def generate(place):
    """Pictures of 256 codes by a transformer of Qwen3-0.6B's sizes, drawn at temperature 1."""
    device = choose_device(place.device)
    count, batches = (8, (1, 3)) if place.small else (256, (1, 64))
    torch.manual_seed(0)
    with device:  # random weights by the hundred million are quicker made there
        model = vqrae.VisualLM(vqrae.LMConfig(**(SMALL_LM if place.small else QWEN3), image_tokens=count))
    figures = {"codes": count}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for batch in batches:
            prompts = [[1, 2, 3]] * batch
            model.extend(prompts, 4, generator=torch.Generator().manual_seed(0))
            wait_for(device)
            begin = time.time()
            model.extend(prompts, count, generator=torch.Generator().manual_seed(0))
            wait_for(device)
            rate = batch * count / (time.time() - begin)
            figures[f"tokens/s, batch {batch}, {str(dtype).removeprefix('torch.')}"] = rate
    return figures


class Part(NamedTuple):
    """A part: what measures it, its further arguments, and the seconds that it may take on a large GPU."""

    measure: Callable
    arguments: tuple
    seconds: int


PARTS = {  # what matters most comes first
    "resume": Part(resume, (), 60),
    "tests": Part(run_tests, (), 60),
    "tiny": Part(train_tiny, (), 45),
    "siglip2-256": Part(time_preset, ("siglip2-256",), 60),
    "quantizer": Part(compare_quantizers, (), 15),
    "generation": Part(generate, (), 50),
    "dinov2-s": Part(time_preset, ("dinov2-s",), 40),
    "siglip2-256-compiled": Part(time_preset, ("siglip2-256", True), 90),
    "dinov2-s-compiled": Part(time_preset, ("dinov2-s", True), 60),
}


# --- each in a process of its own, and what came of them all ---


def work(part, place, answer):
    """In a process of its own: send the figures of a part, or the sentence that it failed with."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # for the table alone goes to stdout
            answer.send(part.measure(place, *part.arguments))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}")


def in_a_process(part, place):
    """The figures of a part as a dict, or a sentence that says why there are none; no later than the end of the time.

    On Linux processes are forked, before anything has touched the GPU, so that none imports torch anew; a Mac's GPU
    does not work in a forked one, and Windows has none.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answer, send = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(part, place, send))
    process.start()
    send.close()
    try:
        found = answer.recv() if answer.poll(max(0.0, place.end - time.time())) else "ended, for the time was over"
        process.join(5)
    except EOFError:
        process.join(5)
        found = f"its process ended with exit code {process.exitcode} and without a word"
    process.kill()  # should it not have ended by itself
    process.join()
    return found


def shown(value):
    """A figure for the table."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows):
    """Rows (part, seconds, figures or a sentence) as a table."""
    lines = ["| part | seconds | |", "|---|---|---|"]
    for name, seconds, found in rows:
        told = found if isinstance(found, str) else "; ".join(f"{key} {shown(value)}" for key, value in found.items())
        lines.append(f"| {name} | {seconds:.0f} | {told.replace('|', '/')} |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, mps or cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="all at toy sizes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", default=list(PARTS),
                        help=f"some of the parts: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=number(float), default=8.0, metavar="X", help="for all parts together")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(args.device, args.small, Path(folder), time.time() + 60 * args.minutes)
        about = in_a_process(Part(describe, (), 10), place)
        if isinstance(about, str):
            sys.exit(f"error: {about}")
        rows, failed = [], False
        for name in args.only:
            part, begin = PARTS[name], time.time()
            needed, left = 0 if args.small else part.seconds, place.end - time.time()
            if left <= needed:
                found = f"left out: it may take {needed} s, and {max(0.0, left):.0f} s of --minutes were left"
            else:
                found = in_a_process(part, place)
                failed = failed or isinstance(found, str)
            rows.append((name, time.time() - begin, found))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)  # the rest may be killed
    print(table([("device", 0.0, about), *rows]))
    print(json.dumps({"small": args.small, "about": about, "parts": {
        name: {"seconds": seconds, **({"sentence": found} if isinstance(found, str) else {"figures": found})}
        for name, seconds, found in rows}}))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

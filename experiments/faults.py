"""Faults on purpose: training is killed, starved of disk and fed damage, and has to end as if nothing had happened.

    nice python experiments/faults.py                # kill -9 at 54 moments, then other faults: a table, a JSON line
    nice python experiments/faults.py --fuzz 2000    # the tests of tests/test_fuzz.py on at least so many inputs

Every fault ends in one of two ways: the next --resume reaches the weights, log and figures of an undisturbed run, bit
for bit; or it ends with one sentence, leaves the checkpoint as it was, and reaches them once the fault is mended. Runs
are small, and on one thread each, so that two fit side by side. The full disk is a tmpfs, which takes root to mount.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import vqrae  # noqa: E402
from export import save_encoder  # noqa: E402
from support.files import read_safetensors  # noqa: E402

STEPS = 36
TIMINGS = ("seconds", "images_per_second")
# train.py with a step that does something else first, at a step number.
DISTURBED = """
import os, sys
sys.path.insert(0, {root!r})
import train
make, settings = train.STAGES[{stage!r}]
def make_disturbed(run, config):
    stage = make(run, config)
    step = stage.step
    def disturbed(batch):
        if run.done == {at}:
            {action}
        step(batch)
    stage.step = disturbed
    return stage
train.STAGES[{stage!r}] = make_disturbed, settings
train.main(sys.argv[1:])
"""


def make_inputs(folder):
    """A small encoder in two shards, forty images in two classes, and the arguments of three runs that need them."""
    torch.manual_seed(0)
    encoder = folder / "encoder"
    save_encoder(vqrae.Encoder(vqrae.ViTConfig(32, 8, width=96, depth=3, heads=3, mlp_width=192)), encoder)
    weights = read_safetensors(encoder / "model.safetensors")
    (encoder / "model.safetensors").unlink()
    files = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, encoder / file)
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    for i in range(40):
        path = folder / f"images/class{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (34, 36, 3), np.uint8)).save(path)
    common = ["--data", folder / "images", "--batch-size", "8", "--steps", str(STEPS), "--log-every", "2",
              "--evaluate-every", "10", "--checkpoint-every", "3", "--workers", "0", "--device", "cpu", "--resume"]
    return {
        "1": ["--stage", "1", "--encoder", encoder, "--image-size", "32", "--codebook-size", "256", "--codebook-dim",
              "96", "--start-tokens", "2048", *common],
        "2": ["--stage", "2", "--init", folder / "whole-1", "--adversarial-weight", "0.02", "--discriminator-start",
              "10", "--discriminator-learning-rate", "1e-3", *common],
        "ar": ["--stage", "ar", "--tokenizer", folder / "whole-2", "--width", "128", "--depth", "3", "--heads", "2",
               "--kv-heads", "1", "--head-width", "64", "--mlp-width", "256", *common],
    }


def start(arguments, out, disturbed=None):
    program = ["-c", disturbed] if disturbed else [ROOT / "train.py"]
    command = [sys.executable, "-u", *program, *arguments, "--out", out]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(arguments, out, disturbed=None):
    """Train to the end, whatever that is -> exit code, and what was said on stderr without the progress bar."""
    process = start(arguments, out, disturbed)
    _, errors = process.communicate(timeout=300)
    errors = [line for line in re.split("[\r\n]", errors) if line.strip() and "step/s" not in line]
    return process.returncode, "\n".join(errors)


def result(out):
    """What two runs must agree in: the weights' bytes, the log and the final figures without timings."""
    def figures(line):
        return {name: value for name, value in line.items() if name not in TIMINGS}

    return ([(out / "model.safetensors").read_bytes()],
            [figures(json.loads(line)) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()],
            figures(json.loads((out / "summary.json").read_text(encoding="utf-8"))))


def kill(arguments, out, moment, before, after):
    """Kill a run at a moment of its time up to its first checkpoint (-1/4 to 0) or of that behind it (0 to 1).

    Returns in what it was killed, or None if it was done already.
    """
    process, checkpoint = start(arguments, out), out / "checkpoint/state.pt"
    process.stdout.readline()
    while moment >= 0 and process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    try:
        process.wait(moment * after if moment >= 0 else (1 + 4 * moment) * before)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if checkpoint.with_name("state.pt.tmp").exists():
        return "writing a checkpoint"
    if not checkpoint.exists():
        return "before a checkpoint"
    return "after the last step" if torch.load(checkpoint)["done"] == STEPS else "between checkpoints"


def one_kill(job):
    """One run that is killed once and resumed to its end -> in what it was killed, and whether it ended the same."""
    stage, arguments, folder, number, times, whole = job
    draw, out = random.Random(f"{stage} {number}"), folder / f"killed-{stage}-{number}"
    while not (phase := kill(arguments, out, draw.uniform(-0.25, 1), *times)):
        shutil.rmtree(out)
    code, _ = run(arguments, out)
    same = code == 0 and result(out) == whole
    shutil.rmtree(out)
    return phase, same


class Fault:
    """A copy of an interrupted run to do damage to; what comes of it is one row of the table."""

    def __init__(self, title, interrupted, arguments, whole):
        self.title, self.arguments, self.whole, self.said = title, arguments, whole, ""
        self.out = interrupted.with_name(f"fault {title}".replace(" ", "-"))
        if interrupted.exists():
            shutil.copytree(interrupted, self.out)

    def refuses(self, disturbed=None):
        """--resume ends with one sentence and leaves every checkpoint as it was, or a later one that is whole."""
        code, errors = run(self.arguments, self.out, disturbed)
        self.said = errors.splitlines()[-1] if errors else ""
        one = code == 1 and errors.count("error: ") == 1 and "Traceback" not in errors and self.said[:7] == "error: "
        if not one:
            print(f"{self.title}: exit code {code}, {errors}")
        return one

    def reaches_the_end(self):
        code, errors = run(self.arguments, self.out)
        if code or "Traceback" in errors:
            print(f"{self.title}: exit code {code}, {errors}")
        return code == 0 and result(self.out) == self.whole


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def faults(folder, runs, whole):
    """Every other fault, one after the other: yield its title, what was said, and whether all went well."""
    interrupted = {}
    for stage in runs:
        interrupted[stage] = folder / f"interrupted-{stage}"
        killing = DISTURBED.format(root=str(ROOT), stage=stage, at=20, action="os.kill(os.getpid(), 9)")
        assert run(runs[stage], interrupted[stage], killing)[0] == -signal.SIGKILL
    draw = random.Random(0)

    def fault(title, stage="1"):
        return Fault(title, interrupted[stage], runs[stage], whole[stage])

    for stage in ("1", "2", "ar"):
        f = fault(f"checkpoint cut short, stage {stage}", stage)
        path = f.out / "checkpoint/state.pt"
        os.truncate(path, draw.randrange(path.stat().st_size))
        yield f, f.reaches_the_end()
    f = fault("one bit of the checkpoint flipped")
    path = f.out / "checkpoint/state.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    yield f, f.reaches_the_end()
    f = fault("both checkpoints cut short")
    kept = files_of(f.out / "checkpoint")
    for name, content in kept.items():
        (f.out / "checkpoint" / name).write_bytes(content[:len(content) // 2])
    cut = files_of(f.out / "checkpoint")
    refused = f.refuses() and files_of(f.out / "checkpoint") == cut
    for name, content in kept.items():
        (f.out / "checkpoint" / name).write_bytes(content)
    yield f, refused and f.reaches_the_end()
    for title, damage in (("cut short", lambda path: os.truncate(path, path.stat().st_size * 2 // 3)),
                          ("gone", lambda path: path.unlink()), ("noise", lambda path: path.write_bytes(b"\xff\0"))):
        f = fault(f"metrics.jsonl {title}")
        damage(f.out / "metrics.jsonl")
        yield f, f.reaches_the_end()
    for title, stage, path in (("a shard of the encoder gone", "1", folder / "encoder/model-2.safetensors"),
                               ("an image gone", "1", folder / "images/class1/3.png"),
                               ("the model of stage 1 gone", "2", folder / "whole-1/model.safetensors"),
                               ("the tokenizer gone", "ar", folder / "whole-2/model.safetensors")):
        f = fault(title, stage)
        before = files_of(f.out / "checkpoint")
        path.rename(folder / "away")
        refused = f.refuses() and files_of(f.out / "checkpoint") == before
        (folder / "away").rename(path)
        yield f, refused and f.reaches_the_end()
    f = fault("cached codes cut short", "ar")
    for path in (f.out / "codes").glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    yield f, f.reaches_the_end()
    for stage in ("1", "2"):
        f = fault(f"a batch of no numbers, stage {stage}", stage)
        before = files_of(f.out / "checkpoint")
        no_numbers = "batch = batch[0] * float('nan'), batch[1]"  # images and their places
        refused = f.refuses(DISTURBED.format(root=str(ROOT), stage=stage, at=20, action=no_numbers))
        yield f, refused and files_of(f.out / "checkpoint") == before and f.reaches_the_end()
    yield from full_disks(folder, runs, whole)


def full_disks(folder, runs, whole):
    """A run on a disk that is too small, again and again on a larger one, until it fits."""
    size = sum(path.stat().st_size for path in (folder / "whole-1").rglob("*") if path.is_file())
    f = Fault("full disk", folder / "nothing", runs["1"], whole["1"])
    f.out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", f.out], capture_output=True).returncode:
        f.said = "left out: no tmpfs may be mounted here"
        yield f, True
        return
    try:
        said = []
        for share in (0.0, 0.2, 0.5, 0.8, 0.97):
            subprocess.run(["mount", "-o", f"remount,size={4096 + int(share * size)}", f.out], check=True)
            refused = f.refuses()
            said.append(f.said)
            yield f, refused
            f.title = f"full disk, {share:.0%} of what a run leaves and no more than that"
        subprocess.run(["mount", "-o", "remount,size=1g", f.out], check=True)
        f.title, f.said = "full disk, and then room", ""
        yield f, f.reaches_the_end()
    finally:
        subprocess.run(["umount", f.out], check=True)


def fuzz(count):
    """Run the fuzzing tests of the suite on `count` inputs in all or more, and say how many there were."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_fuzz.py", "-k", "fuzzed", "--hypothesis-show-statistics"],
        cwd=ROOT, env={**os.environ, "FUZZ": str(count)}, stdout=subprocess.PIPE, text=True)
    passing, failing = (sum(map(int, found)) for found in zip(
        *re.findall(r"(\d+) passing, (\d+) failing", process.stdout) or [(0, 0)]))
    print(process.stdout[-3000:] if process.returncode else "")
    print(json.dumps({"inputs": passing + failing, "failures": failing}))
    sys.exit(process.returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=54, help="shared out 4 : 1 : 1 to stages 1, 2 and ar")
    parser.add_argument("--fuzz", type=int, metavar="N", help="fuzz with so many inputs instead")
    args = parser.parse_args()
    if args.fuzz:
        fuzz(args.fuzz)
    begin, seconds, whole = time.time(), {}, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        runs = make_inputs(folder)
        for stage, arguments in runs.items():  # undisturbed
            out = folder / f"whole-{stage}"
            process = start(arguments, out)
            process.stdout.readline()
            timer = time.time()
            while process.poll() is None and not (out / "checkpoint/state.pt").exists():
                time.sleep(0.01)
            before = time.time() - timer
            process.communicate()
            seconds[stage], whole[stage] = (before, time.time() - timer - before), result(out)
        share = args.kills // 6
        jobs = [(stage, runs[stage], folder, number, seconds[stage], whole[stage])
                for stage, count in (("1", args.kills - 2 * share), ("2", share), ("ar", share))
                for number in range(count)]
        outcomes = Counter(((job[0], phase), same) for job, (phase, same) in zip(jobs, pool.map(one_kill, jobs)))
        same = sum(count for (_, same), count in outcomes.items() if same)
        for stage, phase in sorted({key for key, _ in outcomes}):
            alike, other = (outcomes[(stage, phase), same] for same in (True, False))
            print(f"killed in stage {stage:3} {phase:22} {alike + other:3} times, {alike} ended bit-identical")
        rows = []
        for fault, well in faults(folder, runs, whole):
            rows.append(well)
            print("ok    " if well else "FAILED", fault.title + (f"\n         {fault.said}" if fault.said else ""))
    print(json.dumps({"kills": len(jobs), "bit_identical": same, "faults": len(rows), "faults_survived": sum(rows),
                      "seconds": round(time.time() - begin)}))
    sys.exit(same < len(jobs) or not all(rows))


if __name__ == "__main__":
    main()

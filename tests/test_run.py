"""A training run: what it leaves, exact resume, damage, full disks, ranks, schedule and average."""

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import support.files
import train
import vqrae
from conftest import (ROOT, assert_resume_is_exact, assert_same_log, begin, command, launch_ranks, log_of, make_run,
                      several_runs, small_vit, torchrun, wait_for_ranks, weights, write_tars)
from export import save_encoder
from support.images import ImageSet
from support.metrics import evaluate, usage


# --- what a run leaves ---


def test_a_run_leaves_all_its_files_and_figures(short_run, tmp_path, capsys):
    train.main(short_run)
    out = tmp_path / "run"
    assert {"config.json", "model.safetensors", "checkpoint", "metrics.jsonl", "summary.json", "reconstructions.png",
            "curves.png"} <= {path.name for path in out.iterdir()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and "val_psnr" in lines[1] and "val_psnr" in lines[2]
    for name in ("loss", "mse", "perceptual", "codebook", "commitment", "lr", "images_per_second", "train_utilization",
                 "train_perplexity", "z_norm", "code_norm"):
        assert all(np.isfinite(line[name]) for line in lines), name
    args = train.parse_args(short_run)
    config = train.settings_for(args, args.stage)
    rises = max(1, config.steps // 2)  # of the warm-up in a short run
    assert lines[0]["lr"] == pytest.approx(config.learning_rate * 2 / rises)
    assert lines[-1]["lr"] < config.learning_rate
    summary, model = json.loads((out / "summary.json").read_text()), vqrae.VQRAE.from_pretrained(out)
    train_images, val_images = (ImageSet(config.data, split, 16) for split in ("train", "val"))
    expected = {f"val_{name}": value for name, value in evaluate(model, val_images).items()}
    expected |= {f"train_{name}": value for name, value in usage(model, train_images).items()}
    for found in (summary, lines[-1]):  # of the model that was saved
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert expected["train_tokens"] == 11 * 16 and expected["val_tokens"] == 16
    for name in ("steps", "quantizer", "codebook_size", "codebook_dim"):
        assert summary[name] == getattr(config, name), name
    assert (summary["seed"], summary["preset"], summary["train_loss"]) == (0, "tiny", lines[-1]["loss"])
    assert summary["seconds"] > 0 and summary["images_per_second"] > 0
    for picture in ("reconstructions.png", "curves.png"):
        assert Image.open(out / picture).size[0] > 100


def test_finished_work_is_never_overwritten_by_accident_nor_resumed_with_other_settings(short_run, tmp_path):
    train.main(short_run)
    before = weights(tmp_path / "run")
    with pytest.raises(SystemExit, match="already holds a run"):
        train.main(short_run)
    with pytest.raises(SystemExit, match="codebook_dim is 8 .* not 9"):
        train.main(short_run + ["--resume", "--codebook-dim", "9"])
    for name in ("state.pt", "previous.pt"):
        (tmp_path / "run/checkpoint" / name).write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="cannot read the checkpoint .*state.pt.* nor .*previous.pt.*--overwrite"):
        train.main(short_run + ["--resume"])
    assert weights(tmp_path / "run") == before


def test_any_seed_trains_and_an_evaluation_needs_no_log_step(short_run, tmp_path):
    train.main(short_run + ["--seed", "20261122123456", "--log-every", "5", "--evaluate-every", "3"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_psnr" in line) for line in lines] == [(3, True), (5, False), (6, True)]


def test_the_benchmark_prints_one_json_line_and_writes_nothing(short_run, tmp_path, capsys):
    train.main(short_run + ["--benchmark"])
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_second"] > 0 and result["loader_images_per_second"] > 0
    assert result["share_of_matmul"] > 0 and result["peak_memory_bytes"] > 0
    assert result["tokens_per_second"] == pytest.approx(16 * result["images_per_second"])
    assert not (tmp_path / "run").exists()


SPAWNED = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from conftest import make_run
    run, stage = make_run(sys.argv[1:])
    for batch in run.steps(stage):
        stage.step(batch)
"""


def test_workers_that_are_spawned_as_on_windows_and_macos_train_the_same_model_as_none(short_run, tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    arguments = [*short_run[:-1], str(tmp_path / "spawned"), "--steps", "3", "--workers", "2"]
    subprocess.run([sys.executable, tmp_path / "spawned.py", *arguments], check=True, capture_output=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    run, stage = make_run([*short_run, "--steps", "3"])
    for batch in run.steps(stage):
        stage.step(batch)
    saved = torch.load(tmp_path / "spawned/checkpoint/state.pt", weights_only=True)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(saved["model"][name], tensor), name


# --- stopped, killed, resumed ---


def test_a_stopped_and_resumed_run_ends_bit_identical(short_run, tmp_path):
    assert_resume_is_exact(short_run, tmp_path)


@pytest.mark.parametrize("data", ["photo_folder", "packed"])
def test_kill_minus_9_loses_nothing(data, short_run, request, tmp_path):
    arguments = short_run[:-2] + ["--data", str(request.getfixturevalue(data)), "--out"]
    arguments[arguments.index("--steps") + 1] = "12"
    arguments[arguments.index("--checkpoint-every") + 1] = "1"
    train.main([*arguments, str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    checkpoint = killed / "checkpoint/state.pt"
    for wait in (0.0, 0.05):  # seconds after the first sign of life
        process = subprocess.Popen(command("train.py", *arguments, killed, "--resume"), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not ended before
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line that was being written
    train.main([*arguments, str(killed), "--resume"])
    assert weights(killed) == weights(tmp_path / "whole")
    assert log_of(killed) == log_of(tmp_path / "whole")


def test_control_c_saves_and_exits_cleanly_and_resume_goes_on(short_run, tmp_path):
    arguments = list(short_run)
    arguments[arguments.index("--steps") + 1] = "100000"
    process = subprocess.Popen(command("train.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while not (tmp_path / "run/checkpoint/state.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in errors
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert f"stopped after step {state['done']} " in said


def test_a_run_goes_on_when_its_images_have_moved_but_not_on_as_many_other_images(short_run, photo_folder, tmp_path):
    begin(short_run)
    shutil.copytree(photo_folder, tmp_path / "photos")
    train.main(short_run + ["--resume", "--data", str(tmp_path / "photos")])
    (tmp_path / "photos").rename(tmp_path / "others")
    (tmp_path / "others/class0/0.png").rename(tmp_path / "others/class1/0.png")
    with pytest.raises(SystemExit, match="names of the training images"):
        train.main(short_run + ["--resume", "--data", str(tmp_path / "others")])


def test_a_resumed_run_with_another_encoder_is_refused(short_run, tmp_path):
    begin(short_run)
    torch.manual_seed(0)
    save_encoder(vqrae.Encoder(small_vit(width=12)), tmp_path / "other")
    with pytest.raises(SystemExit, match="--resume continues a run with its own settings: encoder is"):
        train.main(short_run + ["--resume", "--encoder", str(tmp_path / "other")])


# --- damage, full disks, losses that are no numbers ---


def test_a_loss_that_is_not_a_number_stops_with_a_sentence_and_keeps_the_last_checkpoint(short_run, tmp_path,
                                                                                         monkeypatch):
    loss = vqrae.stage1_loss

    def poisoned(images, out, *rest):
        value, terms = loss(images, out, *rest)
        return (value * float("nan") if poisoned.calls >= 4 else value), terms | {"n": torch.tensor(poisoned.count())}

    poisoned.calls = 0
    poisoned.count = lambda: setattr(poisoned, "calls", poisoned.calls + 1) or 0.0
    monkeypatch.setattr(vqrae, "stage1_loss", poisoned)
    with pytest.raises(SystemExit, match="not finite at step 4 .loss nan.* the last good checkpoint is kept"):
        train.main(short_run)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    assert state["done"] == 3 and all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(short_run, tmp_path, monkeypatch):
    real, calls = torch.save, []

    def save(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit, match="cannot write .*No space left on device.*what stood there before is kept"):
        train.main(short_run)
    assert [path.name for path in (tmp_path / "run/checkpoint").iterdir()] == ["state.pt"]
    monkeypatch.undo()
    train.main(short_run + ["--resume"])
    assert torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["done"] == 6


def damaged_versions(whole):
    """A checkpoint's bytes cut short, short of one byte, with a single bit turned inside a tensor, and none."""
    tensor = max(zipfile.ZipFile(io.BytesIO(whole)).infolist(), key=lambda entry: entry.file_size)
    name, extra = struct.unpack("<HH", whole[tensor.header_offset + 26:tensor.header_offset + 30])
    flipped = bytearray(whole)
    flipped[tensor.header_offset + 30 + name + extra + tensor.file_size // 2] ^= 1
    return whole[:len(whole) // 3], whole[:-1], bytes(flipped), b""


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_the_run_ends_the_same(short_run, tmp_path, capsys):
    train.main(short_run)
    checkpoint = tmp_path / "run/checkpoint/state.pt"
    before, whole = weights(tmp_path / "run"), checkpoint.read_bytes()
    run, _ = make_run(short_run)
    for damaged in damaged_versions(whole):
        checkpoint.write_bytes(damaged)
        capsys.readouterr()
        run.load()
        assert "going back to the one before it" in capsys.readouterr().err and run.done == 3
    train.main(short_run + ["--resume"])
    said = capsys.readouterr()
    assert "going back to the one before it" in said.err and "at step 3" in said.out
    assert weights(tmp_path / "run") == before


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before_it(short_run, tmp_path):
    train.main(short_run)
    last, previous = (tmp_path / "run/checkpoint" / name for name in ("state.pt", "previous.pt"))
    before = previous.read_bytes()
    last.write_bytes(b"damaged")
    run, _ = make_run(short_run)
    run.load()
    run.save()
    assert previous.read_bytes() == before
    assert torch.load(last, weights_only=True)["done"] == 3


def test_a_damaged_log_comes_back_from_the_checkpoint(short_run, tmp_path):
    train.main(short_run)
    log = tmp_path / "run/metrics.jsonl"
    before = log.read_text()
    for damage in (log.unlink, lambda: os.truncate(log, 700), lambda: log.write_bytes(b"\xff"),
                   lambda: log.write_text("{}\n")):
        damage()
        train.main(short_run + ["--resume"])
        assert log.read_text() == before


def test_a_disk_that_is_full_at_the_end_is_one_sentence_and_leaves_no_half_model(short_run, tmp_path, monkeypatch):
    def save(weights, path):
        Path(path).write_bytes(b"half of it")
        raise support.files.SafetensorError("No space left on device")

    monkeypatch.setattr(support.files, "save_file", save)
    with pytest.raises(SystemExit, match="cannot write .*model.safetensors.*No space left on device"):
        train.main(short_run)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint", "metrics.jsonl"}
    monkeypatch.undo()
    train.main(short_run + ["--resume"])
    assert (tmp_path / "run/summary.json").exists()


# --- schedule and average ---


def test_the_learning_rate_warms_up_and_then_falls_to_its_end_value(short_run):
    run, _ = make_run(short_run)
    run.config.steps, run.config.warmup_steps = 1000, 100
    factors = [run.schedule(step) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 100)
    assert max(factors) == factors[99] == 1
    assert factors[1000] == pytest.approx(run.config.end_factor)
    assert all(a >= b for a, b in zip(factors[99:], factors[100:]))
    late = [run.schedule(step, start=400) for step in range(400, 1001)]
    assert late[0] == pytest.approx(1 / 100) and max(late) == late[99] == 1
    assert late[600] == pytest.approx(run.config.end_factor)


def test_the_average_is_what_gets_saved(short_run, tmp_path):
    train.main(short_run)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    saved = load_file(tmp_path / "run/model.safetensors")
    assert saved.pop("reading").any()  # fitted when training was over
    assert all(torch.equal(tensor, state["average"][name]) for name, tensor in saved.items())
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in saved.items())


# --- sets ---


def test_stage_1_on_a_packing_resumes_bit_identical(short_run, packed, tmp_path):
    assert_resume_is_exact(short_run[:-2] + ["--data", str(packed)] + short_run[-2:], tmp_path)


def test_a_streamed_run_ends_and_goes_on_in_its_files_though_not_bit_for_bit(short_run, tmp_path, capsys):
    stream = ["--data", str(write_tars(tmp_path / "tars", 3, 12) / "some-{000000..000002}.tar"), "--stream"]
    train.main(short_run + stream)
    assert json.loads((tmp_path / "run/summary.json").read_text())["val_images"] == 12
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["stream"]
    assert [shown for epoch, shown, _ in state.values()] == [6 * 4]
    capsys.readouterr()
    train.main(short_run + stream + ["--resume"])
    assert "continuing" in (said := capsys.readouterr().out) and "not bit for bit" in said


def test_a_checkpoint_holds_where_each_of_two_ranks_stands_in_a_stream(short_run, tmp_path):
    data = write_tars(tmp_path / "tars", 3, 12)
    done = wait_for_ranks(launch_ranks("train.py", *short_run, "--data", data, "--stream"), 200)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["stream"]
    assert sorted(state) == [(0, 2), (1, 2)] and [shown for _, shown, _ in state.values()] == [6 * 2] * 2


# --- ranks ---


def test_two_ranks_log_what_one_process_logs(short_run, second_stage, ar_run, caption_run, photo_folder, tmp_path):
    for name, new in (("class0", "one"), ("class1", "quite another class of pictures")):
        shutil.copytree(photo_folder / name, tmp_path / "photos" / new)
    # Captions of different lengths, since their loss is a mean over tokens.
    runs = {"1": short_run, "2": second_stage, "ar": ar_run, "caption": caption_run + ["--data", tmp_path / "photos"]}
    # Not all of these has a gradient: the encoder's last norm, which Z_I is before.
    runs["before-norm"] = short_run + ["--features", "before_norm", "--encoder-learning-rate", "1e-3",
                                       "--distillation-weight", "1"]
    runs |= {f"{stage}-in-parts": arguments + ["--accumulate", "2"] for stage, arguments in runs.items()}
    runs = {stage: [str(word) for word in arguments] + ["--precision", "fp32", "--out"]
            for stage, arguments in runs.items()}
    for stage, arguments in runs.items():
        train.main(arguments + [str(tmp_path / "one" / stage)])
    result = torchrun(several_runs(tmp_path / "runs.py"), json.dumps([arguments + [str(tmp_path / "ranks" / stage)]
                                                                      for stage, arguments in runs.items()]))
    assert result.returncode == 0, result.stderr
    for stage in runs:
        assert_same_log(tmp_path / "one" / stage, tmp_path / "ranks" / stage)


def patched_update(before, after):
    """A script that trains with something else before and after every `Run.update`."""
    return f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
update = train.Run.update
def patched(run):
    {before}
    update(run)
    {after}
train.Run.update = patched
train.main(sys.argv[1:])
"""


def test_what_two_ranks_have_begun_one_process_goes_on_with(ar_run, tmp_path):
    arguments = ar_run + ["--precision", "fp32"]
    train.main(arguments)
    whole = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    # Two ranks stop at step 4, on a signal that only one of them has been given.
    script = tmp_path / "stop.py"
    script.write_text(patched_update("", "if run.done == 4 and run.rank == 1: os.kill(os.getpid(), signal.SIGTERM)"))
    result = torchrun(script, *arguments, "--out", tmp_path / "ranks")
    assert result.returncode != 0 and "stopped after step 4 of 6" in result.stdout
    train.main(arguments + ["--out", str(tmp_path / "ranks"), "--resume"])
    resumed = torch.load(tmp_path / "ranks/checkpoint/state.pt", weights_only=True)
    assert resumed["done"] == whole["done"] == 6
    for part in ("model", "average"):
        for name, tensor in whole[part].items():
            torch.testing.assert_close(resumed[part][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_rank_that_dies_ends_the_others_with_a_sentence_and_no_traceback(ar_run, tmp_path):
    script = tmp_path / "die.py"
    script.write_text(patched_update("if run.done == 2 and run.rank == 1: os._exit(3)", ""))
    result = torchrun(script, *ar_run)
    assert result.returncode != 0 and "error: rank 0 of 2 has lost another rank (" in result.stderr
    assert f'{ROOT / "train.py"}", line' not in result.stderr  # torchrun has a traceback of its own


def test_a_batch_that_cannot_be_shared_out_is_a_sentence_from_a_process_that_fails(short_run):
    result = torchrun("train.py", *short_run, "--batch-size", "3")
    assert result.returncode != 0 and "--batch-size 3 cannot be shared out evenly to 2 processes" in result.stderr

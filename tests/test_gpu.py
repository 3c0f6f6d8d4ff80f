"""experiments/gpu.py, on a CPU: every part in small, and what becomes of parts that fail."""

import json
import os
import subprocess
import time

import pytest

from conftest import ROOT, command
from experiments import gpu


def run(capsys, *arguments):
    """What gpu.py prints and what it exits with, called from here: its table, its JSON and the exit code."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--small", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])["parts"], ended.value.code


def test_every_part_runs_in_small_on_a_cpu_and_ends_in_one_table_and_one_line_of_json():
    ended = subprocess.run(command("experiments/gpu.py", "--device", "cpu", "--small"), capture_output=True, text=True,
                           cwd=ROOT)
    *table, line = ended.stdout.splitlines()
    parts = json.loads(line)["parts"]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(parts) == list(gpu.PARTS) and all("figures" in part for part in parts.values())
    assert [row.split(" | ")[0] for row in table[3:]] == [f"| {name}" for name in gpu.PARTS]
    assert set(parts["resume"]["figures"].values()) == {"bit-identical"}


def fail(place):
    raise ValueError("nothing\nto see")


def hang(place):
    time.sleep(600)


def test_a_part_that_fails_or_dies_is_a_sentence_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {
        "fails": gpu.Part(fail, (), 5), "dies": gpu.Part(lambda place: os._exit(3), (), 5),
        "runs": gpu.Part(lambda place, x: {"x": x}, (1,), 5)})
    table, parts, code = run(capsys, "--only", *gpu.PARTS)
    assert code == 1
    assert parts["fails"]["sentence"] == "ValueError: nothing"
    assert parts["dies"]["sentence"] == "its process ended with exit code 3 and without a word"
    assert parts["runs"]["figures"] == {"x": 1} and table[-1].endswith("| x 1 |")


def test_a_part_ends_with_the_time_and_what_does_not_fit_into_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"hangs": gpu.Part(hang, (), 0), "late": gpu.Part(fail, (), 0)})
    _, parts, code = run(capsys, "--only", *gpu.PARTS, "--minutes", "0.03")
    assert code == 1 and parts["hangs"]["seconds"] < 60
    assert parts["hangs"]["sentence"] == "ended, for the time was over"
    assert parts["late"]["sentence"] == "left out: it may take 0 s, and 0 s of --minutes were left"


def test_a_device_that_is_not_there_is_one_sentence():
    with pytest.raises(SystemExit, match="error: InputError: --device nowhere is not available here"):
        gpu.main(["--device", "nowhere"])


@pytest.mark.parametrize("room, tried", [(100, [8]), (4, [8, 4]), (1, [8, 4, 2, 1])])
def test_what_does_not_fit_into_the_memory_is_halved_until_it_does(room, tried):
    asked = []

    def measure(size):
        asked.append(size)
        if size > room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return size

    assert gpu.largest_that_fits(measure, 8) == tried[-1] and asked == tried


@pytest.mark.parametrize("message", ["CUDA out of memory", "shapes do not fit"])
def test_an_error_of_another_kind_or_at_a_size_of_one_is_not_hidden(message):
    def measure(size):
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        gpu.largest_that_fits(measure, 1 if "memory" in message else 8)

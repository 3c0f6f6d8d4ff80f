"""--log: what metrics.jsonl has is in TensorBoard and in trackio too, once, with pictures; and neither is needed."""

import io
import json
import sys

import pytest
from PIL import Image

import train
from conftest import stopped_at, weights

PACKAGES = {"tensorboard": "tensorboard.backend.event_processing.event_accumulator",
            "trackio": "trackio.sqlite_storage"}


@pytest.fixture(params=PACKAGES)
def log(request):
    """The name of a log whose package is there."""
    pytest.importorskip(PACKAGES[request.param], reason=f"pip install {request.param}")
    return request.param


def scalars(log, out):
    """What is in the log of a run, as {name: {step: value}}; a step that is there twice fails."""
    found = {}
    for name, step, value in (entries_of_tensorboard if log == "tensorboard" else entries_of_trackio)(out):
        assert step not in found.setdefault(name, {}), f"{name} of step {step} is there twice"
        found[name][step] = value
    return found


def entries_of_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    for name in events.Tags()["scalars"]:
        yield from ((name, event.step, event.value) for event in events.Scalars(name))
    for name in events.Tags()["images"]:
        yield from ((name, event.step, event.encoded_image_string) for event in events.Images(name))


def entries_of_trackio(out):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    trackio.finish()
    name = out.resolve().relative_to("/").as_posix()
    run = SQLiteStorage.get_latest_run_record_by_name("vqrae", name)
    for line in SQLiteStorage.get_logs("vqrae", name, run_id=run["id"]):
        for key, value in line.items():
            if isinstance(value, dict):
                yield key, line["step"], (MEDIA_DIR / value["file_path"]).read_bytes()
            elif key not in ("step", "timestamp"):
                yield key, line["step"], value


def figures(out):
    """The numbers in metrics.jsonl, as {name: {step: value}}."""
    found = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, {})[line["step"]] = pytest.approx(value, rel=1e-6)
    return found


def test_a_log_has_the_figures_of_metrics_jsonl_and_pictures_at_evaluations(log, short_run, tmp_path):
    train.main([*short_run, "--log", log])
    out = tmp_path / "run"
    found = scalars(log, out)
    pictures = found.pop("reconstructions")
    assert found == figures(out)
    assert {"loss", "train_psnr", "train_utilization", "train_perplexity", "val_psnr"} <= found.keys()
    with Image.open(out / "reconstructions.png") as last:
        assert pictures.keys() == {4, 6} and Image.open(io.BytesIO(pictures[4])).size == last.size


def test_a_killed_and_resumed_run_goes_on_in_its_log_without_doubled_steps(log, short_run, tmp_path):
    arguments = [*short_run, "--log", log]
    stopped_at(5, arguments)  # saved after step 3, logged up to step 4 with a picture
    train.main([*arguments, "--resume"])
    found = scalars(log, tmp_path / "run")
    assert found.pop("reconstructions").keys() == {4, 6}
    assert found.keys() == figures(tmp_path / "run").keys() and found["loss"].keys() == {2, 4, 6}
    assert found["loss"] == figures(tmp_path / "run")["loss"]


def test_resuming_a_finished_run_adds_nothing_to_its_log(log, short_run, tmp_path):
    train.main([*short_run, "--log", log])
    before = scalars(log, tmp_path / "run")
    train.main([*short_run, "--log", log, "--resume"])
    after = scalars(log, tmp_path / "run")
    assert {name: steps.keys() for name, steps in after.items()} == {name: s.keys() for name, s in before.items()}


def test_a_run_that_overwrites_another_begins_its_log_anew(log, short_run, tmp_path):
    train.main([*short_run, "--log", log])
    train.main([*short_run, "--log", log, "--overwrite", "--log-every", "3", "--seed", "1"])
    found = scalars(log, tmp_path / "run")
    found.pop("reconstructions")
    assert found == figures(tmp_path / "run")


def test_whoever_follows_a_run_does_not_change_it(log, short_run, tmp_path):
    train.main(short_run)
    train.main([*short_run[:-1], str(tmp_path / "followed"), "--log", log])
    assert weights(tmp_path / "followed") == weights(tmp_path / "run")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_said_before_anything_is_read_or_written(name, short_run, tmp_path, monkeypatch):
    for module in ("torch.utils.tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=f"--log {name} needs a package more: pip install {name}"):
        train.main([*short_run, "--log", name, "--data", "nowhere"])
    assert not (tmp_path / "run").exists()


def test_transformers_are_followed_with_their_own_pictures_or_none(ar_run, caption_run, tmp_path):
    pytest.importorskip(PACKAGES["tensorboard"], reason="pip install tensorboard")
    train.main([*ar_run[:-1], str(tmp_path / "ar"), "--log", "tensorboard"])
    train.main([*caption_run[:-1], str(tmp_path / "caption"), "--log", "tensorboard"])
    assert scalars("tensorboard", tmp_path / "ar")["samples"].keys() == {4, 6}
    found = scalars("tensorboard", tmp_path / "caption")
    assert found["val_loss"].keys() == {4, 6} and found.keys() == figures(tmp_path / "caption").keys()

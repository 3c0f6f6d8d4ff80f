"""A training run followed in TensorBoard or trackio (`--log`), beside metrics.jsonl; both packages are optional."""

import importlib

import numpy as np
from PIL import Image

from support.files import InputError, replace_text


def check_log(name):
    """InputError when the package of `--log NAME` is missing: before a run begins, not at its first line."""
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(f"--log {name} needs a package more: pip install {name} ({error})") from None


def open_log(name, out, done):
    """A function of a step, its figures by name and the path of a picture or None, which adds them to a log.

    The run in the folder `out` has `done` steps behind it, and the log perhaps more. No step will be there twice.
    """
    return (tensorboard if name == "tensorboard" else trackio)(out, done)


def tensorboard(out, done):
    """Event files in out/tensorboard, for `tensorboard --logdir out`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=done + 1)  # hides what was logged from that step on

    def add(step, figures, picture):
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        if picture:
            writer.add_image(picture.stem, np.asarray(Image.open(picture)), step, dataformats="HWC")
        writer.flush()  # whoever looks on, or kills the run, has it

    return add


def trackio(out, done):
    """A run of the project "vqrae", called as its folder is, for `trackio show`."""
    import trackio

    place, reached = out.resolve(), out / "trackio.txt"
    trackio.init(project="vqrae", name=place.relative_to(place.anchor).as_posix(), resume="allow" if done else "never")
    # trackio takes nothing back. A run that is resumed makes some steps again, and those that are there stay.
    known = int(reached.read_text()) if done and reached.exists() else 0

    def add(step, figures, picture):
        if step > known:
            trackio.log({**figures, **({picture.stem: trackio.Image(picture)} if picture else {})}, step=step)
            replace_text(reached, str(step))

    return add

"""Make data/tiny_vit: a 6-layer vision transformer distilled from DINOv2.

    python data/tiny_vit/prepare.py --teacher ../shared/weights/dinov2-small --source ../shared/data --cache /tmp/views

A student of patch 8 at 64 px and a DINOv2 of patch 14 at 112 px both cut an image into an 8 x 8 grid, so the teacher's
64 patch tokens are a target for the student's, token by token. The teacher costs more than the student's whole training
step, so it runs once: `--views` random views are made, the teacher's tokens for them are cached on disk in half
precision, and the student then learns from the cache for many epochs ("a good teacher is patient and consistent",
Beyer et al. 2022: both always see the very same view). Both halves resume where they stopped.

Images: the emoji of the training split at 64 and 128 px, 6,682 public-domain clip-art pictures and 211 CC0 or
public-domain photos, all openly licensed (see the licences in --source). Held-out emoji are never seen.

The student is written in the hub's layout, as config.json + preprocessor_config.json + model.safetensors (fp16).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import vqrae  # noqa: E402

GRID = 8  # both models see GRID x GRID patches
STUDENT = vqrae.ViTConfig(image_size=64, patch_size=8, width=192, depth=6, heads=3, mlp_width=768)
CHUNK = 2048  # views between two saves of the cache


def tiles(sheet, size):
    """The square tiles of a sprite sheet, row by row."""
    sheet = Image.open(sheet).convert("RGB")
    return [sheet.crop((x, y, x + size, y + size))
            for y in range(0, sheet.height, size) for x in range(0, sheet.width, size)]


def load_sources(source):
    """Lists of PIL images by kind, without the held-out emoji."""
    emoji, clipart, photos = [], [], []
    index = json.loads((ROOT / "data/emoji/index.json").read_text(encoding="utf-8"))
    held_out = {image["name"] for sheet in index["sheets"] for image in sheet["images"] if image["split"] == "val"}
    for sheet in sorted((source / "emoji").glob("*.webp")):
        style, size, _ = sheet.stem.split("_")
        names = [Path(entry["filename"]).stem for entry in json.loads((source / f"emoji/{style}.json").read_text())]
        emoji += [tile for tile, name in zip(tiles(sheet, int(size)), names) if name not in held_out]
    count = len(json.loads((source / "clipart/clipart.json").read_text()))
    for sheet in sorted((source / "clipart").glob("*.webp")):
        clipart += tiles(sheet, 96)
    clipart = clipart[:count]
    for path in sorted((source / "photos/distill").glob("*.jpg")):
        photos.append(Image.open(path).convert("RGB"))
    print(f"{len(emoji)} emoji images of the training split, {len(clipart)} clip-art pictures, {len(photos)} photos")
    return emoji, clipart, photos


def random_crop(image, rng, whole):
    """A random window of the image as a box; `whole` keeps nearly all of it, as a probe or a tokenizer will see it."""
    width, height = image.size
    side = min(width, height)
    scale = rng.uniform(0.85, 1.0) if whole else rng.uniform(0.2, 1.0) ** 0.5
    aspect = 1.0 if whole else np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(side * scale * aspect**0.5, width), min(side * scale / aspect**0.5, height)
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return (x, y, x + w, y + h)


def random_view(sources, rng):
    """One view of one random picture at both sizes: uint8 arrays of 64 x 64 x 3 and 112 x 112 x 3."""
    emoji, clipart, photos = sources
    kind = rng.choice(3, p=[0.5, 0.38, 0.12])
    group = (emoji, clipart, photos)[kind]
    image = group[rng.integers(len(group))]
    whole = kind < 2 and rng.random() < 0.4
    box = (0, 0, *image.size) if whole and rng.random() < 0.5 else random_crop(image, rng, whole)
    flip = rng.random() < 0.5
    jitter = rng.uniform(0.6, 1.4, size=3) if rng.random() < 0.5 else None
    hue = rng.integers(-20, 21) if jitter is not None and rng.random() < 0.5 else 0
    turn = rng.uniform(-20, 20) if rng.random() < 0.2 else None
    if turn is not None:
        image = image.rotate(turn, Image.BICUBIC, fillcolor=image.getpixel((0, 0)))
    views = []
    for size in (STUDENT.image_size, 14 * GRID):
        view = image.resize((size, size), Image.BICUBIC, box=box)
        if flip:
            view = view.transpose(Image.FLIP_LEFT_RIGHT)
        if jitter is not None:
            for enhance, amount in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), jitter):
                view = enhance(view).enhance(amount)
        if hue:
            h, s, v = view.convert("HSV").split()
            view = Image.merge("HSV", (h.point(lambda value: (value + hue) % 256), s, v)).convert("RGB")
        views.append(np.asarray(view))
    return views


def mixed_view(sources, rng):
    """A view, or in one case of four two views in one picture: pasted, blended, or one multiplied onto the other."""
    first = random_view(sources, rng)
    how = rng.random()
    if how > 0.25:
        return first
    second = random_view(sources, rng)
    share = rng.uniform(0.3, 0.7)
    x, y, w, h = rng.uniform(0, 1 - share, size=2).tolist() + [share, share]
    mixed = []
    for a, b in zip(first, second):
        if how < 0.12:  # CutMix: the window falls on the same place of the grid at both sizes
            a = a.copy()
            size = len(a)
            window = np.s_[int(y * GRID) * size // GRID:int((y + h) * GRID) * size // GRID,
                           int(x * GRID) * size // GRID:int((x + w) * GRID) * size // GRID]
            a[window] = b[window]
        elif how < 0.18:
            a = (share * a + (1 - share) * b).astype(np.uint8)
        else:  # white backgrounds vanish in a product, so an emoji lands on a photo
            a = (a.astype(np.uint16) * b // 255).astype(np.uint8)
        mixed.append(a)
    return mixed


class Views(torch.utils.data.Dataset):
    """Views by number; each is made from a generator seeded by its number, so a resumed cache is the same cache."""

    def __init__(self, sources, count):
        self.sources, self.count = sources, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return mixed_view(self.sources, np.random.default_rng([0, index]))


def open_cache(folder, count, width, mode):
    """The three memory-mapped arrays of the cache: student's pixels, teacher's patch tokens, teacher's class tokens."""
    size = STUDENT.image_size
    shapes = {"pixels": (np.uint8, (count, size, size, 3)), "tokens": (np.float16, (count, GRID * GRID, width)),
              "cls": (np.float16, (count, width))}
    return [np.memmap(folder / f"{name}.bin", dtype, mode, shape=shape) for name, (dtype, shape) in shapes.items()]


@torch.inference_mode()
def make_cache(teacher, source, folder, count):
    """Run the teacher over all views that the cache does not hold yet."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "done.json"
    done = json.loads(progress.read_text()) if progress.exists() else 0
    if done >= count:
        return
    pixels, tokens, cls = open_cache(folder, count, teacher.config.width, "r+" if (folder / "cls.bin").exists() else "w+")
    todo = torch.utils.data.Subset(Views(load_sources(source), count), range(done, count))
    start = time.time()
    for small, large in torch.utils.data.DataLoader(todo, batch_size=64, num_workers=1):
        rows = slice(done, done + len(small))
        images = large.permute(0, 3, 1, 2) / 255
        with torch.autocast("cpu", torch.bfloat16):
            states = teacher.hidden_states(images)[-1]
        target = F.layer_norm(states.float(), states.shape[-1:], teacher.norm.weight, teacher.norm.bias, teacher.norm.eps)
        pixels[rows], tokens[rows], cls[rows] = small.numpy(), target[:, 1:].half().numpy(), target[:, 0].half().numpy()
        done += len(small)
        if done % CHUNK < 64 or done == count:
            progress.write_text(str(done))
            print(f"cached {done} of {count} views, {time.time() - start:.0f} s", flush=True)

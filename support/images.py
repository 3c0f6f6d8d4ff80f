"""Images: any image file, any folder of them, our sheets of tiles, and the order in which training sees them."""

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import functional as pixels

from support.files import InputError, read_json


# What the two halves of a data set are called, in small letters alone; of several the first is taken.
FIRST_HALF = ("train", "training")
SECOND_HALF = ("val", "valid", "validation", "dev", "development", "eval", "evaluation", "holdout", "heldout", "test",
               "testing")


def eight_bits(images):
    """Images clamped to [0, 1] and rounded to the 256 levels that a file can hold."""
    return (images.clamp(0, 1) * 255).round() / 255


def resize_to(images, like):
    """Images at the height and width of `like`: the decoder's target when q differs from p."""
    if images.shape[-2:] == like.shape[-2:]:
        return images
    return F.interpolate(images, like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)


def read_image(path, file=None):
    """Any image file as an upright 8-bit RGB PIL image, transparency on white; InputError when it is unreadable.

    With `file`, an open one, the path is only its name.
    """
    try:
        with Image.open(file or path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits instead of scaling it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if max(image.size) > 1000 * min(image.size):  # resized, it would have no end
                raise ValueError(f"{image.width} x {image.height} pixels are hardly more than a line")
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise a dozen types for bytes that are not an image
        raise InputError(f"cannot read {path} as an image: {(str(error) or type(error).__name__).splitlines()[0]}"
                         ) from None


@functools.cache
def find_images(folder):
    """Sorted paths of the image files below a folder; files that are none are counted and named once on stderr.

    A folder is listed once per process: both splits of a run come from one list.
    """
    found, skipped = [], []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(directory, name) for name in sorted(files) if not name.startswith(".")):
            try:
                if path.is_file():  # a pipe would be waited for
                    Image.open(path).close()  # reads the header only, so a large folder is listed quickly
                    found.append(str(path))
            except Exception:
                skipped.append(path)
    if skipped:
        names = ", ".join([str(path.relative_to(folder)) for path in skipped[:10]] + ["..."] * (len(skipped) > 10))
        print(f"skipped {len(skipped)} files in {folder} that are not images: {names}", file=sys.stderr)
    return found


def held_out(count):
    """Which of `count` images to validate on where the data do not say: a fixed random twentieth, at least one."""
    return set(np.random.RandomState(0).permutation(count)[:max(1, count // 20)].tolist()) if count > 1 else set()


def name_halves(names):
    """Of the names of folders or splits those of the training and the held-out images, or () if there are no such.

    train and val are these, and whatever else the two are usually called: Training, valid, test_set, val2017.
    """
    plain = [re.sub(r"(set|split|data|images)$", "", re.sub(r"[\W\d_]", "", name.lower())) for name in names]
    ranked = [sorted((words.index(word), name) for word, name in zip(plain, names) if word in words)
              for words in (FIRST_HALF, SECOND_HALF)]
    return tuple(half[0][1] for half in ranked) if all(ranked) else ()


def split_folders(folder, split):
    """The folders below which the images of a split are, and whether the folder says so by having train/ and val/."""
    halves = [folder / "train", folder / "val"]
    divided = all(half.is_dir() for half in halves)
    return [half for half in halves if split in ("all", half.name)] if divided else [folder], divided


def places_of(split, count):
    """The places of a split's images among `count` of them, where the data do not say which are held out."""
    chosen = held_out(count)
    return [place for place in range(count) if split == "all" or not chosen or (place in chosen) == (split == "val")]


class ImageSet(torch.utils.data.Dataset):
    """The images of one split as uint8 tensors (3, size, size), read one at a time when they are asked for.

    `folder` is one of our sets (index.json and sheets of tiles, held in memory), or any folder of images, flat or with
    one folder per class. A folder with train/ and val/ is split so; of any other every twentieth image, in a fixed
    random order, is held out (a single image is both splits). `split` is "train", "val" or "all".

    Keys: an int gives the evaluation view (shorter side resized, centre crop), a pair (int, seed) the training view
    (random crop, random flip) that this seed stands for. A readable neighbour stands in for an unreadable file, so
    every item comes with its own index, and with the names of files found unreadable on the way.
    """

    def __init__(self, folder, split, size):
        self.folder, self.size, self.unreadable = Path(folder), size, set()
        if not self.folder.is_dir() and self.folder.suffix != ".tar":  # shards.py reads those
            raise InputError(f"no images at {folder}: it is not a folder")
        index = self.folder / "index.json"
        index = read_json(index) if index.exists() else None
        self.from_sheets = isinstance(index, dict) and "sheets" in index
        if self.from_sheets:
            self.read_sheets(index["sheets"], split)
        else:
            self.sources = self.find_files(split)
        if not self.sources:
            raise InputError(f"no images at {folder}: the {split} split is empty")

    def read_sheets(self, sheets, split):
        self.sources, self.sheet_records = [], []
        try:
            for sheet in sheets:
                canvas, side = np.asarray(read_image(self.folder / sheet["file"])), sheet["tile"]
                columns = canvas.shape[1] // side
                for i, record in enumerate(sheet["images"]):
                    record = {"style": sheet["style"], **record}
                    top, left = i // columns * side, i % columns * side
                    if not all(isinstance(value, str) for value in record.values()) or top + side > len(canvas):
                        raise ValueError(f"image {i} of {sheet['file']} has no place there or is not described")
                    if split in ("all", record["split"]):
                        self.sources.append(canvas[top:top + side, left:left + side])
                        self.sheet_records.append(record)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.folder}/index.json does not describe sheets of images: {error}") from None

    def find_files(self, split):
        """The paths of a split's images."""
        folders, divided = split_folders(self.folder, split)
        images = [path for folder in folders for path in find_images(folder)]
        return images if divided else [images[place] for place in places_of(split, len(images))]

    @functools.cached_property
    def records(self):
        """One dict per image: name and category, and for our own sets style, caption and more."""
        if self.from_sheets:
            return self.sheet_records
        no_class = {self.folder, self.folder / "train", self.folder / "val"}
        return [{"name": os.path.relpath(path, self.folder),
                 "category": "" if Path(path).parent in no_class else Path(path).parent.name} for path in self.sources]

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        unreadable = []
        for step in range(len(self.sources)):
            source = self.sources[(index + step) % len(self.sources)]
            try:
                image = self.read(source)
                break
            except InputError:
                unreadable.append(str(source))
        else:
            raise InputError(f"no image in {self.folder} can be read")
        return self.prepare(image, self.size, seed), (index + step) % len(self.sources), unreadable

    @staticmethod
    def read(source):
        return Image.fromarray(source) if isinstance(source, np.ndarray) else read_image(source)

    @staticmethod
    def prepare(image, size, seed=None):
        """PIL image -> uint8 (3, size, size): shorter side resized, centre crop; with a seed, random crop and flip."""
        image = pixels.resize(image, size, interpolation=pixels.InterpolationMode.BICUBIC)
        top, left = (image.height - size) // 2, (image.width - size) // 2
        if seed is not None:
            draw = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
            top, left = int(draw[0] * (image.height - size + 1)), int(draw[1] * (image.width - size + 1))
            image = pixels.hflip(image) if draw[2] < 0.5 else image
        return pixels.pil_to_tensor(pixels.crop(image, top, left, size, size))

    @staticmethod
    def collate(items):
        """Items -> images (B, 3, size, size), their indices and the names of unreadable files."""
        images, indices, names = zip(*items)
        return torch.stack(images), list(indices), [name for some in names for name in some]

    def views(self, batch_size=64, device="cpu", workers=0):
        """Yield the evaluation views of all images in their order, as floats (up to batch_size, 3, size, size)."""
        for batch in self.batches(range(len(self)), batch_size, workers):
            yield batch.to(device).float() / 255

    def spread_places(self, count):
        """Up to `count` places from all over the set."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]

    def spread(self, count):
        """Up to `count` images from all over the set, as floats (count, 3, size, size) in [0, 1]."""
        return torch.cat(list(self.batches(self.spread_places(count), count))).float() / 255

    def names(self):
        """The names of all images below `folder`, as bytes: the same wherever the folder is."""
        return json.dumps([record.get("name") for record in self.records]).encode()

    def fingerprint(self):
        """SHA-256 of what the images depend on: pixels of our sheets; paths, sizes and dates of files; and the size."""
        digest = hashlib.sha256(str(self.size).encode())
        for source in self.sources:
            if isinstance(source, np.ndarray):
                digest.update(source.tobytes())
            else:
                stat = os.stat(source)
                digest.update(f"{source} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def batches(self, keys, batch_size, workers=0, indices=False):
        """Yield the images of the keys, in their order, as uint8 tensors (up to batch_size, 3, size, size).

        With `indices`, pairs of such a tensor and the list of the images' places in the set.
        """
        loader = torch.utils.data.DataLoader(self, batch_size, sampler=keys, num_workers=workers,
                                             collate_fn=ImageSet.collate)
        try:
            for images, places, unreadable in loader:
                for name in set(unreadable) - self.unreadable:
                    self.unreadable.add(name)
                    count = len(self.unreadable)
                    print(f"skipped {name}, which cannot be read as an image ({count} so far)", file=sys.stderr)
                yield (images, places) if indices else images
        except InputError as error:  # a worker's comes with all its traceback
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("support.files.InputError: ")) from None


class TrainingOrder:
    """Endless keys of training views: every epoch in a new random order, every view with a new seed.

    Key number k depends on `seed` and k alone, so a resumed run needs no state of the loader to see the same images,
    and of R ranks each takes every R-th key without asking the others.
    """

    def __init__(self, count, seed, start, rank=0, ranks=1):
        self.count, self.seed, self.start, self.rank, self.ranks = count, seed, start, rank, ranks

    def __iter__(self):
        position = self.start
        while True:
            epoch, done = divmod(position, self.count)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            for index in order[done:].tolist():
                if position % self.ranks == self.rank:
                    yield index, (self.seed * 2**40 + position) % 2**63
                position += 1

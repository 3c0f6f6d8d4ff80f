"""Images: any image file, any folder of them, our sheets of tiles, and the order in which training sees them."""

import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torchvision.transforms import functional as pixels

from support.files import InputError, read_json

CAPTIONS = ("caption", "captions", "text", "txt", "json")  # usual names of a set's captions, the likeliest first
METADATA = ("metadata.jsonl", "metadata.csv")  # what describes the images of a folder to the library datasets
DRAWN_HERE = "VQRAE: train.py or sample.py"  # what our pictures name as their "Software"

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


def drawn_here(path):
    """Whether a file is a picture that train.py or sample.py drew, which `pictures.save` marks."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == DRAWN_HERE
    except Exception:
        return False


def why_unreadable(error):
    """What is wrong with a file, in a few words, for an error that reading it has raised."""
    if isinstance(error, UnidentifiedImageError):
        return "damaged, or of no kind that Pillow knows"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def read_image(path, file=None):
    """Any image file as an upright 8-bit sRGB PIL image, transparency on white; InputError when it is unreadable.

    With `file`, an open one, the path is only its name.
    """
    try:
        with Image.open(file or path) as image:
            clear = transparent_value(image)
            ImageOps.exif_transpose(image, in_place=True)
            if max(image.size) > 1000 * min(image.size):  # resized, it would have no end
                raise ValueError(f"{image.width} x {image.height} pixels are hardly more than a line")
            return to_rgb(image, clear)
    except Exception as error:  # PIL's decoders raise a dozen types for bytes that are not an image
        raise InputError(f"cannot read {path} as an image: {why_unreadable(error)}") from None


def transparent_value(image):
    """The grey value or colour of an image's pixels that a PNG calls transparent (tRNS), or None.

    PIL stretches greys of fewer than 8 bits and cuts colours of 16, but not this value. How the pixels lie in the file
    it says only before they are loaded.
    """
    value, kind = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if value is None or image.mode not in ("1", "L", "RGB") and not image.mode.startswith("I"):
        return None
    if kind == "RGB;16B":
        return tuple(part >> 8 for part in value)
    return value * {"1": 255, "L;2": 85, "L;4": 17}.get(kind, 1) if isinstance(value, int) else value


def to_rgb(image, clear=None):
    """A PIL image of any mode as 8-bit sRGB, by its own profile; on white what is transparent or of the value `clear`.

    Raises ValueError for pixels that are no numbers.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    plainer = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
    image = image.convert(plainer[image.mode]) if image.mode in plainer else image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if clear is not None:
        same = np.asarray(image) == np.asarray(clear)  # (H, W), or (H, W, 3) for a colour
        alpha = Image.fromarray(np.where(same.all(2) if same.ndim == 3 else same, 0, 255).astype(np.uint8))
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bit_grey(image)
    image = image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode))
    image = by_profile(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.info = {}  # which would be saved with it: it is of another profile now
    return image


def eight_bit_grey(image):
    """Grey of 16 or 32 bits or of floats as 8 bits; ValueError for values that are no numbers.

    White is what the type says. Where it leaves that open the values do: 1, 255 or 65535, or the largest of them.
    """
    values = np.asarray(image)  # (H, W)
    if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339) in (1, (1,)):
        values = values.view(np.uint32)  # they have no sign, for which PIL has no mode
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are no numbers")
    black, white = values.min(), values.max()
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, held in 32
        black, white = 0, 65535
    elif black >= -0.1 * white:  # below 0 there is a filter's overshoot at most
        black = 0
        if white <= 1:
            white = 1
        elif white <= 255 and (white >= 16 or (values % 1 == 0).all()):
            white = 255
        elif 4096 <= white <= 65535:
            white = 65535
    levels = 255 * (values.clip(black, white) - black) / max(white - black, 1e-300)
    return Image.fromarray(levels.round().astype(np.uint8))


def by_profile(image, profile):
    """An L, RGB, CMYK or LAB image as sRGB: by the bytes of its ICC profile, or by PIL's rule where none fits it."""
    if profile:
        for mode in dict.fromkeys([image.mode, "RGB" if image.mode == "L" else image.mode]):  # grey, with RGB's profile
            transform = transform_of(profile, mode)
            if transform:
                return transform.apply(image.convert(mode))
    return image.convert("RGB")


@functools.lru_cache(16)
def transform_of(profile, mode):
    """The transform to sRGB by an ICC profile's bytes of images of a mode.

    None where the profile is broken or of other images, and where it is sRGB's: then rounding is all that it would do.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode in ("L", "RGB"):
            levels = np.arange(0, 256, 15, dtype=np.uint8)
            every = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
            samples = Image.fromarray(every if mode == "RGB" else levels[None])
            changes = np.asarray(transform.apply(samples), int) - np.asarray(samples.convert("RGB"), int)
            return transform if np.abs(changes).max() > 2 else None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def caption_beside(path):
    """What the text file of the same name says beside an image, 0.txt beside 0.png, on one line; "" without one."""
    for suffix in (".txt", ".TXT"):
        try:
            return " ".join(Path(path).with_suffix(suffix).read_text("utf-8-sig", "replace").split())
        except FileNotFoundError:
            continue
        except OSError as error:
            print(f"no caption for {path}: {error.strerror}: {error.filename}", file=sys.stderr)
    return ""


def captions_in(folder):
    """Captions of images below a folder, by their paths, that its metadata.jsonl or metadata.csv tells.

    A row has file_name, as in the library datasets, and one of CAPTIONS; of several captions the first is taken.
    """
    found = {}
    for path in (os.path.join(folder, name) for name in METADATA):
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file) if path.endswith(".csv") else (json.loads(line) for line in file)
                for row in rows:
                    text = next((row[name] for name in CAPTIONS if row.get(name)), "")
                    text = text[0] if isinstance(text, list) else text
                    found[os.path.normpath(os.path.join(folder, row["file_name"]))] = " ".join(text.split())
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise InputError(f"{path} does not describe images: {error!r}") from None
    return found


def folders_below(top, refused):
    """Yield a folder and all below it, each as its path, the names of its folders and the names of its files, sorted.

    The reader may take out folders that are not to be entered. Hidden ones are left out. Links are followed when all
    else has been seen, a folder that has been seen is not seen again, and a link to a folder around it is a loop. What
    may not be read is added to `refused` as a pair of its path and the reason.
    """
    starts, seen = [str(top)], set()  # the first grows

    def contains(folder, inner):
        return os.path.commonpath([folder, inner]) == folder

    for start in starts:
        for directory, folders, files in os.walk(start, onerror=lambda error: refused.append(
                (error.filename, error.strerror))):
            real = os.path.realpath(directory)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
            if real in seen:
                continue
            seen.add(real)
            yield directory, folders, sorted(name for name in files if not name.startswith("."))
            links = [path for path in (os.path.join(directory, name) for name in folders) if os.path.islink(path)]
            starts += [path for path in links if not any(contains(os.path.realpath(path), inner)
                                                         for inner in (real, os.path.realpath(top)))]


def holds_run(directory, files):
    """Whether a folder with these files is a training run's, or a model's: what it has of images are our pictures."""
    return bool({"metrics.jsonl", "model.safetensors", "model.safetensors.index.json"}.intersection(files)) or any(
        os.path.exists(os.path.join(directory, "checkpoint", name)) for name in ("state.pt", "previous.pt"))


@functools.cache
def find_images(folder):
    """Paths of the image files below a folder, folder by folder. What else is there is counted, named and told once.

    Left out are folders below it that hold a run or a model, and pictures that were drawn here. What has captions, a
    text file that is called like an image beside it or METADATA, is not counted. A folder is listed once per process:
    both splits of a run come from one list.
    """
    found, skipped, ours = [], [], []
    for directory, folders, files in folders_below(folder, skipped):
        if holds_run(directory, files) and directory != str(folder):
            folders.clear()
            ours.append(directory)
            continue
        first, unread = len(found), []
        for path in (Path(directory, name) for name in files):
            try:
                if not path.is_file():  # a pipe would be waited for
                    raise ValueError("no file" if path.exists() else "a link to nothing")
                with Image.open(path) as image:  # reads the header only, so a large folder is listed quickly
                    (ours if image.info.get("Software") == DRAWN_HERE else found).append(str(path))
            except Exception as error:
                named_so = path.suffix.lower() in Image.registered_extensions()
                unread.append((path, "not an image" if isinstance(error, UnidentifiedImageError) and not named_so
                               else why_unreadable(error)))
        captioned = {Path(path).stem for path in found[first:]}
        skipped += [(path, reason) for path, reason in unread
                    if path.name not in METADATA and (path.suffix.lower() != ".txt" or path.stem not in captioned)]
    tell_of(folder, skipped, ours)
    return found


def tell_of(folder, skipped, ours):
    """Say on stderr what `find_images` has left out."""
    skipped.sort(key=lambda pair: pair[1] == "not an image")  # what may be missed comes first
    for paths, what in (([f"{os.path.relpath(path, folder)} ({reason})" for path, reason in skipped],
                         f"skipped {len(skipped)} files in {folder} that cannot be read as images"),
                        ([os.path.relpath(path, folder) for path in ours],
                         f"left out {len(ours)} pictures and folders of models in {folder} that were made here")):
        if paths:
            print(f"{what}: {', '.join(paths[:10] + ['...'] * (len(paths) > 10))}", file=sys.stderr)


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


@functools.cache
def tell_once(sentence):
    """Say something on stderr the first time that there is reason to."""
    print(sentence, file=sys.stderr)


def find_halves(folder):
    """The folders of the training and the held-out images in a folder, or () if it is not divided so.

    What stands beside them is named on stderr once.
    """
    if not os.path.isdir(folder):
        return ()
    try:
        names = sorted(name for name in os.listdir(folder)
                       if not name.startswith(".") and os.path.isdir(os.path.join(folder, name)))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from None
    chosen = name_halves(names)
    if not chosen:
        return ()
    rest = [name for name in names if name not in chosen]
    if rest:
        tell_once(f"{folder}: {chosen[0]}/ is trained on and {chosen[1]}/ held out; left out: {', '.join(rest[:10])}"
                  f"{', ...' * (len(rest) > 10)}")
    return tuple(Path(folder, name) for name in chosen)


def split_folders(folder, split):
    """The folders below which the images of a split are, and whether the folder says so by having two halves."""
    halves = find_halves(folder)
    return [half for half, name in zip(halves, ("train", "val")) if split in ("all", name)] or [folder], bool(halves)


def places_of(split, count):
    """The places of a split's images among `count` of them, where the data do not say which are held out."""
    chosen = held_out(count)
    return [place for place in range(count) if split == "all" or not chosen or (place in chosen) == (split == "val")]


class ImageSet(torch.utils.data.Dataset):
    """The images of one split as uint8 tensors (3, size, size), read one at a time when they are asked for.

    `folder` is one of our sets (index.json and sheets of tiles, held in memory), or any folder of images, flat or with
    one folder per class. A folder with train/ and val/, or whatever the second is called, is split so; of any other
    every twentieth image, in a fixed random order, is held out (a single image is both splits). `split` is "train",
    "val" or "all". A text file beside an image, of the same name but for its ending, is its caption; so is what
    metadata.jsonl or metadata.csv says, beside or above it.

    Keys: an int gives the evaluation view (shorter side resized, centre crop), a pair (int, seed) the training view
    (random crop, random flip) that this seed stands for. A readable neighbour stands in for an unreadable file, so
    every item comes with its own index, and with what was wrong with files found unreadable on the way.
    """

    def __init__(self, folder, split, size):
        self.folder, self.size, self.unreadable = Path(folder), size, set()
        if not self.folder.is_dir():
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
        no_class = {self.folder, *find_halves(self.folder)}
        found = [{"name": os.path.relpath(path, self.folder),
                  "category": "" if Path(path).parent in no_class else Path(path).parent.name} for path in self.sources]
        folders = {parent for folder in {os.path.dirname(path) for path in self.sources}
                   for parent in (Path(folder), *Path(folder).parents) if parent.is_relative_to(self.folder)}
        told = {path: text for folder in sorted(folders) for path, text in captions_in(folder).items()}
        captions = [told.get(os.path.normpath(path)) or caption_beside(path) for path in self.sources]
        return [{**record, "caption": text} if text else record for record, text in zip(found, captions)]

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
            except InputError as error:
                unreadable.append(str(error))
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
        """Items -> images (B, 3, size, size), their indices and what is wrong with unreadable files."""
        images, indices, reasons = zip(*items)
        return torch.stack(images), list(indices), [reason for some in reasons for reason in some]

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
        names = ([record.get("name") for record in self.records] if self.from_sheets else
                 [os.path.relpath(path, self.folder) for path in self.sources])  # without reading their captions
        return json.dumps(names).encode()

    def places(self):
        """The folders that the images lie in, links resolved."""
        found = {self.folder} if self.from_sheets else {os.path.dirname(source) for source in self.sources}
        return {Path(folder).resolve() for folder in found}

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
                for reason in set(unreadable) - self.unreadable:
                    self.unreadable.add(reason)
                    print(f"skipped: {reason} ({len(self.unreadable)} so far)", file=sys.stderr)
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
                    # torch draws by the low 32 bits of this alone, so that the seed must be in them too.
                    yield index, (self.seed * (2**40 + 2654435761) + position) % 2**63
                position += 1

"""Images in tar shards, WebDataset's layout: files called alike up to the first dot of their name are one sample."""

import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as pixels

from support.files import InputError, read_json
from support.images import ImageSet, places_of, read_image, split_folders

IMAGE_NAME = re.compile(r".*\.(jpg|jpeg|png|webp)", re.IGNORECASE | re.DOTALL)


def decode_image(data, name):
    """What read_image makes of a file with these bytes; JPEG without a profile goes through torchvision's decoder."""
    if data.startswith(b"\xff\xd8") and b"ICC_PROFILE\0" not in data:
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return pixels.to_pil_image(decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True))
        except RuntimeError:
            pass  # PIL reads it after all, or has a sentence for it
    return read_image(name, io.BytesIO(data))


@functools.cache
def map_file(path):
    """A file's bytes as an array; what is looked at is read from disk."""
    return np.memmap(path, np.uint8, "r")


class Member(NamedTuple):
    """A file inside a tar shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.shard}/{self.name}"

    def data(self):
        return map_file(self.shard)[self.offset:self.offset + self.size].tobytes()


def index_shard(path):
    """Name, offset and size of each file in a tar shard, as a structured array; InputError for a damaged shard.

    prepare.py leaves the array beside the shards it packs; others are searched from header to header.
    """
    try:
        if path.with_suffix(".npy").exists():
            rows = np.load(path.with_suffix(".npy"))  # does not unpickle
        else:
            with tarfile.open(path, "r:") as tar:
                files = [(os.fsencode(file.name), file.offset_data, file.size) for file in tar if file.isfile()]
            longest = max((len(name) for name, _, _ in files), default=1)
            rows = np.array(files, dtype=[("name", f"S{longest}"), ("offset", "<i8"), ("size", "<i8")])
        if (rows["offset"] + rows["size"]).max(initial=0) > path.stat().st_size:
            raise ValueError("it is cut off")
    except (OSError, EOFError, ValueError, IndexError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the shard {path} ({reason}): it must be fetched or packed again") from None
    return rows


def expand_braces(pattern):
    """shards-{000..009}.tar stands for ten names, as everywhere in WebDataset."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise InputError(f"{pattern} needs a package more: pip install webdataset") from None
    try:
        return expand_urls(pattern)
    except ValueError as error:
        raise InputError(f"{pattern} is no pattern of names: {error}") from None


def find_shards(folder):
    """The tar shards of a pattern or of a folder: those that its index.json names, or else all if no image is there."""
    if not folder.is_dir():
        pattern = str(folder)
        return [Path(path) for path in (expand_braces(pattern) if "{" in pattern else [pattern])]
    index = read_json(folder / "index.json") if (folder / "index.json").exists() else None
    if isinstance(index, dict) and isinstance(index.get("shards"), list):
        return [folder / str(name) for name in index["shards"]]
    found = sorted(folder.glob("*.tar"))
    return found if found and not any(IMAGE_NAME.fullmatch(path.name) for path in folder.iterdir()) else []


class Shards:
    """The images in tar shards, a sequence of Members. The index is in arrays, which worker processes share."""

    def __init__(self, paths):
        indices = [index_shard(path) for path in paths]
        self.paths, self.rows = paths, np.concatenate(indices)
        self.shard_of = np.repeat(np.arange(len(paths)), [len(index) for index in indices])
        names = map(os.fsdecode, self.rows["name"].tolist())
        self.images = np.flatnonzero([IMAGE_NAME.fullmatch(name) is not None for name in names])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return self.file(self.images[place])

    def file(self, row):
        name, offset, size = self.rows[row].tolist()
        return Member(self.paths[self.shard_of[row]], os.fsdecode(name), offset, size)

    def record(self, place):
        """Name; category, the .cls or else the folder's name; caption, the .txt; where .json says them, .json's."""
        def sample(file):
            return file.shard, file.name[:file.name.find(".", file.name.rfind("/") + 1)]

        image, row = self[place], self.images[place]
        near = map(self.file, range(max(0, row - 3), min(row + 4, len(self.rows))))
        texts = {file.name.rpartition(".")[2].lower(): file.data().decode(errors="replace").strip() for file in near
                 if sample(file) == sample(image) and not IMAGE_NAME.fullmatch(file.name)}
        try:
            described = dict(json.loads(texts.get("json", "{}")))
        except (ValueError, TypeError):  # it is no object
            described = {}
        found = {"category": texts.get("cls", Path(image.name).parent.name), "caption": texts.get("txt"), **described}
        found = {key: str(found[key]) for key in ("category", "caption") if found[key] is not None}
        return {"name": image.name, **found}


def open_images(data, split, size):
    """The images of one split: an ImageSet of a folder, a ShardSet of a folder or pattern of tar shards, or the
    ShardStream of a URL. A folder that exists is a folder, whatever its name looks like."""
    folder = Path(data)
    if os.path.isdir(folder):
        shards = any(find_shards(half) for half in split_folders(folder, split)[0])
        return (ShardSet if shards else ImageSet)(data, split, size)
    here = os.path.exists(folder) or ":" in str(folder.parent) and os.path.isdir(folder.parent)
    if re.match(r"\w\w+:", str(data)) and not here:
        return ShardStream(data, split, size)
    return (ShardSet if folder.suffix == ".tar" else ImageSet)(data, split, size)


class ShardSet(ImageSet):
    """An ImageSet of tar shards: those of a folder (what data/imagenet/prepare.py packs, or anyone's in WebDataset's
    layout), or those that a pattern names (shards-{000..009}.tar). They are read at random from where they lie."""

    def find_files(self, split):
        folders, divided = split_folders(self.folder, split)
        shards = Shards([path for folder in folders for path in find_shards(folder)])
        if not divided:
            shards.images = shards.images[places_of(split, len(shards))]
        return shards

    @functools.cached_property
    def records(self):
        return [self.sources.record(place) for place in range(len(self))]

    @staticmethod
    def read(source):
        return decode_image(source.data(), source)

    def names(self):
        return self.sources.rows["name"][self.sources.images].tobytes()

    def places(self):
        return {path.parent.resolve() for path in self.sources.paths}

    def fingerprint(self):
        digest = hashlib.sha256(str(self.size).encode() + self.sources.images.tobytes())
        for path in self.sources.paths:
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class ShardStream(ImageSet, torch.utils.data.IterableDataset):
    """Images of tar shards behind a URL, as the webdataset package reads them: from start to end, without a copy.

    The URL is a pattern for at least two shards (https://host/shards-{000..009}.tar; pipe:COMMAND for what a command
    prints); the last one is held out. What a key names here is a whole shard, and so is what ranks and workers take
    turns at: its evaluation views in their order or, for (shard, seed), training views in an order shuffled within
    1,000 images. Nobody knows the images' number, nor can ask for one of them.
    """

    def __init__(self, url, split, size):
        self.folder, self.size, self.unreadable, self.from_sheets, urls = url, size, set(), False, expand_braces(url)
        if len(urls) < 2:
            raise InputError(f"{url} is a single shard, and one more must be held out: name several, as {{000..009}}")
        self.sources = {"train": urls[:-1], "val": urls[-1:], "all": urls}[split]

    @property
    def records(self):
        raise InputError(f"{self.folder} is streamed, so its images cannot be asked for one by one: fetch the shards "
                         "into a folder")

    fingerprint = records.fget  # raises the same InputError

    def places(self):
        return set()  # they are nowhere here

    def names(self):
        return "\n".join(self.sources).encode()

    def batches(self, keys, batch_size, workers=0, indices=False):
        self.keys = keys
        return super().batches(None, batch_size, workers, indices)

    def spread(self, count):
        """The first `count` images."""
        return next(self.batches(range(len(self)), count)).float() / 255

    def __iter__(self):
        worker, unreadable = torch.utils.data.get_worker_info(), []
        for key in itertools.islice(self.keys, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            shard, seed = key if isinstance(key, tuple) else (key, None)
            draw, found = None if seed is None else random.Random(seed), False
            for name, data in stream_shard(self.sources[shard], draw):
                try:
                    image = decode_image(data, name)
                except InputError as error:
                    unreadable.append(str(error))
                    continue
                yield self.prepare(image, self.size, draw and draw.getrandbits(62)), shard, unreadable
                found, unreadable = True, []
            if not found:
                raise InputError(f"no image in the shard {self.sources[shard]} can be read")


def stream_shard(url, draw=None):
    """Yield name and bytes of every image of a tar shard, in its order or, with a random.Random, shuffled a little."""
    import webdataset

    stages = [webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples()]
    try:
        for sample in webdataset.DataPipeline(*stages, *([webdataset.shuffle(1000, rng=draw)] if draw else [])):
            for kind in sample:
                if IMAGE_NAME.fullmatch(f".{kind}"):
                    yield f"{url}/{sample['__key__']}.{kind}", sample[kind]
    except (OSError, ValueError, tarfile.TarError) as error:  # whose further arguments webdataset has added
        raise InputError(f"cannot read the shard {url}: {getattr(error, 'strerror', None) or error.args[0]}") from None

"""Images that Hugging Face `datasets` reads: folders it has saved, sets of the hub, WebDataset's tars."""

import functools
import hashlib
import io
import itertools
import json
import random
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as pixels

from support.files import InputError
from support.images import CAPTIONS, ImageSet, TrainingOrder, name_halves, places_of, read_image, split_folders

CATEGORIES = ("label", "category", "class", "cls")  # usual names of columns, as CAPTIONS, the likeliest first


def open_images(data, split, size, stream=False, columns=None):
    """The images of one split, "train", "val" or "all": an ImageSet of a folder of images, a TableSet of any other set.

    With `stream` a Stream of the latter. `columns`, names with commas between them, are the only columns to look at.
    """
    folder = Path(data)
    saved = any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))  # of one split, of several
    if saved or tar_files(data) or str(data).startswith("hub:") and not folder.is_dir():
        return (Stream if stream else TableSet)(str(data), split, size, columns)
    if stream:
        raise InputError(f"--stream is for sets that datasets reads, and {data} is a folder of images: leave it out")
    return ImageSet(data, split, size)


def tar_files(data):
    """The tars of a folder, a pattern or a URL, by their split; {} for what is no set of tars."""
    folder = Path(data)
    if not folder.is_dir():
        return {"train": expand_braces(str(data))} if re.search(r"[.]tar$|^https?://", str(data)) else {}
    folders, divided = split_folders(folder, "all")
    found = {split: tars_in(half) for split, half in zip(("train", "validation"), folders)}
    return found if all(found.values()) else {}


def tars_in(folder):
    """The tars in a folder; none if folders or images are there as well, for then a tar is something beside them."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in paths if path.is_dir() or path.suffix.lower() in Image.registered_extensions()]
    return [] if images else [str(path) for path in paths if path.suffix == ".tar"]


def expand_braces(pattern):
    """shards-{000..009}.tar stands for ten names, as everywhere in WebDataset."""
    found = re.search(r"\{(\d+)[.][.](\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    return [name for number in range(int(first), int(last) + 1) for name in
            expand_braces(f"{pattern[:found.start()]}{number:0{len(first)}}{pattern[found.end():]}")]


@contextmanager
def datasets_for(data):
    """The `datasets` library, for reading `data`; whatever it raises inside becomes an InputError.

    Its errors, Arrow's, tarfile's and the network's have no type in common.
    """
    try:
        import datasets.distributed

        yield datasets
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{data} needs packages more ({error}): pip install datasets, for URLs aiohttp too") from None
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(f"cannot read {data}: {reason}") from None


def load_splits(data, stream):
    """The Datasets of `data` by the names of their splits, or with `stream` its IterableDatasets."""
    tars = tar_files(data)
    with datasets_for(data) as datasets:
        if tars:
            return dict(datasets.load_dataset("webdataset", data_files=tars, streaming=stream))
        if not Path(data).is_dir():
            names = data.removeprefix("hub:").split("/")
            if len(names) not in (2, 3) or not all(names):
                raise InputError(f"{data} is no set of the hub, which is called hub:USER/NAME or hub:USER/NAME/VERSION")
            return dict(datasets.load_dataset("/".join(names[:2]), *names[2:], streaming=stream))
        found = datasets.load_from_disk(data)
        found = found if isinstance(found, dict) else {"train": found}
        return {name: part.to_iterable_dataset(min(64, len(part))) if stream else part for name, part in found.items()}


def choose_splits(parts, split):
    """Of the splits of a set, by their names, those that are `split`, and whether the set says what is held out."""
    halves = name_halves(list(parts))
    if not halves:  # of train and something unusual, or of one alone
        return [parts["train" if "train" in parts else next(iter(parts))]], False
    return [parts[name] for name, half in zip(halves, ("train", "val")) if split in ("all", half)], True


def find_columns(features, named, data):
    """The columns that hold "image", "category" and "caption", by their types and, where these leave it open, names.

    The last two may be missing. InputError without the first, or when a column of `named` is not there.
    """
    names = named.split(",") if named else [name for name in features if not name.startswith("__")]
    if not set(names) <= set(features):
        raise InputError(f"{data} has no column {min(set(names) - set(features))}, but {', '.join(features)}")
    kinds = {name: type(features[name]).__name__ for name in names}
    texts = [name for name in names if getattr(getattr(features[name], "feature", features[name]), "dtype", None)
             in ("string", "large_string")]  # one, or a list of them

    def called(usual, among):
        last = {name.rpartition(".")[2].lower(): name for name in reversed(among)}  # of json.caption caption
        return [last[word] for word in usual if word in last]

    images = sorted((name for name in names if kinds[name] == "Image"),
                    key=lambda name: name.count("."))  # 000.png comes before its mask, 000.seg.png
    if not images:
        raise InputError(f"{data} has no column of images, but {', '.join(features)}")
    labels = [name for name in names if kinds[name] == "ClassLabel"] + called(CATEGORIES, names)
    captions = called(CAPTIONS, texts)
    if named or not labels and len(texts) == 1:  # otherwise it may be the name of a file, or anything
        captions += [name for name in texts if name not in labels]
    found = {"image": images, "category": labels, "caption": captions}
    return {kind: columns[0] for kind, columns in found.items() if columns}


def decode_image(row):
    """What read_image makes of an undecoded image of a set; a JPEG goes through torchvision's decoder, which is quick.

    Not one with a colour profile, which torchvision would pass over.
    """
    if not row or not any(row.values()):
        raise InputError("cannot read an image that is missing")
    name, data = row["path"] or "an image", row["bytes"]
    if data is None:
        with datasets_for(name) as datasets, datasets.utils.file_utils.xopen(name, "rb") as file:
            data = file.read()  # a file, or one inside an archive or on the hub
    if data.startswith(b"\xff\xd8") and b"ICC_PROFILE\0" not in data:
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)  # (3, H, W)
            if max(image.shape[1:]) <= 1000 * min(image.shape[1:]):
                return pixels.to_pil_image(image)
        except RuntimeError:
            pass  # PIL reads it after all, or has a sentence for it
    return read_image(name, io.BytesIO(data))


class TableSet(ImageSet):
    """An ImageSet of a set that datasets holds as Arrow files: its images stay encoded there, and any can be asked for.

    Held out is what the set calls validation or test, otherwise what ImageSet holds out of a folder.
    """

    def __init__(self, data, split, size, columns=None):
        self.folder, self.size, self.unreadable, self.from_sheets = data, size, set(), False
        parts, divided = choose_splits(load_splits(data, stream=False), split)
        with datasets_for(data) as datasets:
            self.rows = datasets.concatenate_datasets([part.flatten() for part in parts])
            self.columns = find_columns(self.rows.features, columns, data)
            image = self.columns["image"]
            self.encoded = self.rows.select_columns(image).cast_column(image, datasets.Image(decode=False))
        self.sources = range(len(self.rows)) if divided else places_of(split, len(self.rows))
        if not self.sources:
            raise InputError(f"no images at {data}: the {split} split is empty")

    def read(self, source):
        return decode_image(self.encoded[source][self.columns["image"]])

    def paths(self):
        """The file names of the images, or their places in the set where it has none."""
        import pyarrow.compute

        paths = pyarrow.compute.struct_field(self.encoded.data.column(0), "path").to_pylist()
        return [paths[source] or str(source) for source in self.sources]

    def places(self):
        return {Path(file["filename"]).parent.resolve() for file in self.rows.cache_files}

    @functools.cached_property
    def records(self):
        found = [{"name": path, "category": ""} for path in self.paths()]
        for kind, column in self.columns.items():
            if kind != "image":
                feature, chosen = self.rows.features[column], self.rows.select_columns(column).select(self.sources)
                for record, value in zip(found, chosen[:][column]):
                    value = value[0] if isinstance(value, list) and value else value  # of several captions the first
                    if value not in (None, [], -1):  # the last for a class that is kept secret
                        record[kind] = feature.int2str(value) if hasattr(feature, "int2str") else str(value).strip()
        return found

    def names(self):
        return json.dumps(self.paths()).encode()

    def fingerprint(self):
        digest = hashlib.sha256(f"{self.size} {self.columns['image']} {list(self.sources)}".encode())
        for path in (Path(file["filename"]) for file in self.rows.cache_files):
            digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class Stream(ImageSet, torch.utils.data.IterableDataset):
    """The images of a set that is too large to hold, read from the start to the end of its files without a copy.

    Held out is what the set calls validation or test, otherwise its last file. Keys only say what is wanted: those of
    a TrainingOrder training views without end, in files shuffled and mixed within BUFFER images, of which every rank
    and every worker reads files of its own; any others the evaluation views in their order. Nobody knows how many
    images there are, nor can ask for one of them.

    `state` says where this rank's training views stand, by the place of a process among all and their number. Resumed,
    they go on in the same files, but pass over the images that waited in the buffer.
    """

    BUFFER = 1000

    def __init__(self, data, split, size, columns=None):
        self.folder, self.size, self.unreadable, self.from_sheets, self.state = data, size, set(), False, {}
        parts, divided = choose_splits(load_splits(data, stream=True), split)
        with datasets_for(data) as datasets:
            if not divided:
                count = parts[0].num_shards
                if count < 2:
                    raise InputError(f"{data} is a single file, and one more must be held out: leave out --stream")
                begin, end = {"train": (0, count - 1), "val": (count - 1, count), "all": (0, count)}[split]
                parts = [parts[0].shard(count, place) for place in range(begin, end)]
            self.column = find_columns(parts[0].features, columns, data)["image"]
            self.rows = datasets.concatenate_datasets(
                [part.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))
                 for part in parts])
        self.sources = range(self.rows.num_shards)

    @property
    def records(self):
        raise InputError(f"{self.folder} is streamed, so its images cannot be asked for one by one: leave out --stream")

    fingerprint = records.fget  # raises the same InputError

    def places(self):
        return set()  # that one could write over

    def names(self):
        return self.folder.rpartition("/")[2].encode()

    def spread(self, count):
        """The first `count` images."""
        return next(self.batches(range(count), count)).float() / 255

    def batches(self, keys, batch_size, workers=0, indices=False):
        self.order = order = keys if isinstance(keys, TrainingOrder) else None
        rank, ranks = (order.rank, order.ranks) if order else (0, 1)
        workers = min(workers, len(self) // ranks)  # each has files of its own
        count = max(1, workers)
        self.batch_size, self.processes = batch_size, [(rank * count + i, ranks * count) for i in range(count)]
        if order:
            self.before = self.state if order.start else {}
            self.state = {place: self.before[place] for place in self.processes if place in self.before}
        for images, places in super().batches(None, batch_size, workers, indices=True):
            if places[-1]:
                self.state.update(places[-1])
            yield (images, places) if indices else images

    def rows_of(self, place, epoch, state):
        """Yield the rows that a process reads in an epoch, from `state` on, each with a function for the next."""
        with datasets_for(self.folder) as datasets:
            rows, number, count = self.rows, *place
            if self.order:
                rows = rows.shuffle([self.order.seed, epoch], buffer_size=self.BUFFER)
            rows = datasets.distributed.split_dataset_by_node(
                rows, number, count, "shards" if rows.num_shards >= count else "examples")
            if state:
                rows.load_state_dict(state)
            for batch in rows.iter(1):  # iter(rows) would share out once more what a worker has
                yield batch[self.column][0], rows.state_dict

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        place, unreadable = self.processes[worker.id if worker else 0], []
        first, shown, state = 0, 0, None
        if self.order:  # with other processes than before, each begins an epoch that none has seen
            later = max((epoch + 1 for epoch, _, _ in self.before.values()), default=0)
            first, shown, state = self.before.get(place, (later, 0, None))
        for epoch in itertools.count(first) if self.order else [0]:
            begun, seed, after = shown if state is None else -1, None, None
            for row, next_state in self.rows_of(place, epoch, state):
                try:
                    image = decode_image(row)
                except InputError as error:
                    unreadable.append(str(error))
                    continue
                shown += 1
                if self.order:  # of every view of every process another seed
                    seed = random.Random(f"{self.order.seed} {place} {shown}").getrandbits(62)
                    after = {place: (epoch, shown, next_state())} if shown % self.batch_size == 0 else None
                yield self.prepare(image, self.size, seed), after, unreadable
                unreadable = []
            if shown == begun:
                raise InputError(f"no image in {self.folder} can be read")
            state = None

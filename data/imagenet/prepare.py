"""
Pack ImageNet, or any folder of images with one folder per class, once: into tar shards that train.py reads fast.

    python data/imagenet/prepare.py --source DIR               # DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG
    python data/imagenet/prepare.py --source DIR --out OUT --size 512 --workers 16
    python train.py --stage 1 --data data/imagenet/packed ...

Without val/ a twentieth of the images is held out, the same that train.py holds out of a plain folder. The shorter
side of an image becomes --size pixels, bicubic and antialiased; smaller images keep theirs. What is resized is written
as a JPEG of --quality, a fraction of its pixels' bytes and quickly decoded; an upright JPEG that is not too large is
kept byte for byte.

A shard is a tar file of some thousand images from all classes, in an order shuffled with --seed, so that to read it
from start to end is to read at random. An image's class is its folder inside the tar: `tar xf` gives the folders back,
and the webdataset package streams the shards from anywhere. NAME.npy beside NAME.tar says where in it each image
begins, for train.py to map it into memory; index.json, in train/ and in val/, has the shards, the classes with their
numbers of images, and the files that could not be read.

Interrupt it whenever you like: the same command goes on with the shards that are not there, and ends with the same
bytes as if nothing had happened.
"""
import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as pixels
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from support.files import InputError, read_json  # noqa: E402
from support.images import find_halves, folders_below, held_out, read_image  # noqa: E402
from support.shards import index_shard  # noqa: E402


def parse_args(argv=None):
    def positive(text, least=1):
        if int(text) < least:
            raise ValueError
        return int(text)

    def whole(text):
        return positive(text, least=0)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with train/ and val/, or of any images in class folders")
    add("--out", type=Path, default=HERE / "packed", help="folder for the shards (%(default)s)")
    add("--size", type=positive, default=256, help="shorter side in pixels of images that are larger (%(default)s)")
    add("--quality", type=int, choices=range(1, 101), metavar="1..100", default=95, help="of JPEG (%(default)s)")
    add("--shard-size", type=positive, default=4096, help="images in a shard (%(default)s)")
    add("--seed", type=whole, default=0, help="of the order of the images (%(default)s)")
    add("--workers", type=positive, default=os.cpu_count(), help="processes (%(default)s)")
    return parser.parse_args(argv)


def list_files(folder):
    """Paths, relative to the folder, of all files below it, without hidden ones; InputError where it may not look."""
    refused, found = [], []
    for directory, _, files in folders_below(folder, refused):
        found += [os.path.relpath(Path(directory, name), folder) for name in files]
    for path, reason in refused:
        raise InputError(f"cannot read {path}: {reason}")
    return found


def find_splits(source):
    """The folders and files of each split: {"train": (folder, files), "val": (folder, files)}."""
    if not source.is_dir():
        raise InputError(f"no images at {source}: it is not a folder")
    halves = find_halves(source)
    if halves:
        splits = {split: (half, list_files(half)) for split, half in zip(("train", "val"), halves)}
    else:
        files = list_files(source)
        chosen = held_out(len(files))
        splits = {"train": (source, [file for i, file in enumerate(files) if i not in chosen]),
                  "val": (source, [file for i, file in enumerate(files) if i in chosen])}
    return {split: (folder, files) for split, (folder, files) in splits.items() if files}


def encode(path, size, quality):
    """The bytes of a JPEG whose shorter side is at most `size`; the file's own where they are that already."""
    data = path.read_bytes()
    image = read_image(path, io.BytesIO(data))
    if min(image.size) > size:
        image = pixels.resize(image, size, interpolation=pixels.InterpolationMode.BICUBIC)
    else:
        with Image.open(io.BytesIO(data)) as header:
            if header.format == "JPEG" and header.mode in ("L", "RGB") and header.getexif().get(0x0112, 1) == 1:
                return data
    file = io.BytesIO()
    try:
        image.save(file, "JPEG", quality=quality)
    except (OSError, ValueError) as error:  # a side is longer than JPEG can say
        raise InputError(f"cannot write {path} as JPEG: {error}") from None
    return file.getvalue()


@contextmanager
def replacing(path):
    """Open a file that takes the place of `path` when all is written, in one step; or vanishes when that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Packer(torch.utils.data.Dataset):
    """One split in shards, each packed when it is asked for: DataLoader's processes do so side by side."""

    def __init__(self, args, source, files, out):
        self.args, self.source, self.out = args, source, out
        self.files = [files[i] for i in np.random.default_rng(args.seed).permutation(len(files)).tolist()]
        self.shards = [f"{number:05}.tar" for number in range(-(-len(files) // args.shard_size))]

    def begin(self):
        """Write down what is to be packed; InputError where something else has been."""
        if self.out.resolve().is_relative_to(self.source.resolve()):
            raise InputError(f"--out {self.out} lies among the images of {self.source}: choose another")
        self.out.mkdir(parents=True, exist_ok=True)
        for part in self.out.glob(".*.*.*"):  # of a process that was killed
            part.unlink(missing_ok=True)
        args, path = self.args, self.out / "index.json"
        self.settings = {"size": args.size, "quality": args.quality, "shard_size": args.shard_size, "seed": args.seed,
                         "files_sha256": hashlib.sha256(os.fsencode("\n".join(self.files))).hexdigest()}
        if not path.exists():
            self.write_index()
        before = read_json(path)
        before = before.get("settings", {}) if isinstance(before, dict) else {}
        changed = [name for name, value in self.settings.items() if before.get(name) != value]
        if changed:
            raise InputError(f"{self.out} holds another packing (with other {', '.join(changed)}): choose another "
                             "--out, or remove it")

    def write_index(self, **more):
        """Write index.json: settings and shards, and in the end what is in them."""
        with replacing(self.out / "index.json") as file:
            file.write(json.dumps({"settings": self.settings, "shards": self.shards, **more}, indent=1).encode())

    def planned(self, number):
        """The files of a shard by what they are called in it, always with the ending of a JPEG."""
        size = self.args.shard_size
        return {file if file.lower().endswith((".jpg", ".jpeg")) else f"{file}.jpg": file
                for file in self.files[number * size:(number + 1) * size]}

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, number):
        """Pack a shard if it is not there; return a sentence for each file skipped, and one for an error, or None."""
        path, skipped = self.out / self.shards[number], []
        try:
            if not path.exists():
                with replacing(path) as file:
                    self.pack(number, file, skipped)
                    with replacing(path.with_suffix(".npy")) as index:  # first, so that where a shard is, it is too
                        np.save(index, index_shard(Path(file.name)))
        except OSError as error:
            return skipped, f"cannot pack {path} ({error}); finished shards are kept, the same command goes on with it"
        return skipped, None

    def pack(self, number, file, skipped):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, source in self.planned(number).items():
                try:
                    data = encode(self.source / source, self.args.size, self.args.quality)
                except InputError as error:
                    skipped.append(str(error))
                    continue
                member = tarfile.TarInfo(name)  # of no time and no owner, so that packing twice gives the same bytes
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        file.flush()

    def run(self):
        """Pack every shard, then complete index.json."""
        loader = torch.utils.data.DataLoader(self, batch_size=None, num_workers=min(self.args.workers, len(self)))
        with tqdm(total=len(self.files), desc=self.out.name, unit="image", dynamic_ncols=True) as bar:
            for number, (skipped, error) in enumerate(loader):
                for sentence in skipped:
                    bar.write(f"skipped: {sentence}", file=sys.stderr)
                if error:
                    raise InputError(error)
                bar.update(len(self.planned(number)))
        classes, unread = Counter(), []
        for number, shard in enumerate(self.shards):
            names = {os.fsdecode(name) for name in index_shard(self.out / shard)["name"].tolist()}
            classes.update(Path(name).parent.name for name in names)
            unread += [source for name, source in self.planned(number).items() if name not in names]
        self.write_index(images=classes.total(), classes=dict(sorted(classes.items())), skipped=sorted(unread))
        size = sum((self.out / shard).stat().st_size for shard in self.shards)
        print(f"{self.out}: {classes.total():,} images of {len(classes):,} classes in {len(self):,} shards, {size:,} "
              f"bytes; skipped {len(unread):,} files, which index.json names")


def main(argv=None):
    args = parse_args(argv)
    try:
        splits = find_splits(args.source)
        if not splits:
            raise InputError(f"no images at {args.source}: it is empty")
        packers = [Packer(args, folder, files, args.out / split) for split, (folder, files) in splits.items()]
        for packer in packers:
            packer.begin()
        for packer in packers:
            packer.run()
    except (InputError, OSError, RuntimeError) as error:  # the last when a process was killed
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""
Pack ImageNet, or any folder of images, once: into a set of Hugging Face `datasets` that train.py reads fast.

    python data/imagenet/prepare.py --source DIR               # DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG
    python data/imagenet/prepare.py --source DIR --out OUT --size 512 --workers 16
    python train.py --stage 1 --data data/imagenet/packed ...

The set has the images that train.py finds in the folder, held out as there, with their classes and captions, in a
shuffled order. The shorter side of an image becomes --size pixels, bicubic and antialiased; smaller images keep theirs.
What is resized is written as a JPEG of --quality, a fraction of its pixels' bytes and quickly decoded; an upright JPEG
that is not too large is kept byte for byte.

Interrupt it whenever you like: the same command goes on with the parts that are not there.
"""
import argparse
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms import functional as pixels

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from support.files import InputError, digest  # noqa: E402
from support.images import ImageSet, read_image  # noqa: E402
from support.run import one_sentence_errors  # noqa: E402
from support.settings import number  # noqa: E402

try:
    import datasets
except ImportError as missing:
    sys.exit(f"error: packing needs a package more: pip install datasets ({missing})")

PART = 8192  # images that are packed at a time, and lost if that is interrupted


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder with train/ and val/, or of any images in class folders")
    add("--out", type=Path, default=HERE / "packed", help="folder for the set (%(default)s)")
    add("--size", type=number(int), default=256, help="shorter side in pixels of images that are larger (%(default)s)")
    add("--quality", type=int, choices=range(1, 101), metavar="1..100", default=95, help="of JPEG (%(default)s)")
    add("--workers", type=number(int), default=os.cpu_count(), help="processes (%(default)s)")
    return parser.parse_args(argv)


def encode(path, size, quality):
    """The bytes of a JPEG whose shorter side is at most `size`; the file's own where they are that already."""
    data = Path(path).read_bytes()
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


def encode_rows(rows, size, quality):
    """Columns of file, name, label and caption -> those of image, label and caption, without unreadable files."""
    packed = {"image": [], "label": [], "caption": []}
    for file, label, caption in zip(rows["file"], rows["label"], rows["caption"]):
        try:
            image = {"bytes": encode(file, size, quality), "path": file}
        except InputError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        for column, value in zip(packed.values(), (image, label, caption)):
            column.append(value)
    return packed


def pack(images, args, features, cache):
    """The Dataset of an ImageSet. Its parts are kept in the folder `cache`, where they are found when it is resumed."""
    records, parts = images.records, []
    order = np.random.RandomState(0).permutation(len(images)).tolist()
    for begin in range(0, len(order), PART):
        rows = datasets.Dataset.from_list([
            {"file": images.sources[i], "label": records[i]["category"], "caption": records[i].get("caption", "")}
            for i in order[begin:begin + PART]])
        parts.append(rows.map(
            encode_rows, batched=True, batch_size=64, num_proc=min(args.workers, len(rows)), features=features,
            remove_columns=rows.column_names, fn_kwargs={"size": args.size, "quality": args.quality},
            cache_file_name=str(cache / f"{begin:09}.arrow"), desc=f"{cache.name} {begin + len(rows)}/{len(order)}"))
    return datasets.concatenate_datasets(parts)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        if args.out.exists():
            raise InputError(f"{args.out} is there already: remove it, or choose another --out")
        found = {"train": ImageSet(args.source, "train", args.size),
                 "validation": ImageSet(args.source, "val", args.size)}
        if found["train"].from_sheets:
            raise InputError(f"{args.source} is packed already, into sheets")
        classes = {record["category"] for images in found.values() for record in images.records}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted(classes)),
                                      "caption": datasets.Value("string")})
        parts = args.out.with_name(f"{args.out.name}.parts")
        packed = datasets.DatasetDict()
        for name, images in found.items():
            key = digest(f"{images.fingerprint()} {args.quality}".encode())[:16]  # another packing finds other parts
            cache = parts / key / name
            cache.mkdir(parents=True, exist_ok=True)
            packed[name] = pack(images, args, features, cache)
        packed.save_to_disk(parts / "whole")
        (parts / "whole").rename(args.out)
        shutil.rmtree(parts)
        size = sum(file.stat().st_size for file in args.out.rglob("*.arrow"))
        print(f"{args.out}: {', '.join(f'{len(part):,} {name}' for name, part in packed.items())} images of "
              f"{len(classes):,} classes, {size:,} bytes; skipped "
              f"{sum(map(len, found.values())) - sum(map(len, packed.values())):,} files")


if __name__ == "__main__":
    main()

"""
Build data/emoji: 64 px emoji in three drawing styles, one WebP sheet per style, and index.json.

    python data/emoji/prepare.py                        # reads ../shared/data, seen from the repository root
    python data/emoji/prepare.py --source DIR

Where the bytes come from:
- noto      Debian package fonts-noto-color-emoji 2.042. Images Apache-2.0, font OFL 1.1, Copyright Google Inc.
- fluent3d  npm package @lobehub/fluent-emoji-3d 1.1.0. MIT, Copyright (c) Microsoft Corporation.
- twemoji   npm package emoji-datasource-twitter 16.0.0. CC BY 4.0, Copyright Twitter, Inc and other contributors;
            composited on white and scaled.
- captions  Unicode CLDR short names through emojibase-data. MIT, Miles Johnson.
- category and subcategory: emoji-data. MIT, Cal Henderson.
The licence texts are in data/emoji/licenses.

The source folder holds the sheets already drawn (every emoji on white, 64 px, WebP quality 90) with one json per
style that lists the tiles. This script does not re-encode anything: it copies the sheets byte for byte, decides
which emoji are held out, and writes index.json. Running it again gives the same bytes.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
SOURCE = REPO.parent / "shared" / "data"
VAL_FRACTION = 0.2

# file here, sheet in the source folder, list of its tiles in the source folder, name of the style
SHEETS = [
    ("noto_64.webp", "noto_64_q90.webp", "noto.json", "noto"),
    ("fluent3d_64.webp", "fluent3d_64_q90.webp", "fluent3d.json", "fluent"),
    ("twemoji_64.webp", "twemoji_64_q90.webp", "twemoji.json", "twemoji"),
]
TILE = 64


def parse_source():
    """Read the command line; both prepare.py scripts have the same single option."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with emoji/ and photos/ (%(default)s)")
    return parser.parse_args().source


def need(path):
    """Return path if the file is there, otherwise stop with one sentence that names it."""
    if not path.is_file():
        raise SystemExit(f"The source file {path} is missing; pass the folder that holds it with --source.")
    return path


def read_tiles(path):
    """Read the list of tiles that belongs to a sheet, in tile order."""
    return json.loads(need(path).read_text(encoding="utf-8"))


def copy_sheet(source, target, tile, entries):
    """Copy a sheet byte for byte, after checking that it has a tile for every entry."""
    with Image.open(need(source)) as sheet:  # reads the header only, the pixels are not decoded
        columns, rows = sheet.width // tile, sheet.height // tile
    # the last row may have blank tiles at its end, but there is no row without an image
    if not (rows - 1) * columns < len(entries) <= rows * columns:
        raise SystemExit(f"{source} has {columns} x {rows} tiles, which does not fit its {len(entries)} entries.")
    shutil.copyfile(source, target)


def split_names(names):
    """
    Hold out 20 % of the names, the same ones on every run, and return them as a set.

    The split is over names, not images: an emoji is drawn in up to three styles, and the same smile must not be
    in train in one style and in val in another. Sorting first makes the result independent of the file order.
    """
    names = sorted(set(names))
    np.random.RandomState(0).shuffle(names)
    return set(names[:int(VAL_FRACTION * len(names))])


def write_index(path, sheets):
    """Write index.json, one image per line: small, and a change of one image is a change of one line."""
    def dump(value):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    blocks = []
    for sheet in sheets:
        head = ",".join(f"{dump(key)}:{dump(value)}" for key, value in sheet.items() if key != "images")
        lines = ",\n".join(dump(image) for image in sheet["images"])
        blocks.append("{" + head + ',"images":[\n' + lines + "\n]}")
    text = '{"sheets":[\n' + ",\n".join(blocks) + "\n]}\n"
    # newline="\n" keeps the bytes the same on Windows
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def print_summary(folder, sheets):
    """Print what was written: images and held-out images per sheet, names by split, and bytes per file."""
    for sheet in sheets:
        val = sum(image["split"] == "val" for image in sheet["images"])
        total = len(sheet["images"])
        print(f"{sheet['style']:8s} {total:5,} images: {total - val:5,} train, {val:3,} val")
    split_of = {image["name"]: image["split"] for sheet in sheets for image in sheet["images"]}
    val = sum(split == "val" for split in split_of.values())
    print(f"{'names':8s} {len(split_of):5,} in all: {len(split_of) - val:5,} train, {val:3,} val")
    for name in [sheet["file"] for sheet in sheets] + ["index.json"]:
        print(f"{name:16s} {(folder / name).stat().st_size:9,} bytes")


def main():
    """Copy the three sheets, split the emoji, write index.json, print a summary."""
    source = parse_source() / "emoji"
    tiles = [read_tiles(source / listing) for _, _, listing, _ in SHEETS]
    val = split_names(entry["filename"] for entries in tiles for entry in entries)

    sheets = []
    for (file, sheet, _, style), entries in zip(SHEETS, tiles):
        copy_sheet(source / sheet, HERE / file, TILE, entries)
        images = [{
            "name": entry["filename"].removesuffix(".png"),
            "caption": entry["name"],
            "category": entry["category"],
            "subcategory": entry["subcategory"],
            "split": "val" if entry["filename"] in val else "train",
        } for entry in entries]
        sheets.append({"file": file, "tile": TILE, "style": style, "images": images})
    write_index(HERE / "index.json", sheets)

    print_summary(HERE, sheets)
    in_all = set.intersection(*({entry["filename"] for entry in entries} for entries in tiles))
    print(f"{len(in_all):,} emoji are in all three styles, {len(in_all & val)} of them val")


if __name__ == "__main__":
    main()


# Output:
#
# noto     1,624 images: 1,300 train, 324 val
# fluent   1,598 images: 1,280 train, 318 val
# twemoji  1,610 images: 1,286 train, 324 val
# names    1,635 in all: 1,308 train, 327 val
# noto_64.webp     1,719,262 bytes
# fluent3d_64.webp 1,421,628 bytes
# twemoji_64.webp  1,400,142 bytes
# index.json         557,167 bytes
# 1,575 emoji are in all three styles, 315 of them val

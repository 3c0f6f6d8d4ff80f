"""
Build data/photos: 128 px photographs of animals, places and things, one WebP sheet, and index.json.

    python data/photos/prepare.py                       # reads ../shared/data, seen from the repository root
    python data/photos/prepare.py --source DIR

Where the bytes come from: Debian package gcompris-qt-data 3.1 and scikit-image 0.26 (the images it ships for its
examples). Each photo is CC0 or public domain; its licence and credit are in index.json and in CREDITS.md, which
this script writes too.

The source folder holds the sheet already drawn (128 px centre crops, WebP quality 90) with a json that lists the
tiles. Like data/emoji/prepare.py, from which most of the work is borrowed, this script copies the sheet byte for
byte. Running it again gives the same bytes.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# the other script is called prepare.py as well: putting its folder first makes "prepare" mean that one
sys.path.insert(0, str(HERE.parent / "emoji"))
from prepare import copy_sheet, parse_source, print_summary, read_tiles, split_names, write_index  # noqa: E402

FILE = "photos_128.webp"
TILE = 128
# the two licences that may be shipped, written one way (the source has two spellings of the second)
LICENSES = {"cc0-1.0": "CC0-1.0", "public domain": "Public Domain"}

# The source says only "CC0/public domain" for the photos from scikit-image and leaves the credit empty. This is what
# scikit-image 0.26 says about each of them, in the docstrings of skimage/data/_fetchers.py.
SKIMAGE = {
    "sc_astronaut": ("Public Domain", "NASA, Great Images database; https://flic.kr/p/r9qvLn"),
    "sc_brick": ("CC0-1.0", "CC0Textures; https://cc0textures.com/view.php?tex=Bricks25"),
    "sc_camera": ("CC0-1.0", "Lav Varshney; through scikit-image"),
    "sc_chelsea": ("CC0-1.0", "Stefan van der Walt; through scikit-image"),
    "sc_coffee": ("CC0-1.0", "Rachel Michetti, courtesy of Pikolo Espresso Bar; through scikit-image"),
    "sc_grass": ("CC0-1.0", "Linolafett; https://www.deviantart.com/linolafett/art/Grass-01-434853879"),
    "sc_gravel": ("CC0-1.0", "CC0Textures; https://cc0textures.com/view.php?tex=Gravel04"),
    "sc_rocket": ("Public Domain", "SpaceX; https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/"),
}


def find_license(entry):
    """Return the licence and the credit of a photo, and stop if it is neither CC0 nor public domain."""
    license, credit = SKIMAGE.get(entry["filename"].removesuffix(".png"), (entry["license"], entry["credit"]))
    if license.lower() not in LICENSES or not credit:
        raise SystemExit(f"{entry['filename']} has licence {license!r} and credit {credit!r}, so it cannot be shipped.")
    return LICENSES[license.lower()], credit


def write_credits(path, images):
    """Write the table of licences and credits, one photo per row."""
    rows = [f"| {image['name']} | {image['caption']} | {image['license']} | {image['credit']} |" for image in images]
    text = f"""# Photo credits

The {len(images)} photos in `{FILE}`, in tile order. All are CC0 or public domain, so credit is not required; it is
given because the photographers deserve it. They were cropped to the centre square and scaled to {TILE} px.
This file is written by `prepare.py`.

| name | shows | licence | credit |
|---|---|---|---|
"""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n".join(rows) + "\n")


def main():
    """Copy the sheet, split the photos, check the licences, write index.json and CREDITS.md, print a summary."""
    source = parse_source() / "photos"
    entries = read_tiles(source / "realphotos.json")
    val = split_names(entry["filename"] for entry in entries)
    copy_sheet(source / "realphotos_128_q90.webp", HERE / FILE, TILE, entries)

    images = []
    for entry in entries:
        license, credit = find_license(entry)
        images.append({
            "name": entry["filename"].removesuffix(".png"),
            "caption": entry["name"],
            "category": entry["category"],
            "license": license,
            "credit": credit,
            "split": "val" if entry["filename"] in val else "train",
        })
    sheets = [{"file": FILE, "tile": TILE, "style": "photo", "images": images}]
    write_index(HERE / "index.json", sheets)
    write_credits(HERE / "CREDITS.md", images)

    print_summary(HERE, sheets)
    for license in LICENSES.values():
        print(f"{sum(image['license'] == license for image in images):3} photos are {license}")


if __name__ == "__main__":
    main()


# Output:
#
# photo      210 images:   168 train,  42 val
# names      210 in all:   168 train,  42 val
# photos_128.webp  1,055,004 bytes
# index.json          45,949 bytes
#  88 photos are CC0-1.0
# 122 photos are Public Domain

"""Make data/pretrained: models of the tiny preset that come with the code, rounded to half precision.

    python train.py --stage 1
    python train.py --stage 2 --init out/stage1
    python train.py --stage ar --tokenizer out/stage2
    python data/pretrained/prepare.py

The tokenizer goes into stage2/, the transformer that writes its codes into ar/, each with the log and the figures of
its run; stage1/ has these of the run before, without a model. What rounding changes is counted on the held-out images
and printed: codes that differ, and codes that the transformer writes otherwise when it takes the likeliest each time.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from support.codes import codes_of  # noqa: E402
from support.files import PRETRAINED, InputError, digest, read_json, replace_text, save_model  # noqa: E402
from support.run import INIT, choose_device, one_sentence_errors  # noqa: E402
from support.sets import open_images  # noqa: E402
from support.text import caption_of  # noqa: E402
from unitok import load_generator, load_language_model, load_tokenizer  # noqa: E402


def count_differences(own, shipped, device):
    """Print how many codes a generator and its tokenizer, and their rounded copies, choose and write differently."""
    (lm, tokenizer), (rounded_lm, rounded) = own, shipped
    images = open_images(str(ROOT / "data/emoji"), "val", tokenizer.config.image_size)
    captions = [caption_of(record) for record in images.records]
    pairs = {"read from images": [codes_of(model, images, range(len(images)), 64, device)[0]
                                  for model in (tokenizer, rounded)],
             "written from captions": [torch.cat([model.generate(captions[place:place + 64], temperature=0)
                                                  for place in range(0, len(captions), 64)])
                                       for model in (lm, rounded_lm)]}
    for name, (one, other) in pairs.items():
        differ = one != other  # (n, N)
        print(f"codes {name}: {int(differ.sum())} of {differ.numel()} differ, in {int(differ.any(1).sum())} of "
              f"{len(differ)} images")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("out"), help="folder that holds stage1, stage2 and ar (out)")
    parser.add_argument("--out", type=Path, default=PRETRAINED, help="folder to write into (data/pretrained)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors():
        device = choose_device(args.device)
        tokenizer, own = load_tokenizer(args.runs / "stage2"), load_generator(args.runs / "ar", device)
        if digest(*tokenizer.state_dict().values()) != digest(*own[1].state_dict().values()):
            raise InputError(f"{args.runs}/ar writes the codes of another tokenizer than {args.runs}/stage2")
        if read_json(args.runs / "stage2/summary.json").get(INIT) != digest(
                (args.runs / "stage1/model.safetensors").read_bytes()):
            raise InputError(f"{args.runs}/stage2 did not begin with the model in {args.runs}/stage1")
        runs = {"stage1": None, "stage2": tokenizer, "ar": load_language_model(args.runs / "ar")}
        for name, model in runs.items():
            for file in ("metrics.jsonl", "summary.json"):
                if not (args.runs / name / file).is_file():
                    raise InputError(f"{args.runs / name} has no {file}, which comes along as a reference")
                replace_text(args.out / name / file, (args.runs / name / file).read_text(encoding="utf-8"))
            if model is not None:
                save_model(model.half(), args.out / name, getattr(model, "text", None))
        size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
        print(f"{args.out}: {size / 1e6:.1f} MB")
        rounded = load_language_model(args.out / "ar").to(device), load_tokenizer(args.out / "stage2").to(device)
        count_differences(own, rounded, device)


if __name__ == "__main__":
    main()

"""Settings as dataclasses, and flags made of them."""

import argparse
import math
import sys
from dataclasses import field, fields
from pathlib import Path

from support.files import InputError


def setting(group, help, choices=None, zero=False, most=math.inf):
    """A field of a dataclass of settings, and a flag in a group of --help; a number is above 0, or 0 with `zero`."""
    return field(metadata={"group": group, "help": help, "choices": choices, "zero": zero, "most": most})


def flags_of(*classes):
    """The fields of dataclasses that are flags, by name; where two classes have one, the last one's."""
    return {entry.name: entry for each in classes for entry in fields(each) if "help" in entry.metadata}


def flag(name):
    """How a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def number(kind, zero=False, most=math.inf):
    """An argparse type: an int below 2^63 or a finite float, above 0, or 0 where `zero` allows it, up to `most`."""
    def parse(text):
        value = kind(text)
        if not 0 <= value <= most or value == math.inf or value == 0 and not zero or kind is int and value >= 2**63:
            raise ValueError
        return value

    sign = "" if zero else "positive "
    parse.__name__ = f"{sign}{kind.__name__}" + (f" up to {most}" if most < math.inf else "")
    return parse  # argparse says: invalid positive int value: '0'


def value_in(argv, name):
    """What a flag is given on the command line, before anything else is known of that; None if it is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


class ShortHelp(argparse.RawDescriptionHelpFormatter):
    """Help in which most flags take one line."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=35)


def add_settings(parser, settings, hidden=()):
    """A flag for each of the `settings`, a dict of fields, in their groups.

    None where a flag was not given. Those named in `hidden` are understood and not shown: a driver has a sentence for
    them.
    """
    groups = {}
    for name, entry in settings.items():
        about = entry.metadata
        title = about["group"]
        if name not in hidden and title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = entry.type in (str, str | None)
        kind = str if text else number(float if entry.type is float else int, about["zero"], about["most"])
        metavar = None if about["choices"] else "DIR" if text else "X" if entry.type is float else "N"
        (parser if name in hidden else groups[title]).add_argument(
            flag(name), type=kind, choices=about["choices"], metavar=metavar,
            help=argparse.SUPPRESS if name in hidden else about["help"])


def add_set_flags(add):
    """The flags that say how --data is read if it is no folder of images."""
    add("--columns", metavar="A,B", help="of a set: names of the columns to look at for image, label and caption")
    add("--stream", action="store_true", help="of a set too large to hold: read its files from start to end")


def add_run_flags(parser, out="out/stage1, out/stage2, out/ar, out/caption"):
    """The flags of `support.run.Run`; `out` says what --out is where it is not given."""
    add, whole, count = parser.add_argument_group("run").add_argument, number(int, zero=True), number(int)
    add("--seed", type=whole, default=0, metavar="N", help="of weights, order and crops: one seed, one run")
    add("--out", type=Path, metavar="DIR", help=f"for all that the run writes (default: {out})")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="start anew in an --out that already holds a run")
    add("--checkpoint-every", type=count, default=200, metavar="N", help="steps between checkpoints")
    add("--log", choices=["tensorboard", "trackio"], help="follow the run there, too: figures and reconstructions")
    add("--log-every", type=count, default=50, metavar="N", help="steps between lines of metrics.jsonl")
    add("--evaluate-every", type=count, default=600, metavar="N", help="steps between held-out evaluations")
    add("--workers", type=number(int, zero=True, most=1024), metavar="N",
        help="processes that read images (default: 0 for shipped data, up to 4 for other)")
    add_set_flags(add)
    add("--device", default="auto", metavar="NAME", help="auto, cuda, mps or cpu")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the device has it")
    add("--compile", action="store_true", help="torch.compile: slower to start, faster steps")


def refuse_dashes(parser, argv):
    """End with a sentence for --flag=-- , which argparse would hand on as an empty list in place of a value."""
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") and word.endswith("=--"):
            parser.error(f"argument {word}: expected a value")


def sampling_flags(parser, count, cfg_scale, temperature, of=""):
    """The flags of a model that writes pictures, with the given defaults; `count` is the help of --count."""
    add = parser.add_argument
    add("--count", type=number(int, most=2**20), help=of + count)
    add("--cfg-scale", type=number(float, zero=True, most=1000), default=cfg_scale,
        help=of + "classifier-free guidance: how much the caption counts; 1: as trained")
    add("--temperature", type=number(float, zero=True), default=temperature,
        help=of + "below 1 likely codes get likelier; 0: always the likeliest")
    add("--top-k", type=number(int, zero=True), default=0, help=of + "the K likeliest; 0: all")
    add("--top-p", type=number(float, most=1), default=1.0,
        help=of + "only the fewest codes that make up this probability")
    add("--seed", type=number(int, zero=True), default=0, help="of the draw of codes")


def leave_open(parser, names):
    """Flags whose defaults wait in args.defaults for `fill_in`: what is not None until then was given."""
    parser.set_defaults(defaults={name: parser.get_default(name) for name in names}, **dict.fromkeys(names))


def fill_in(args, used, what):
    """Give the flags that were left open their defaults; InputError for a given one that is not among the `used`."""
    for name, default in args.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif name not in used:
            raise InputError(f"{flag(name)} is not for {what}")

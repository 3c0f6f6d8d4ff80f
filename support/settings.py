"""Settings as dataclasses, and flags made of them."""

import math
import sys
from dataclasses import field


def setting(help, choices=None, zero=False, most=math.inf):
    """A field of the settings that `train.py` makes a flag of; a number is above 0, or 0 too with `zero`."""
    return field(metadata={"help": help, "choices": choices, "zero": zero, "most": most})


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


def refuse_dashes(parser, argv):
    """End with a sentence for --flag=-- , which argparse would hand on as an empty list in place of a value."""
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("--") and word.endswith("=--"):
            parser.error(f"argument {word}: expected a value")

"""What a model may be given: a sentence for everything else, where a tensor would pass through and come out wrong."""

import math
from numbers import Integral, Real

import torch

from support.files import InputError


def check_images(images, most=0.01, wait=True):
    """InputError for what is no images: floats (B, 3, H, W), finite, and outside of [0, 1] by no more than `most`.

    To look at the values of images on a GPU is to wait for it; without `wait` these are believed.
    """
    check_form(images)
    if images.device.type != "cpu" and not wait:
        return
    low, high = (value.item() for value in images.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise InputError("images have values that are no numbers, or infinite")
    if low < -most or high > 1 + most:
        raise InputError(f"images must be in [0, 1], not from {low:.3g} to {high:.3g}")


def check_form(images):
    """InputError for what is no floats (B, 3, H, W), whatever their values."""
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"images must be a tensor (B, 3, H, W), not {shape_of(images)}")
    if not images.is_floating_point():
        raise InputError(f"images must be floats in [0, 1], not {images.dtype}: divide by 255 what comes as bytes")


def check_codes(indices, codes, codebooks=0):
    """Codes (B, N) in [0, codes), or (B, N, M) with M `codebooks`, as int64; InputError for all else."""
    dims, shape = (3, f"(B, N, {codebooks})") if codebooks else (2, "(B, N)")
    whole = isinstance(indices, torch.Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.is_quantized or indices.dtype == torch.bool)
    if not whole or indices.dim() != dims or 0 in indices.shape or codebooks and indices.shape[2] != codebooks:
        raise InputError(f"codes must be a tensor {shape} of whole numbers, not {shape_of(indices)}")
    indices = indices.long()  # above 2^63 a number of 64 bits becomes negative, and is refused too
    if indices.min() < 0 or indices.max() >= codes:
        raise InputError(f"codes must be from 0 to {codes - 1}, not {int(indices.min())} to {int(indices.max())}")
    return indices


def rows_and_columns(count, rows=None):
    """How `count` tokens fill an image of so many rows, or a square one; InputError when they do not."""
    if rows is None:
        rows = math.isqrt(count)
        if rows**2 != count:
            raise InputError(f"{count} codes are not those of a square image: say of how many rows of tokens, as rows=")
    if isinstance(rows, bool) or not isinstance(rows, Integral) or rows < 1 or count % rows:
        raise InputError(f"{count} codes do not fill {rows!r} rows")
    return int(rows), count // int(rows)


def number_in(name, value, least, most, kind=Real):
    """A value as an int, if `kind` is Integral, or a float; InputError when it is no number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:  # which nan never is
        raise InputError(f"{name} is {value!r}; it must be a {'whole ' * (kind is Integral)}number from {least} to "
                         f"{most}")
    return int(value) if kind is Integral else float(value)


def check_sampling(cfg_scale, temperature, top_k, top_p):
    """The four as numbers; InputError for values with which nothing can be drawn."""
    if isinstance(top_p, Real) and top_p == 0:
        raise InputError("top_p is 0, which leaves no code to draw; it must be above 0 and at most 1")
    return (number_in("cfg_scale", cfg_scale, -1000, 1000), number_in("temperature", temperature, 0, 1000),
            number_in("top_k", top_k, 0, 2**62, Integral), number_in("top_p", top_p, 0, 1))


def check_prompts(prompts, tokens, count, codes):
    """InputError unless prompts are lists of one or more of so many `tokens`, and `count` of `codes` can follow."""
    good = [len(prompt) > 0 and all(0 <= token < tokens for token in prompt) for prompt in prompts]
    if not good or not all(good):
        raise InputError(f"prompts must be lists of one or more tokens from 0 to {tokens - 1}")
    if codes == 0:
        raise InputError("this model has no codes to write: it was made without a tokenizer's, as codebook_size")
    number_in("the number of codes to write (image_tokens)", count, 1, 2**24, Integral)


def list_of_texts(text):
    """A caption or a list of them as a list; InputError for what is neither, or empty."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(each, str) for each in texts):
        raise InputError(f"a caption, or a list of one or more, is wanted, not {text!r:.100}")
    return list(texts)


def shape_of(value):
    """What a value is, in the words of an error."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

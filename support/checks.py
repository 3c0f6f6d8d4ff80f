"""What a model may be given: a sentence for everything else, where a tensor would pass through and come out wrong."""

import math

import torch

from support.files import InputError


def check_images(images):
    """InputError for what is no images: floats (B, 3, H, W), finite and in [0, 1] but for rounding."""
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise InputError(f"images must be a tensor (B, 3, H, W), not {shape_of(images)}")
    if not images.is_floating_point():
        raise InputError(f"images must be floats in [0, 1], not {images.dtype}: divide by 255 what comes as bytes")
    if not images.isfinite().all():
        raise InputError("images have values that are no numbers")
    if images.min() < -0.01 or images.max() > 1.01:
        raise InputError(f"images must be in [0, 1], not from {images.min():.3g} to {images.max():.3g}")


def check_codes(indices, codes, codebooks=0):
    """InputError for what is no codes (B, N) in [0, codes), or (B, N, M) with M `codebooks`."""
    dims, shape = (3, f"(B, N, {codebooks})") if codebooks else (2, "(B, N)")
    whole = isinstance(indices, torch.Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if not whole or indices.dim() != dims or 0 in indices.shape or codebooks and indices.shape[2] != codebooks:
        raise InputError(f"codes must be a tensor {shape} of whole numbers, not {shape_of(indices)}")
    if indices.min() < 0 or indices.max() >= codes:
        raise InputError(f"codes must be from 0 to {codes - 1}, not {int(indices.min())} to {int(indices.max())}")


def rows_and_columns(count, rows=None):
    """How `count` tokens fill an image of so many rows, or a square one; InputError when they do not."""
    if rows is None:
        rows = math.isqrt(count)
        if rows**2 != count:
            raise InputError(f"{count} codes are not those of a square image: say of how many rows of tokens, as rows=")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 or count % rows:
        raise InputError(f"{count} codes do not fill {rows!r} rows")
    return rows, count // rows


def check_sampling(cfg_scale, temperature, top_k, top_p):
    """InputError for values with which nothing can be drawn."""
    for name, value, least in (("cfg_scale", cfg_scale, -math.inf), ("temperature", temperature, 0),
                               ("top_k", top_k, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            raise InputError(f"{name} is {value!r}; it must be a number" + " from 0 on" * (least == 0))
    if int(top_k) != top_k:
        raise InputError(f"top_k is {top_k!r}; it must be a whole number")
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p!r}; it must be above 0 and at most 1")


def list_of_texts(text):
    """A caption or a list of them as a list; InputError for what is neither, or empty."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(each, str) for each in texts):
        raise InputError(f"a caption, or a list of one or more, is wanted, not {text!r}")
    return list(texts)


def shape_of(value):
    """What a value is, in the words of an error."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

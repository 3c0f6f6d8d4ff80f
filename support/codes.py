"""An image set as tokens: features and pixels of some, and codes of all, made once and kept on disk."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from support.files import InputError, digest, read_safetensors, replacing


@torch.no_grad()
def tokens_and_patches(encoder, images, parts, most):
    """At least `most` tokens of an iterable of batches (B, 3, H, W): features (n, d) and pixels (n, 3*p*p).

    Each batch is shown to the encoder in `parts`.
    """
    features, patches, found, p = [], [], 0, encoder.config.patch_size
    for batch in images:
        features += [encoder(part).flatten(0, 1) for part in batch.chunk(parts)]
        patches.append(F.unfold(batch, p, stride=p).transpose(1, 2).flatten(0, 1))  # (B * N, 3*p*p)
        found += len(patches[-1])
        if found >= most:
            break
    return torch.cat(features), torch.cat(patches)


@torch.no_grad()
def codes_of(model, images, keys, batch_size=64, device="cpu", workers=0):
    """The codes (n, N) int32 of some images and their places (n,) in the set, without unreadable ones."""
    codes, kept, asked = [], [], 0
    for batch, places in images.batches(keys, batch_size, workers, indices=True):
        own = [i for i, place in enumerate(places) if place == keys[asked + i]]  # no stand-in for an unreadable file
        codes.append(model.encode(batch.to(device).float() / 255)[1].cpu()[own].int())
        kept += [places[i] for i in own]
        asked += len(places)
    return torch.cat(codes), torch.tensor(kept)


def write_codes(path, codes, places):
    """Write codes and places in one step."""
    with replacing(path) as part:
        save_file({"codes": codes, "places": places}, part)


def codes_digest(model, images):
    """SHA-256 of everything that the codes of an ImageSet depend on: model and images."""
    weights = [piece for name, tensor in sorted(model.state_dict().items()) for piece in (name.encode(), tensor)]
    return digest(json.dumps(asdict(model.config)).encode(), images.fingerprint().encode(), *weights)


@torch.no_grad()
def image_codes(model, images, folder, batch_size=64, device="cpu", workers=0):
    """The codes (n, N) of all images of an ImageSet, evaluation views, and the places (n,) of the readable ones in it.

    They are kept in `folder`, in a file that is named after everything they depend on: model and images. So a change
    of either makes them anew, and a stale file is never read. Nor is a damaged one.
    """
    path = Path(folder) / f"{codes_digest(model, images)[:32]}.safetensors"
    try:
        saved = read_safetensors(path)
    except InputError:
        write_codes(path, *codes_of(model, images, range(len(images)), batch_size, device, workers))
        saved = read_safetensors(path)
    return saved["codes"].long(), saved["places"]

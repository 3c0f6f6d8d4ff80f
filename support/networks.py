"""Pretrained networks of others, which are asked for by name; their weights are fetched on first use."""

from contextlib import contextmanager

import torch

from support.files import InputError


@contextmanager
def fetching(name, instead):
    """InputError, with what to do `instead`, when a network's package is missing or its weights cannot be fetched."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{name} needs a package more: pip install -r requirements-extra.txt ({error}); {instead}"
                         ) from None
    except Exception as error:  # no network, a cut transfer, a wrong hash, a damaged file: all have types of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the weights of {name} cannot be fetched ({reason}); {instead}") from None


def lpips_vgg():
    """LPIPS on VGG16 (Zhang et al. 2018), an lpips.LPIPS."""
    with fetching("VGG16, for LPIPS", "--perceptual vfm, and evaluating without it, need no download"):
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False)


def inception(device="cpu"):
    """The FID on Inception-v3 of 2015-12-05, a torchmetrics FrechetInceptionDistance, as torch-fidelity computes it."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    with fetching("Inception-v3, for rFID", "evaluating without --rfid needs no download"):
        # antialias: torchmetrics' default resizes otherwise than the network of 2015 did, and its figure is another.
        distance = FrechetInceptionDistance(antialias=False)
    return distance.to("cpu" if torch.device(device).type == "mps" else device)  # float64, which mps lacks, adds up


def convnext_small():
    """torchvision's ConvNeXt-S, trained on ImageNet."""
    from torchvision import models

    with fetching("ConvNeXt-S", "--perceptual vfm needs no download"):
        return models.convnext_small(weights=models.ConvNeXt_Small_Weights.IMAGENET1K_V1)

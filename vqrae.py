"""VQRAE in one file, in the order of the paper (Du et al. 2025, arXiv 2511.23386).

    images -> encoder E -> Linear d->e -> SimVQ codebook -> Linear e->d -> symmetric decoder D -> images

First comes the paper, Sections 3.2 to 3.5; then metrics (Section 4.1), image data, checkpoints, and the settings of
Tables 7 to 9. Shapes used in the comments, with the paper's letter where it has one:
    B  images in a batch            d  width of encoder and decoder     p  patch side the encoder reads
    N  tokens of an image, HW/p^2   e  width of a code                  q  patch side the decoder writes
    K  codes in the codebook (n and k in the paper)
    V  tokens of the text vocabulary                                    h  width of an attention head
H and W are the sides of an image (h and w in the paper), n and m any number of rows. Models take and return images as
float tensors (B, 3, H, W) in [0, 1], and each encoder applies its own mean and std; image data come as uint8. A
`--flag` in a comment is one of train.py's.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tarfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as pixels


class InputError(ValueError):
    """A mistake in the user's input that one sentence explains; the drivers print it without a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# The ViT block, shared by encoder and decoder
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class ViTConfig:
    """Sizes of a pre-norm vision transformer, and the pixel statistics that a pretrained one expects."""

    image_size: int  # the size it was trained at, which fixes how many positions it has learned
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    family: str = "dinov2"  # a name in FAMILIES; the fields below say how families differ
    activation: str = "gelu"  # a name in ACTIVATIONS
    layer_norm_eps: float = 1e-6
    layer_scale: bool = True
    class_token: bool = True
    registers: int = 0  # further tokens without a position
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP's: one more norm, before the first block
    final_norm: str = "tokens"  # which tokens the last norm is for: all "tokens", the "class" token alone, or "none"
    antialias: bool = False  # when positions are resized
    mean: tuple = (0.485, 0.456, 0.406)  # ImageNet's, which DINOv2 was trained with
    std: tuple = (0.229, 0.224, 0.225)

    def __post_init__(self):
        self.mean, self.std = tuple(self.mean), tuple(self.std)  # a JSON file has lists
        check_fields(self, ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"))
        if self.width % self.heads or self.image_size < self.patch_size:
            raise InputError(f"width {self.width} must be a multiple of heads {self.heads}, and image_size "
                             f"{self.image_size} no less than patch_size {self.patch_size}")
        if (self.family not in FAMILIES or self.activation not in ACTIVATIONS
                or self.final_norm not in ("tokens", "class", "none")):
            raise InputError(f"family {self.family!r}, activation {self.activation!r} or final_norm "
                             f"{self.final_norm!r} is unknown")


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(h)) v: queries (B, heads, n, h) and keys, values (B, kv_heads, m, h) -> (B, heads, n, h).

    With fewer heads of keys than of queries, neighbouring queries share one. mask (B or 1, 1, n, m), added to the
    scores, is 0 where a query may see a key and -inf elsewhere, see `mask_of`; without it, all see all.
    """
    B, heads, n, h = q.shape
    if q.device.type != "cpu" or n > 512 or n == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != k.shape[1])
    # For a few hundred queries on a CPU, torch's fused kernel and above all its backward is slower than two products.
    q = (q * h**-0.5).reshape(B, k.shape[1], -1, h)  # (B, kv_heads, heads/kv_heads * n, h): sharing is stacking
    scores = (q @ k.transpose(-2, -1)).float().view(B, k.shape[1], -1, n, k.shape[2])  # (B, kv_heads, sharing, n, m)
    if mask is not None:
        scores = scores + mask[:, :, None]
    return (scores.softmax(-1).to(v.dtype).flatten(2, 3) @ v).view(B, heads, n, h)


def mask_of(visible, dtype):
    """The mask of `attend` from what a query may see, (B or 1, 1, n, m) of booleans."""
    return torch.zeros(visible.shape, device=visible.device, dtype=dtype).masked_fill_(~visible, -torch.inf)


class QuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "gelu_pytorch_tanh": functools.partial(nn.GELU, approximate="tanh"),
               "quick_gelu": QuickGELU}


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, d) -> (B, N, d)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, N, d = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, d // self.heads)  # (B, N, 3, heads, d/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d/heads) each
        x = attend(q, k, v)  # (B, heads, N, d/heads)
        return self.out(x.transpose(1, 2).reshape(B, N, d))  # (B, N, d)


class Block(nn.Module):
    """Pre-norm transformer block with optional LayerScale, (B, N, d) -> (B, N, d)."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, config.mlp_width), ACTIVATIONS[config.activation](),
                                 nn.Linear(config.mlp_width, width))
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else 1.0
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else 1.0

    def forward(self, x):
        x = x + self.scale1 * self.attention(self.norm1(x))  # (B, N, d)
        x = x + self.scale2 * self.mlp(self.norm2(x))  # (B, N, d)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "VFMs as Unified Encoder": a pretrained vision transformer E; `load_encoder` (below) reads it
# ----------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The vision foundation model E: images (B, 3, H, W) in [0, 1] -> features Z_I (B, N, d), N = HW/p^2.

    One class for DINOv2 (with and without registers), SigLIP 2, CLIP and InternViT; ViTConfig says how they differ.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, p = config.width, config.patch_size
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        # Stride equals kernel: not a convolution over the image but one Linear applied to each patch.
        self.patch_embed = nn.Conv2d(3, d, kernel_size=p, stride=p, bias=config.patch_bias)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        if config.registers:
            self.registers = nn.Parameter(torch.randn(1, config.registers, d) * 0.02)
        positions = config.class_token + (config.image_size // p) ** 2  # the class token's first, if there is one
        self.positions = nn.Parameter(torch.randn(1, positions, d) * 0.02)
        self.pre_norm = nn.LayerNorm(d, config.layer_norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.Identity() if config.final_norm == "none" else nn.LayerNorm(d, config.layer_norm_eps)

    def positions_for(self, rows, columns):
        """Learned positions for a grid of patches (1, [1 +] rows*columns, d), resized bicubically."""
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.positions
        cls, grid = self.positions.split([int(self.config.class_token), side**2], dim=1)
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()  # (1, d, side, side)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False,
                             antialias=self.config.antialias)  # (1, d, rows, columns)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)  # (1, [1 +] rows*columns, d)

    def hidden_states(self, images):
        """Yield all tokens, class token and registers first, as they are after each block, before the last norm.

        Each is (B, [1 +] registers + N, d). Raises InputError when the image's sides are not multiples of the patch
        size.
        """
        p = self.config.patch_size
        height, width = images.shape[-2:]
        if height % p or width % p:
            raise InputError(f"images of {height} x {width} pixels do not divide into patches of {p}")
        x = self.patch_embed((images - self.mean) / self.std)  # (B, d, H/p, W/p)
        positions = self.positions_for(*x.shape[-2:])  # (1, [1 +] N, d)
        x = x.flatten(2).transpose(1, 2)  # (B, N, d)
        if self.config.class_token:  # x.shape[0], for len(x) would fix an exported graph's size of batch
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, d)
        x = x + positions  # (B, [1 +] N, d)
        if self.config.registers:
            first = int(self.config.class_token)
            x = torch.cat([x[:, :first], self.registers.expand(x.shape[0], -1, -1), x[:, first:]], dim=1)
        x = self.pre_norm(x)  # (B, [1 +] registers + N, d)
        for block in self.blocks:
            x = block(x)  # (B, [1 +] registers + N, d)
            yield x

    def forward(self, images):
        for x in self.hidden_states(images):  # (B, [1 +] registers + N, d), none kept but the last
            pass
        x = self.norm(x) if self.config.final_norm == "tokens" else x  # a norm for "class" is only kept to be saved
        return x[:, self.config.class_token + self.config.registers:]  # (B, N, d)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "High Dimensional VQ": Eq. 1, and the quantizer's loss, Eq. 3; Section 3.3, 100% utilization
# ----------------------------------------------------------------------------------------------------------------------


class VectorQuantizer(nn.Module):
    """Plain vector quantization (van den Oord et al. 2017): every code is a free parameter.

    Only the codes that some token chose receive a gradient. A code that no token chooses never moves again while the
    features go on moving away from it: that is how codebooks collapse.
    """

    def __init__(self, codebook_size, dim, beta=0.25, beta_side="commitment"):
        super().__init__()
        self.beta, self.beta_side = beta, beta_side
        # The SimVQ authors' start, i.i.d. Gaussian with E||c||^2 = 1; `start_codebook` has a better one.
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)  # the paper's C, (K, e)

    def project(self, codes):
        """Effective codes (n, e) of rows of the codebook (n, e): here, the rows themselves."""
        return codes

    def lookup(self, indices):
        """Effective codes (..., e) of indices (...): exactly what the forward pass used."""
        # Not codebook[indices], whose gradient is summed in whatever order threads come.
        return self.project(F.embedding(indices, self.codebook))

    @torch.no_grad()
    def search(self, z, code_chunk=2048, token_chunk=2048):
        """Eq. 1: the index of the nearest code in Euclidean distance for each vector, z (n, e) -> (n,) int64.

        Codes and tokens pass by in chunks, so memory does not grow with n * K, and no graph is built over the codes
        that nobody chose. ||z||^2 is the same for every code and is left out.
        """
        best = z.new_full((len(z),), torch.inf)
        indices = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        for first in range(0, len(self.codebook), code_chunk):
            codes = self.project(self.codebook[first:first + code_chunk])  # (chunk, e)
            squared_norms = codes.pow(2).sum(1)  # (chunk,)
            for begin in range(0, len(z), token_chunk):
                part = slice(begin, begin + token_chunk)
                distance, nearest = torch.addmm(squared_norms, z[part], codes.T, alpha=-2).min(1)  # (part,) each
                closer = distance < best[part]
                best[part] = torch.where(closer, distance, best[part])
                indices[part] = torch.where(closer, first + nearest, indices[part])
        return indices

    def start(self, z, generator):
        """Let the codes start from projected training tokens z (n, e)."""
        start_codebook(self, z, generator=generator)

    def forward(self, z):
        """Quantize z (..., e) -> z_q (..., e), indices (...), codebook loss, commitment loss; see Eq. 3.

        The two losses add up to L_quant, beta included. Eq. 3 as printed compares C with Z_q twice, which never brings
        code and feature together; this is the form of its source (SimVQ, Algorithm 1): the codebook term moves the code
        to the feature, the commitment term, weighted by beta, moves the feature to the code. On whichever side beta is,
        the sum has the same value: only the gradients differ.
        """
        with torch.autocast(z.device.type, enabled=False):  # distances in bf16 would pick wrong neighbours
            z = z.float()
            indices = self.search(z.detach().flatten(0, -2)).view(z.shape[:-1])  # (...)
            q = self.lookup(indices)  # (..., e)
            codebook_loss = F.mse_loss(q, z.detach())
            commitment_loss = F.mse_loss(z, q.detach())
            if self.beta_side == "commitment":
                commitment_loss = self.beta * commitment_loss
            else:
                codebook_loss = self.beta * codebook_loss
            z_q = z + (q - z).detach()  # straight-through: the value is q's, the gradient goes to z
        return z_q, indices, codebook_loss, commitment_loss


class SimVQ(VectorQuantizer):
    """SimVQ (Zhu et al. 2024), the paper's quantizer: a frozen codebook C seen through one learned matrix W.

    The effective code is q_i = W c_i + b. The gradient of any chosen code is a gradient of W, and W moves every code,
    so codes that nobody chose travel along with the features. W learns from the codebook loss alone, since the
    straight-through estimator leads the reconstruction gradient past it.
    """

    def __init__(self, codebook_size, dim, beta=0.25, beta_side="commitment"):
        super().__init__(codebook_size, dim, beta, beta_side)
        codebook = self.codebook.detach()
        del self.codebook
        self.register_buffer("codebook", codebook)  # in the state dict, but not a parameter: it never changes
        self.W = nn.Linear(dim, dim)  # the bias is the authors' code's; Eq. 1 writes the matrix alone

    def project(self, codes):
        return self.W(codes)  # (n, e)


class NoQuantizer(nn.Module):
    """The continuous autoencoder (RAE) behind the quantizers' interface: z passes as it is, there are no indices."""

    def forward(self, z):
        return z, None, z.new_zeros(()), z.new_zeros(())


@torch.no_grad()
def start_codebook(quantizer, z, steps=6, generator=None):
    """`--codebook-init data`: k-means centres of projected training features z (n, e) become the codes, W the identity.

    Why the start decides whether a codebook lives. Gaussian codes, of length 1, are a small cloud in the middle of the
    features, of length sqrt(d). A code that wins tokens is pulled towards them and takes the tokens of those left
    behind. In plain VQ only the winners move, until a few have all tokens. In SimVQ they move W, and W moves the whole
    cloud to where these few have to be. Codes that start where the features are all have tokens to win from the first
    step on, and W only has to keep up.
    """
    K = len(quantizer.codebook)
    if len(z) < K:
        raise InputError(f"{K} codes cannot start from {len(z)} features; ask for fewer codes or give more images")
    if isinstance(quantizer, SimVQ):
        nn.init.eye_(quantizer.W.weight)
        nn.init.zeros_(quantizer.W.bias)
    quantizer.codebook.copy_(z[torch.randperm(len(z), generator=generator)[:K].to(z.device)])
    for step in range(steps + 10):
        indices = quantizer.search(z)  # (n,)
        counts = torch.bincount(indices, minlength=K)  # (K,)
        few = 0.25 * len(z) / K
        if step >= steps and counts.min() >= few:
            break  # every code has enough to do, the ones drawn in the last round included
        distance = (z - quantizer.codebook[indices]).norm(dim=1)  # (n,)
        sums = torch.zeros_like(quantizer.codebook).index_add_(0, indices, z)  # (K, e)
        centres = sums / counts.clamp(min=1)[:, None]  # (K, e)
        # Half of the tokens of our emoji are one and the same blank background. Many codes are drawn from its copies,
        # and all but one of them get no token. A code that serves a single odd token is lost once features move. So
        # codes with little to do start again at badly served tokens, drawn in proportion to their distance.
        weak = counts < few
        if weak.any():
            chosen = torch.multinomial(distance.cpu().double() + 1e-12, int(weak.sum()), generator=generator)
            centres[weak] = z[chosen.to(z.device)]
        quantizer.codebook.copy_(centres)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "Symmetric Decoder"
# ----------------------------------------------------------------------------------------------------------------------


def sincos_positions(rows, columns, width):
    """Fixed 2-D sine-cosine positions (1, rows * columns, width): half the channels tell the row, half the column."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))  # (width/4,)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")  # (rows, columns)
    waves = []
    for place in (row, column):
        angle = place.flatten()[:, None] * frequency  # (rows * columns, width/4)
        waves += [angle.sin(), angle.cos()]
    return torch.cat(waves, dim=1).float()[None]  # (1, rows * columns, width)


class Decoder(nn.Module):
    """The decoder D that mirrors the encoder: bottleneck Z_bot (B, N, d) -> images X' (B, 3, rows*q, columns*q).

    One token per latent position ("patch size 1" in the paper), the same blocks, and no convolution: a Linear writes
    the q x q pixels of every token. q may differ from the encoder's p, which scales the image by q/p.
    """

    def __init__(self, config, patch_size):
        super().__init__()
        self.patch_size, self.width = patch_size, config.width
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.head = nn.Linear(config.width, 3 * patch_size**2)

    def forward(self, x, rows, columns):
        x = x + sincos_positions(rows, columns, self.width).to(x)  # (B, N, d)
        for block in self.blocks:
            x = block(x)  # (B, N, d)
        x = self.head(self.norm(x))  # (B, N, 3*q*q)
        x = x.transpose(1, 2).unflatten(2, (rows, columns))  # (B, 3*q*q, rows, columns)
        return F.pixel_shuffle(x, self.patch_size)  # (B, 3, rows*q, columns*q)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2: the tokenizer as a whole
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class VQRAEConfig:
    """Everything that fixes the shapes of a VQRAE; `config.json` of a saved model holds just this."""

    encoder: ViTConfig
    image_size: int  # side of the images it was trained on
    output_patch_size: int  # q; equal to the encoder's p keeps the size of the image
    codebook_size: int  # K
    codebook_dim: int  # e
    quantizer: str = "simvq"  # a name in QUANTIZERS
    beta: float = 0.25
    beta_side: str = "commitment"

    def __post_init__(self):
        check_fields(self, ("image_size", "output_patch_size", "codebook_size", "codebook_dim"))
        if self.quantizer not in QUANTIZERS or self.encoder.width % 4:  # 4: sine, cosine of row, column
            raise InputError(f"quantizer {self.quantizer!r} is unknown, or width {self.encoder.width} no multiple of 4")
        if self.beta_side not in ("commitment", "codebook"):
            raise InputError(f"beta_side is {self.beta_side!r}")


QUANTIZERS = {"simvq": SimVQ, "vq": VectorQuantizer, "none": lambda *sizes: NoQuantizer()}


@dataclass
class Output:
    """What a forward pass of VQRAE returns; the two losses are scalars and beta is already in them."""

    reconstruction: torch.Tensor  # X' (B, 3, H*q/p, W*q/p), not clamped to [0, 1]
    features: torch.Tensor  # Z_I (B, N, d), for understanding
    indices: torch.Tensor | None  # (B, N), for generation
    codebook_loss: torch.Tensor
    commitment_loss: torch.Tensor
    z: torch.Tensor  # projected features, the paper's Z^_c (B, N, e)
    z_q: torch.Tensor  # the codes in their place (B, N, e)


class VQRAE(nn.Module):
    """Representation-quantization autoencoder: one encoder, continuous features and discrete tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, e = config.encoder.width, config.codebook_dim
        self.encoder = Encoder(config.encoder)
        # Not in the paper: channels of a pretrained encoder differ in scale, and a few would outweigh all others in a
        # distance. `start` sets both; until then they change nothing.
        self.register_buffer("feature_mean", torch.zeros(d))
        self.register_buffer("feature_std", torch.ones(d))
        self.project_in = nn.Linear(d, e)
        self.quantizer = QUANTIZERS[config.quantizer](config.codebook_size, e, config.beta, config.beta_side)
        self.project_out = nn.Linear(e, d)
        self.decoder = Decoder(config.encoder, config.output_patch_size)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def standardise(self, features):
        """Features (B, N, d) with zero mean and unit variance per channel over the training images."""
        return (features - self.feature_mean) / self.feature_std

    def project_features(self, features):
        """Features Z_I (B, N, d) -> Z^_c (B, N, e), in fp32: rounded to bf16, z would choose other codes."""
        with torch.autocast(features.device.type, enabled=False):
            return self.project_in(self.standardise(features.float()))

    def count(self, indices):
        """How often each of the K codes is among indices -> (K,) int64."""
        return torch.bincount(indices.flatten(), minlength=self.config.codebook_size)

    def features_of(self, z):
        """The features (B, N, d) that project to z (B, N, e), by least squares: codes in the encoder's own terms."""
        inverse = torch.linalg.pinv(self.project_in.weight)  # (d, e)
        return (z - self.project_in.bias) @ inverse.T * self.feature_std + self.feature_mean

    def grid(self, images):
        """Rows and columns of tokens of images (B, 3, H, W)."""
        return images.shape[-2] // self.config.encoder.patch_size, images.shape[-1] // self.config.encoder.patch_size

    def forward(self, images):
        features = self.encoder(images)  # Z_I (B, N, d)
        z = self.project_features(features)  # Z^_c (B, N, e)
        z_q, indices, codebook_loss, commitment_loss = self.quantizer(z)  # Z_q (B, N, e), (B, N)
        bottleneck = self.project_out(z_q)  # Z_bot (B, N, d)
        reconstruction = self.decoder(bottleneck, *self.grid(images))  # X' (B, 3, H*q/p, W*q/p)
        return Output(reconstruction, features, indices, codebook_loss, commitment_loss, z, z_q)

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> features (B, N, d), codes (B, N) int64 (None without a codebook)."""
        features = self.encoder(images)  # (B, N, d)
        _, indices, _, _ = self.quantizer(self.project_features(features))  # (B, N)
        return features, indices

    @torch.no_grad()
    def decode(self, indices, rows=None):
        """Codes (B, N) -> images (B, 3, rows*q, N/rows*q) in [0, 1]; without `rows`, N is taken to be of a square."""
        rows = rows or math.isqrt(indices.shape[1])
        if isinstance(self.quantizer, NoQuantizer) or indices.shape[1] % rows:
            raise InputError(f"{indices.shape[1]} codes do not fill {rows} rows, or the model has no codebook")
        bottleneck = self.project_out(self.quantizer.lookup(indices))  # (B, N, d)
        return self.decoder(bottleneck, rows, indices.shape[1] // rows).clamp(0, 1)

    @torch.no_grad()
    def start(self, features, patches, codebook_init="data", projection_init="pixels", generator=None):
        """Before the first step: fit standardisation, projections and codebook to training tokens (not in the paper).

        features (n, d) and patches (n, 3*p*p), the pixels of the same tokens. projection_init: "pixels", see
        `start_projections`; "features", the same with every direction at full scale; or "random", torch's own.
        codebook_init: "data", see `start_codebook`; or "gaussian", as it was made.
        """
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0) + 1e-6)
        if projection_init != "random":
            minor = 0.1 if projection_init == "pixels" else 1.0
            self.start_projections(self.standardise(features), patches, generator, minor)
        if codebook_init == "data" and not isinstance(self.quantizer, NoQuantizer):
            # Plain patches are many, and a decoder paints them alike whatever the encoder has to say of them. Left with
            # all of them, k-means spends a fifth of the codes there, and those die first once the encoder trains.
            spread = patches.unflatten(1, (3, -1)).std(2).amax(1)  # (n,)
            kept = (spread > 0.01) | (torch.rand(len(spread), generator=generator).to(spread.device) < 0.1)
            if kept.sum() < self.config.codebook_size:
                kept[:] = True  # too few others to start from
            self.quantizer.start(self.project_features(features[kept]), generator)

    def start_projections(self, features, patches, generator, minor=0.1):
        """`--projection-init pixels`: squared distances of z are half those of features, half those of told pixels.

        The nearest code is the one that loses least in this distance, and a distance among semantic features alone
        spends codes on what no pixel shows. What features tell of the pixels of their own patch is read off by least
        squares. Most directions tell next to nothing, but features vary along them more than along the others, and
        would decide which code is the nearest: all but the weightiest third start at a tenth (`minor`) of their scale.
        The way out starts as the pseudo-inverse of the way in without those at a tenth, so that the decoder meets
        features from step 0 on.
        """
        features, patches = features.cpu(), patches.cpu()  # the one device that has all the solvers
        d, e = features.shape[1], self.config.codebook_dim
        ridge = 1e-3 * len(features) * torch.eye(d)
        told = torch.linalg.solve(features.T @ features + ridge, features.T @ (patches - patches.mean(0)))  # (d, 3*p*p)
        told = told * (d / (features @ told).pow(2).sum(1).mean()).sqrt()  # as much variance as the features have
        both = torch.cat([torch.eye(d), told.T]) / math.sqrt(2)  # (d + 3*p*p, d)
        _, scale, directions = torch.linalg.svd(both, full_matrices=False)  # (d,), (d, d)
        rank = min(d, e)  # with fewer dimensions than the encoder's, the weightiest directions stay
        if minor == 1:
            major, axes = rank, nn.init.orthogonal_(torch.empty(e, rank), generator=generator)
        else:  # each direction on an axis of its own: AdamW scales axes one by one, and would stir a mixture up
            major, axes = min(-(-d // 3), e), torch.eye(e, rank)
        axes = axes * scale[:rank]  # (e, rank)
        main = axes[:, :major] @ directions[:major]  # (e, d), at full scale
        rest = axes[:, major:] @ directions[major:rank]  # (e, d), zero where there is no rest
        self.project_in.weight.copy_(main + minor * rest)
        self.project_out.weight.copy_(torch.linalg.pinv(main))  # (d, e)
        nn.init.zeros_(self.project_in.bias)
        nn.init.zeros_(self.project_out.bias)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder):
        """Load what `save_pretrained` wrote, in eval mode; InputError says what is missing or damaged."""
        maker = "--stage 1 makes one, and --stage 2 a better one"
        return load_model(folder, "VQRAE", maker, lambda saved: cls(
            VQRAEConfig(**{**saved, "encoder": ViTConfig(**saved["encoder"])})))


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "Two-Stage Training": the losses. Stage 1, Eq. 2 and Eq. 4
# ----------------------------------------------------------------------------------------------------------------------


def unit(features, dim):
    """Features scaled to length 1 along `dim`; the epsilon under the root keeps the gradient finite at zero."""
    return features * (features.pow(2).sum(dim, keepdim=True) + 1e-8).rsqrt()


class VFMPerceptual(nn.Module):
    """`--perceptual vfm`: L_P as the distance between the frozen encoder's own features of both images.

    Needs no download and no convolution. LPIPS' recipe on tokens: after every block, scale each token to unit length,
    take squared differences; and before the first block, those of the steps between neighbouring pixels, where an eye
    sees noise and seams that a pixel's own value hardly shows. Encoder and decoder share one grid of patches, so a seam
    between two patches of the output would fall between two patches of the encoder, unseen; therefore both images are
    cropped, at one random offset.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, y, generator=None):
        """Originals x, reconstructions y (B, 3, H, W) in [0, 1] -> scalar; `generator` draws the offset."""
        p, window = self.encoder.config.patch_size, [...]
        for size in x.shape[-2:]:
            side = (size // p - 1) * p  # one patch less, so that the window has room to move by a whole one
            start = int(torch.randint(size - side + 1, (), generator=generator))
            window.append(slice(start, start + side))
        window = tuple(window)
        with torch.no_grad():
            targets = list(self.encoder.hidden_states(x[window]))
        states = list(self.encoder.hidden_states(y[window]))
        distances = [(unit(a.float(), -1) - unit(b.float(), -1)).pow(2).sum(-1).mean() for a, b in zip(states, targets)]
        gradients = [(y - x).diff(dim=dim).pow(2).mean() for dim in (-2, -1)]
        return sum(distances) / len(distances) + 2 * sum(gradients)


class PaperPerceptual(nn.Module):
    """`--perceptual lpips-convnext`, the paper's L_P: LPIPS on VGG16 + 0.1 x squared error of ConvNeXt-S logits, / 1.1.

    The weights are torchvision's and are fetched on first use; InputError when that fails. `vgg` (an lpips.LPIPS) and
    `convnext` can be handed in instead.
    """

    def __init__(self, vgg=None, convnext=None):
        super().__init__()
        try:
            if vgg is None:
                import lpips

                vgg = lpips.LPIPS(net="vgg", verbose=False)
            if convnext is None:
                from torchvision.models import ConvNeXt_Small_Weights, convnext_small

                convnext = convnext_small(weights=ConvNeXt_Small_Weights.IMAGENET1K_V1)
        except OSError as error:
            raise InputError(f"the weights of VGG16 and ConvNeXt-S for --perceptual lpips-convnext cannot be fetched "
                             f"({error}); --perceptual vfm needs no download") from None
        self.vgg, self.convnext = vgg.eval().requires_grad_(False), convnext.eval().requires_grad_(False)

    def lpips(self, x, y):
        """LPIPS distance (Zhang et al. 2018) of images (B, 3, H, W) in [0, 1] -> (B,), safe to differentiate."""
        layers = [self.vgg.net(self.vgg.scaling_layer(2 * image - 1)) for image in (x, y)]
        distance = 0
        for a, b, weigh in zip(*layers, self.vgg.lins):
            distance = distance + weigh((unit(a, 1) - unit(b, 1)).pow(2)).mean((1, 2, 3))  # (B,)
        return distance

    def forward(self, x, y, generator=None):
        """Images (B, 3, H, W) in [0, 1] -> scalar; in float32, and `generator` is not used."""
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.float(), y.float()
            mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (ViTConfig.mean, ViTConfig.std))  # ImageNet's
            logits = []
            for image in (x, y):
                image = F.interpolate(image, size=224, mode="bilinear", antialias=True)
                logits.append(self.convnext((image - mean) / std))  # (B, 1000)
            # TiTok divides by the sum of both weights, so that Table 7's weight of 1.1 makes LPIPS + 0.1 x ConvNeXt.
            return (self.lpips(x, y).mean() + 0.1 * F.mse_loss(*logits)) / 1.1


def resize_to(images, like):
    """Images at the height and width of `like`: the decoder's target when q differs from p."""
    if images.shape[-2:] == like.shape[-2:]:
        return images
    return F.interpolate(images, like.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)


def stage1_loss(images, out, perceptual, perceptual_weight=1.1, quantizer_weight=1.0, generator=None):
    """Eq. 4, L_stage1 = l2 + 1.1 L_P + L_quant, and its terms as a dict of scalars.

    Eq. 2's adversarial term is off in stage 1 (Table 7). The target has the decoder's size when q differs from p.
    """
    reconstruction = out.reconstruction.float()
    target = resize_to(images, reconstruction)
    terms = {"mse": F.mse_loss(reconstruction, target)}
    loss = terms["mse"] + quantizer_weight * (out.codebook_loss + out.commitment_loss)
    if perceptual is not None:
        terms["perceptual"] = perceptual(target, reconstruction, generator)
        loss = loss + perceptual_weight * terms["perceptual"]
    return loss, terms | {"codebook": out.codebook_loss, "commitment": out.commitment_loss}


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "Two-Stage Training": the losses. Stage 2, Eq. 5 and Eq. 6, with the adversarial term of Eq. 2
# ----------------------------------------------------------------------------------------------------------------------


def distillation_loss(features, teacher_features):
    """Eq. 5: how far the features Z_I (B, N, d) are from T(X), the frozen teacher's of the same images -> scalar.

    The mean over elements; the sum that Eq. 5 writes would outweigh all other terms by the width of the encoder.
    """
    return F.mse_loss(features.float(), teacher_features.float())


def hinge_loss(real, fake):
    """The discriminator's hinge loss on logits of any shape -> scalar: real ones above 1 and fake ones below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam_penalty(real, fake, real_average, fake_average):
    """LeCam (Tseng et al. 2021): real logits should not rise far above the running average of fake ones, nor fake ones
    fall far below that of real ones. It keeps a discriminator from winning outright when data are few.

    Logits of any shape -> scalar.
    """
    return F.relu(real.mean() - fake_average).pow(2) + F.relu(real_average - fake.mean()).pow(2)


class BlurHalf(nn.Module):
    """Half the size without aliasing: the binomial filter 1 3 3 1 in both directions, every second pixel kept."""

    def __init__(self, channels):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("taps", taps.outer(taps).expand(channels, 1, 4, 4).contiguous(), persistent=False)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(x, self.taps, stride=2, groups=x.shape[1])  # (B, C, ceil(H/2), ceil(W/2))


class Discriminator(nn.Module):
    """The patch discriminator behind Eq. 2's L_G: images (B, 3, H, W) in [0, 1] -> logits (B, 1, 16, 16), high is real.

    The paper leaves it open and says that its code is TiTok's; this is TiTok's: three stages that halve the image with
    a fixed blur, then a 16 x 16 map of logits whatever the image's size. Used in training alone, so its convolutions do
    not make VQRAE a convolutional model. It works in float32, and keeps the averages that LeCam needs.
    """

    def __init__(self, width=128):
        super().__init__()
        layers, channels = [nn.Conv2d(3, width, 5, padding=2), nn.LeakyReLU(0.1)], (width, width, 2 * width, 4 * width)
        for before, after in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, after, 3, padding=1), BlurHalf(after), nn.GroupNorm(32, after),
                       nn.LeakyReLU(0.1)]
        layers += [nn.AdaptiveMaxPool2d(16), nn.Conv2d(after, after, 1), nn.LeakyReLU(0.1),
                   nn.Conv2d(after, 1, 5, padding=2)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            return self.layers(images.float())  # (B, 1, 16, 16)

    def loss(self, real, fake, lecam_weight=0.001, decay=0.999, over_ranks=lambda means: None):
        """What the discriminator minimises on originals and reconstructions, hinge + LeCam, and a dict of scalars.

        LeCam looks at the mean logits of a whole batch. When several processes share a batch, `over_ranks` replaces
        each tensor of a list by its mean over the processes.
        """
        real, fake = self(real), self(fake.detach())  # (B, 1, 16, 16)
        hinge, means = hinge_loss(real, fake), [real.mean(), fake.mean()]
        whole = [mean.detach().clone() for mean in means]  # of the batch, where `means` are of this process' share
        over_ranks(whole)
        # The whole batch's value with this share's gradient; those of all processes are averaged later.
        real_mean, fake_mean = (mean + (all_of_it - mean).detach() for mean, all_of_it in zip(means, whole))
        lecam = lecam_penalty(real_mean, fake_mean, self.real_average, self.fake_average)
        with torch.no_grad():  # after use, so that a batch is compared with those before it
            self.real_average.lerp_(whole[0], 1 - decay)
            self.fake_average.lerp_(whole[1], 1 - decay)
        return hinge + lecam_weight * lecam, {"hinge": hinge, "real_logit": means[0], "fake_logit": means[1]}


def stage2_loss(images, out, perceptual, perceptual_weight=1.1, quantizer_weight=1.0, generator=None,
                teacher_features=None, distillation_weight=1.0, discriminator=None, adversarial_weight=0.1):
    """Eq. 6, L_stage2 = l2 + 1.1 L_P + 0.1 L_G + L_quant + L_distill, and its terms as a dict of scalars.

    Stage 1's loss plus what is given: `teacher_features` for the distillation, and once its time has come the
    `discriminator`, whose verdict on the reconstruction is L_G = -mean D(X').
    """
    loss, terms = stage1_loss(images, out, perceptual, perceptual_weight, quantizer_weight, generator)
    if teacher_features is not None:
        terms["distillation"] = distillation_loss(out.features, teacher_features)
        loss = loss + distillation_weight * terms["distillation"]
    if discriminator is not None:
        discriminator.requires_grad_(False)  # this step is the tokenizer's; the discriminator has its own
        terms["adversarial"] = -discriminator(out.reconstruction).mean()
        discriminator.requires_grad_(True)
        loss = loss + adversarial_weight * terms["adversarial"]
    return loss, terms


# ----------------------------------------------------------------------------------------------------------------------
# Sections 3.4 and 3.5: one language model for both, Qwen3's transformer over text and visual codes
# ----------------------------------------------------------------------------------------------------------------------

# The first stands between a text and its image, the second behind a text; Qwen3's own tokenizer.json has both names.
START_OF_IMAGE, END_OF_TEXT = "<|vision_start|>", "<|endoftext|>"


def train_text_tokenizer(texts, size):
    """A byte-pair tokenizer of up to `size` tokens, for any text; it ignores case, and an article at the beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("’", "'"), normalizers.Strip(),
        normalizers.Replace(Regex("^(a|an|the) "), "")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT, START_OF_IMAGE], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


@dataclass
class LMConfig:
    """Sizes of a Qwen3 transformer, and how many visual codes follow its text tokens in the vocabulary."""

    text_vocabulary: int  # rows of the text embedding; code k is token text_vocabulary + k
    codebook_size: int  # K
    width: int
    depth: int
    heads: int
    kv_heads: int  # several query heads share a key and value head
    head_width: int
    mlp_width: int
    image_tokens: int = 0  # N, the codes of a whole image
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_fields(self, ("text_vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width"))
        if self.heads % self.kv_heads or self.head_width % 2:
            raise InputError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}, and head_width "
                             f"{self.head_width} even")


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2) over the last dimension, in float32, times a learned weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


def rotate(x, turn):
    """Rotary positions: x (..., n, h), its channel j turned with channel j + h/2 by an angle.

    turn (2, n, h): the cosines of the angles, twice each, and their sines, first negative and then positive.
    """
    y = x.float()
    return (y * turn[0] + y.roll(y.shape[-1] // 2, dims=-1) * turn[1]).to(x.dtype)


class KeyValueCache:
    """Keys and values of all earlier tokens, for every layer, in memory that is allocated once."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.depth, 2, batch, config.kv_heads, length, config.head_width)
        self.memory, self.length = torch.zeros(shape, device=device, dtype=dtype), 0

    def extend(self, layer, k, v):
        """Store k and v (B, kv_heads, n, h) behind what is there; return all of them (B, kv_heads, length + n, h)."""
        end = self.length + k.shape[2]
        if end > self.memory.shape[4]:
            raise InputError(f"a sequence of {end} tokens does not fit a cache of {self.memory.shape[4]}")
        for slot, new in enumerate((k, v)):
            self.memory[layer, slot, :, :, self.length:end] = new
        return self.memory[layer, 0, :, :, :end], self.memory[layer, 1, :, :, :end]


# `few_rows`, Product, `products` and `VisualLM.quick_products` only make generation faster. On a first reading take
# Product for an nn.Linear without bias, and `products(x, a, b)` for [a(x), b(x)].


def few_rows(weight):
    """x -> x W^T with W (out, in), for an x of few rows, such as one token's: twice as fast as torch on a CPU.

    Torch's product is made for many rows; here oneDNN first rearranges a copy of W, once, into the layout it needs.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight)
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.contiguous(), ordered, None, "none", [], "")


class Product(nn.Linear):
    """x W^T, see `products`."""

    laid_out = None  # during generation: a dict, from a tuple of layers to what `few_rows` makes of their weights

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return products(x, self)[0]


def products(x, *layers):
    """x W^T of every one of the Products `layers`; during generation as one product of all, by `few_rows`."""
    laid_out = layers[0].laid_out
    if laid_out is None:
        return [F.linear(x, layer.weight) for layer in layers]
    if layers not in laid_out:
        laid_out[layers] = few_rows(torch.cat([layer.weight for layer in layers]))
    return laid_out[layers](x).split([layer.out_features for layer in layers], dim=-1)


class CausalAttention(nn.Module):
    """Qwen3's attention: grouped queries, RMSNorm on every head of q and k before the rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        h, d = config.head_width, config.width
        self.q, self.k, self.v = (Product(d, heads * h) for heads in (config.heads, config.kv_heads, config.kv_heads))
        self.out = Product(config.heads * h, d)
        self.q_norm, self.k_norm = RMSNorm(h, config.norm_eps), RMSNorm(h, config.norm_eps)

    def forward(self, x, turn, mask, cache=None, layer=0):
        """x (B, n, d) -> (B, n, d). turn: see `rotate`; mask: see `attend`; layer: which part of the cache is ours."""
        B, n, _ = x.shape
        h = self.config.head_width
        q, k, v = (y.view(B, n, -1, h) for y in products(x, self.q, self.k, self.v))  # each (B, n, its heads, h)
        q = rotate(self.q_norm(q).transpose(1, 2), turn)  # (B, heads, n, h)
        k = rotate(self.k_norm(k).transpose(1, 2), turn)  # (B, kv_heads, n, h)
        v = v.transpose(1, 2)  # (B, kv_heads, n, h)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, kv_heads, m, h), m = tokens so far
        x = attend(q, k, v, mask)  # (B, heads, n, h)
        return self.out(x.transpose(1, 2).reshape(B, n, -1))  # (B, n, d)


class CausalBlock(nn.Module):
    """Qwen3's block: attention and a SwiGLU MLP, each behind an RMSNorm, (B, n, d) -> (B, n, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        self.norm1, self.attention = RMSNorm(d, config.norm_eps), CausalAttention(config)
        self.norm2 = RMSNorm(d, config.norm_eps)
        self.gate, self.up = Product(d, config.mlp_width), Product(d, config.mlp_width)
        self.down = Product(config.mlp_width, d)

    def forward(self, x, *where):  # turn, mask, cache and layer of CausalAttention
        x = x + self.attention(self.norm1(x), *where)  # (B, n, d)
        gate, up = products(self.norm2(x), self.gate, self.up)  # (B, n, mlp_width)
        return x + self.down(F.silu(gate) * up)  # (B, n, d)


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one of K by logits (B, K) -> (B,), among the top_k likeliest (0: all) and the fewest that make up top_p."""
    if temperature < 1e-6:  # divided by less, logits would be no numbers
        return logits.argmax(1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(1).sort(dim=1, descending=True)
        drop = ordered.cumsum(1) - ordered >= top_p  # what stands before it is enough already
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    draw = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)[:, 0]  # on the CPU: one seed, one picture
    return draw.to(logits.device)


class VisualLM(nn.Module):
    """Text and visual tokens in one vocabulary, predicted from left to right: tokens (B, n) -> logits (B, n, V + K)."""

    Config = LMConfig

    def __init__(self, config, text=None):
        super().__init__()
        self.config = config
        self.text = text  # the tokenizers.Tokenizer of its text; None when only tokens come and go
        self.stamp, self.laid_out = None, {}  # of `quick_products`
        self.embedding = nn.Embedding(config.text_vocabulary + config.codebook_size, config.width)  # also the head
        self.blocks = nn.ModuleList([CausalBlock(config) for _ in range(config.depth)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def transform(self, x, first=None, cache=None):
        """What the blocks make of embedded tokens (B, n, d) -> (B, n, d), each seeing those to its left.

        first (B,): where each sequence begins; what stands to the left of it is padding and seen by nobody. With a
        `cache`, the tokens stand behind those that it holds, which need not be given again.
        """
        n, done = x.shape[1], cache.length if cache is not None else 0
        h = self.config.head_width
        frequency = self.config.rope_theta ** -(torch.arange(0, h, 2, device=x.device).float() / h)  # (h/2,)
        position = torch.arange(done, done + n, device=x.device)  # (n,)
        angle = position[:, None] * frequency  # (n, h/2)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)])  # (2, n, h), for `rotate`
        past = torch.arange(done + n, device=x.device)  # (m,), positions of all keys, those of x included
        visible = (past <= position[:, None])[None, None]  # (1, 1, n, m)
        if first is not None:
            visible = visible & (past >= first[:, None])[:, None, None]  # (B, 1, n, m)
            visible = visible | (past == position[:, None])  # padding sees itself: a softmax of nothing is no number
        mask = mask_of(visible, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, mask, cache, layer)  # (B, n, d)
        if cache is not None:
            cache.length += n
        return self.norm(x)

    def forward(self, tokens, first=None, cache=None):
        """Logits (B, n, V + K) of what follows each of the tokens (B, n); `first` and `cache` as in `transform`."""
        return self.transform(self.embedding(tokens), first, cache) @ self.embedding.weight.T

    def loss(self, tokens, first=None, seen=None):
        """Mean cross-entropy of the visual tokens among tokens (B, n) given all before them; text is only read.

        The paper trains "exclusively on visual tokens". The softmax is over the whole vocabulary, as text and codes
        share it. seen (B, n): what is read in the place of the tokens, see `misread`.
        """
        x = self.transform(self.embedding((tokens if seen is None else seen)[:, :-1]), first)  # (B, n - 1, d)
        targets = tokens[:, 1:]  # (B, n - 1)
        visual = targets >= self.config.text_vocabulary
        return F.cross_entropy((x[visual] @ self.embedding.weight.T).float(), targets[visual])

    def prompt(self, caption):
        """The tokens that an image's codes follow: those of its caption, "" for none, and the start of the image."""
        return self.text.encode(caption, add_special_tokens=False).ids + [self.text.token_to_id(START_OF_IMAGE)]

    def pack(self, prompts, codes=None):
        """Prompts, B lists of token ids, and codes (B, N) behind them -> tokens (B, n), and `first` (B,).

        Prompts are padded on the left, so that images begin in one column.
        """
        longest, device = max(map(len, prompts)), self.embedding.weight.device
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        if codes is not None:
            tokens = torch.cat([tokens, codes.to(device) + self.config.text_vocabulary], dim=1)
        return tokens, torch.tensor([longest - len(prompt) for prompt in prompts], device=device)

    def generate(self, text, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, seed=0, progress=iter):
        """Draw an image for each caption of the list `text`, "" for no caption -> codes (B, N), for `VQRAE.decode`.

        The options are those of `extend`; the same seed and captions draw the same codes.
        """
        prompts = [self.prompt(caption) for caption in text]
        return self.extend(prompts, self.config.image_tokens, self.prompt(""), cfg_scale, temperature, top_k, top_p,
                           torch.Generator().manual_seed(seed), progress)

    @torch.inference_mode()
    def extend(self, prompts, count, without=None, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None,
               progress=iter):
        """Continue every prompt, a list of token ids, by `count` visual tokens -> codes (B, count) in [0, K).

        Classifier-free guidance: with `cfg_scale` other than 1, logits are those of the prompt `without` its caption
        plus cfg_scale times the difference that the caption makes. temperature 0 takes the likeliest code.
        `progress` wraps the range of steps, as tqdm does.
        """
        V, guided = self.config.text_vocabulary, cfg_scale != 1 and without is not None
        tokens, first = self.pack(list(prompts) + [without] * (len(prompts) if guided else 0))  # (B or 2B, n)
        weight = self.embedding.weight
        cache = KeyValueCache(self.config, len(tokens), tokens.shape[1] + count, weight.device, weight.dtype)
        codes = []

        def pick(logits):  # (B or 2B, K) -> (B,)
            if guided:
                with_caption, without_caption = logits.chunk(2)
                logits = without_caption + cfg_scale * (with_caption - without_caption)
            return choose(logits, temperature, top_k, top_p, generator)

        with self.quick_products() as head:
            for _ in progress(range(count)):
                x = self.transform(self.embedding(tokens), first, cache)[:, -1]  # (B or 2B, d)
                codes.append(self.draw(x, head, pick))  # (B,)
                tokens = torch.cat([V + codes[-1]] * (2 if guided else 1))[:, None]  # (B or 2B, 1)
        return torch.stack(codes, dim=1)  # (B, count)

    def draw(self, x, head, pick):  # a method of its own, for in unitok.py a place has several codes
        """The codes (B,) that `pick` takes by the logits of what follows x (B or 2B, d): only codes may follow."""
        return pick(head(x).float())

    def _apply(self, *args, **kwargs):  # of nn.Module: moves the weights, or changes their type
        self.stamp = None
        return super()._apply(*args, **kwargs)

    @contextmanager
    def quick_products(self):
        """Inside, products are those of `few_rows`; yields the head's: (B, d) -> logits of codes (B, K).

        The rearranged weights are kept for the next image until a weight changes. What tells is a weight's address and
        `_version`, autograd's counter of changes in place, which misses those made through `.data`; weights made in
        inference mode have no counter, and theirs are rearranged anew every time.
        """
        stamp = [None if weight.is_inference() else (weight.data_ptr(), weight._version)
                 for weight in self.parameters()]
        if stamp != self.stamp or None in stamp:
            self.stamp, self.laid_out = stamp, {}
        layers = [module for module in self.modules() if isinstance(module, Product)]
        for layer in layers:
            layer.laid_out = self.laid_out
        try:
            if "head" not in self.laid_out:
                self.laid_out["head"] = few_rows(self.embedding.weight[self.config.text_vocabulary:])
            yield self.laid_out["head"]
        finally:
            for layer in layers:
                layer.laid_out = None

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors and tokenizer.json."""
        save_model(self, folder)
        self.text.save(str(Path(folder) / "tokenizer.json"))

    @classmethod
    def from_pretrained(cls, folder):
        """Load what `save_pretrained` wrote, in eval mode; InputError says what is missing or damaged."""
        model = load_model(folder, cls.__name__, "--stage ar makes one", lambda saved: cls(cls.Config(**saved)))
        model.text = load_text_tokenizer(Path(folder) / "tokenizer.json", model.config.text_vocabulary)
        return model


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.4, "Multimodal Understanding with VQRAE": it reads continuous features and writes text
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class CaptionerConfig:
    """Sizes of a Captioner: the encoder's, and those of a VisualLM that has no codes."""

    encoder: ViTConfig
    image_size: int  # side of the images it was trained on
    lm: LMConfig

    def __post_init__(self):
        check_fields(self, ("image_size",))


class Captioner(nn.Module):
    """A language model that reads an image's features Z_I in the place of words and continues with its caption.

    The paper puts its encoder into ready ones (LLaVA-1.5, InternVL3); this is one small enough to be trained here.
    """

    def __init__(self, config, text=None):
        super().__init__()
        self.config = config
        d = config.lm.width
        self.encoder = Encoder(config.encoder)
        self.projector = nn.Sequential(nn.Linear(config.encoder.width, d), nn.GELU(), nn.Linear(d, d))  # mlp2x_gelu
        self.lm = VisualLM(config.lm, text)

    def read(self, features):
        """Features (B, N, d of the encoder) -> what the transformer meets before the text (B, N + 1, d)."""
        start = self.lm.embedding.weight[self.lm.text.token_to_id(START_OF_IMAGE)]  # (d,)
        return torch.cat([start.expand(len(features), 1, -1), self.projector(features)], dim=1)

    def tokens(self, caption):
        """A caption as the tokens that are to be written, its end included."""
        end = self.lm.text.token_to_id(END_OF_TEXT)
        return self.lm.text.encode(caption, add_special_tokens=False).ids + [end]

    def loss(self, images, captions):
        """Mean cross-entropy of the tokens of the captions, and of the end of each, given the images."""
        with torch.no_grad():
            features = self.encoder(images)  # (B, N, d of the encoder), frozen
        x = self.read(features)  # (B, N + 1, d)
        texts = [self.tokens(caption) for caption in captions]
        longest = max(map(len, texts))
        tokens = torch.tensor([text + [-1] * (longest - len(text)) for text in texts], device=x.device)  # (B, n)
        x = torch.cat([x, self.lm.embedding(tokens[:, :-1].clamp(min=0))], dim=1)  # (B, N + n, d)
        x = self.lm.transform(x)[:, -longest:]  # (B, n, d): from the image's last token to the text's last but one
        told = tokens >= 0
        return F.cross_entropy((x[told] @ self.lm.embedding.weight.T).float(), tokens[told])

    @torch.no_grad()
    def caption(self, images, most=80):
        """Texts of images (B, 3, H, W), always the likeliest next token -> B strings of up to `most` tokens."""
        x, end = self.read(self.encoder(images)), self.lm.text.token_to_id(END_OF_TEXT)  # (B, N + 1, d)
        cache = KeyValueCache(self.config.lm, len(x), x.shape[1] + most, x.device, x.dtype)
        tokens = []
        for _ in range(most):
            logits = self.lm.transform(x, cache=cache)[:, -1] @ self.lm.embedding.weight.T  # (B, V)
            tokens.append(logits.argmax(1))  # (B,)
            x = self.lm.embedding(tokens[-1])[:, None]  # (B, 1, d)
            if (torch.stack(tokens) == end).any(0).all():  # every text has ended
                break
        rows = torch.stack(tokens, dim=1).tolist()
        return [self.lm.text.decode(row[:row.index(end)] if end in row else row).strip() for row in rows]

    def save_pretrained(self, folder):
        """Write config.json, model.safetensors (the encoder included) and tokenizer.json."""
        save_model(self, folder)
        self.lm.text.save(str(Path(folder) / "tokenizer.json"))

    @classmethod
    def from_pretrained(cls, folder):
        """Load what `save_pretrained` wrote, in eval mode; InputError says what is missing or damaged."""
        model = load_model(folder, "Captioner", "--stage caption makes one", lambda saved: cls(
            CaptionerConfig(ViTConfig(**saved["encoder"]), saved["image_size"], LMConfig(**saved["lm"]))))
        model.lm.text = load_text_tokenizer(Path(folder) / "tokenizer.json", model.config.lm.text_vocabulary)
        return model


def text_of(record):
    """What a Captioner is to say of an image: its category and its caption, or what there is of the two."""
    return ": ".join(filter(None, [record.get("category", "").replace("_", " "), record.get("caption")]))


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.5, "Visual Generation with VQRAE": it reads text and writes codes; how it is trained and asked
# ----------------------------------------------------------------------------------------------------------------------

# The default sampling, chosen by measurement for the tiny preset: a higher temperature makes pictures more varied and
# less like what was asked for; the likeliest codes alone leave some pages blank.
SAMPLING = {"cfg_scale": 1.25, "temperature": 0.2}


def misread(codes, most, generator):
    """Codes (B, N) with some replaced by other codes of the batch: in each image its own share, up to `most`.

    An image of a small set is known by its first codes. A transformer that reads them as they are may learn to go on
    from there, by heart, and have no use for the caption; once it writes, its first slip leads it to another image or
    to none. One that may not trust what it reads learns what the caption says about every place.
    """
    share = most * torch.rand(len(codes), 1, generator=generator)  # (B, 1)
    others = codes.flatten()[torch.randperm(codes.numel(), generator=generator)].view_as(codes)  # (B, N)
    return torch.where(torch.rand(codes.shape, generator=generator) < share, others, codes)


def caption_of(record, style=True):
    """The words that ask for an image: its style, if wanted, and its caption or else its class; "" if it has none."""
    words = record.get("caption") or record.get("category", "").replace("_", " ")
    return f"{record['style']} {words}" if style and "style" in record else words


# Averages over the emoji called so: the hue, in turns of the colour wheel, and the largest less the smallest of red,
# green and blue, out of 255.
COLOURS = {"red": (0.99, 158), "orange": (0.08, 199), "yellow": (0.13, 169), "green": (0.27, 102),
           "blue": (0.57, 155), "purple": (0.76, 105)}


def turn_colour(image, old, new):
    """An image (1, 3, H, W) uint8, its hue turned from `old` to `new`, two of COLOURS, and as strong as `new` is."""
    turn = COLOURS[new][0] - COLOURS[old][0]
    image = pixels.adjust_hue(image, (turn + 0.5) % 1 - 0.5)
    spread = (image.amax(1) - image.amin(1)).float()  # (1, H, W)
    strength = spread[spread > 40].mean().item()  # nan where all is grey, of which the max below makes 1
    return pixels.adjust_saturation(image, max(1.0, COLOURS[new][1] / strength))


@torch.no_grad()
def recolour(model, images, places, device="cpu"):
    """Images of an ImageSet in colours other than their own, as codes (n, N) and records: a green apple as "red apple".

    Taken are the images at `places` whose caption begins with one of COLOURS, in each other colour unless an image
    there already has that caption. In a small set a colour is seen on a few things only, and its word comes to mean
    those things.
    """
    records = [images.records[place] for place in places]
    known, codes, found = {caption_of(record) for record in records}, [], []
    for place, record in zip(places, records):
        colour, _, thing = record.get("caption", "").partition(" ")
        if colour not in COLOURS or not thing:
            continue
        [image] = images.batches([place], 1)  # (1, 3, H, W)
        for other in COLOURS:
            new = {**record, "caption": f"{other} {thing}"}
            if caption_of(new) not in known:
                known.add(caption_of(new))
                found.append(new)
                turned = turn_colour(image, colour, other)
                codes.append(model.encode(turned.to(device).float() / 255)[1].cpu())
    return torch.cat(codes) if codes else None, found


# ----------------------------------------------------------------------------------------------------------------------
# Section 4.1: metrics
# ----------------------------------------------------------------------------------------------------------------------


def eight_bits(images):
    """Images clamped to [0, 1] and rounded to the 256 levels that a file can hold."""
    return (images.clamp(0, 1) * 255).round() / 255


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (x - y).pow(2).mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x, y, window=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1], Gaussian window -> (B,).

    Raises InputError when a side of the images is smaller than the window.
    """
    if min(x.shape[-2:]) < window:
        raise InputError(f"SSIM needs images of at least {window} x {window} pixels")
    offset = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    weight = torch.exp(-offset.pow(2) / (2 * sigma**2))
    weight = weight / weight.sum()

    def blur(image):
        image = image.flatten(0, 1)[:, None]  # (3B, 1, H, W)
        image = F.conv2d(F.conv2d(image, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
        return image.unflatten(0, (-1, x.shape[1]))[:, :, 0]  # (B, 3, H - 10, W - 10)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))


def seam_errors(x, y, patch_size):
    """Squared error of the steps between neighbouring pixels of y, at the seams of patches and elsewhere -> (B,), (B,).

    Images x (the truth) and y (B, 3, H, W). Without a visible grid of patches the two are alike.
    """
    seams, elsewhere = 0, 0
    for error in (y - x, (y - x).transpose(-2, -1)):
        steps = error.diff(dim=-1).pow(2).mean((1, 2))  # (B, W - 1)
        at_seam = torch.arange(1, steps.shape[1] + 1, device=x.device) % patch_size == 0
        seams, elsewhere = seams + steps[:, at_seam].mean(1), elsewhere + steps[:, ~at_seam].mean(1)
    return seams, elsewhere


def codebook_usage(counts):
    """How often each code was chosen (K,) -> utilization in [0, 1] and perplexity in [1, K], as floats.

    Utilization is the share of codes chosen at least once; perplexity, exp of the entropy of the choices, is the number
    of codes that would be as hard to guess if all were equally frequent.
    """
    counts = counts.cpu().double()
    share = counts / counts.sum().clamp(min=1)
    return (counts > 0).double().mean().item(), torch.special.entr(share).sum().exp().item()


def frechet_distance(x, y):
    """Frechet distance between Gaussians fitted to two sets of feature vectors (n, d), (m, d) -> float.

    On Inception features this is the FID; on any other encoder's features it is not, and must be named after it.
    """
    x, y = x.double(), y.double()
    # tr sqrt(A B) is the sum of the roots of the eigenvalues of the symmetric sqrt(A) B sqrt(A).
    cov_x, cov_y = x.T.cov(), y.T.cov()  # (d, d)
    values, vectors = torch.linalg.eigh(cov_x)  # (d,), (d, d)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (d, d)
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).pow(2).sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return distance.item()


@torch.enable_grad()  # `understanding` calls it under no_grad
def linear_probe(train_features, train_labels, tests, test_labels, strengths=(0.001, 0.01, 0.1)):
    """Multinomial logistic regression on standardised features (n, d) -> its accuracy in [0, 1] on each of `tests`.

    `tests` is a list of features (m, d), several encoders' of the same m images: the probe is fitted once and applied
    to all of them unchanged. `strengths` are values of C, the weight of the data against half the squared norm of the
    weights; the one that is best for the first of `tests` counts, as for the figures in the README. The problem is
    convex, so the answer does not depend on a seed.
    """
    mean, std = train_features.double().mean(0), train_features.double().std(0) + 1e-6
    train, tests = (train_features.double() - mean) / std, [(test.double() - mean) / std for test in tests]
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    accuracies = []
    for C in strengths:  # from the strongest regularisation on, each solution is the start of the next
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = train @ weight.T + bias  # (n, classes)
            loss = F.cross_entropy(logits, train_labels) + weight.pow(2).sum() / (2 * C * len(train))
            loss.backward()
            return loss

        optimizer.step(closure)
        guesses = [(test @ weight.T + bias).argmax(1) for test in tests]  # (m,) each
        accuracies.append([(guess == test_labels).double().mean().item() for guess in guesses])
    return max(accuracies, key=lambda accuracy: accuracy[0])


def nearest_neighbours(train_features, train_labels, test_features, test_labels, k=10):
    """Accuracy in [0, 1] on features (m, d) of the vote of their k most similar training features (n, d), in cosine."""
    similarity = F.normalize(test_features.float(), dim=1) @ F.normalize(train_features.float(), dim=1).T  # (m, n)
    similarity, index = similarity.topk(min(k, len(train_features)), dim=1)  # (m, k)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = torch.zeros(len(test_features), classes).scatter_add_(1, train_labels[index], similarity)  # (m, classes)
    return (votes.argmax(1) == test_labels).double().mean().item()


@torch.no_grad()
def understanding(model, teacher, train_images, test_images, batch_size=64, device="cpu", workers=0,
                  keys=("category", "subcategory")):
    """What can be read off the features: {"teacher", "continuous", "discrete"} -> {measure: value}.

    continuous: the model's Z_I; discrete: the features that its codes stand for, if it has codes; both, and the frozen
    teacher's, as the mean over an image's tokens. For those of the `keys` that the records of the two ImageSets have:
    NAME_transfer is the accuracy of a probe fitted to the teacher's training features and applied unchanged (Section
    3.4: the language model is not trained for the tokenizer), NAME_probe that of one fitted to these features,
    NAME_neighbours that of 10 nearest neighbours. cosine is the mean similarity of a token to the teacher's. Empty
    when there are fewer than two labels.
    """
    names = {}
    for key in keys:
        labels = [record.get(key, "") for images in (train_images, test_images) for record in images.records]
        if len(set(labels)) > 1:
            values = sorted(set(labels))
            names[key] = torch.tensor([values.index(label) for label in labels]).split(
                [len(train_images), len(test_images)])  # (n,), (m,)
    if not names:
        return {}
    pooled, cosines = {}, {}
    for images in (train_images, test_images):
        for x in images.views(batch_size, device, workers):
            features = {"teacher": teacher(x), "continuous": model.encoder(x)}
            z_q, indices, _, _ = model.quantizer(model.project_features(features["continuous"]))
            if indices is not None:
                features["discrete"] = model.features_of(z_q)
            for name, tokens in features.items():  # (B, N, d)
                pooled.setdefault(name, []).append(tokens.mean(1).cpu())
                if images is test_images:
                    cosine = F.cosine_similarity(tokens, features["teacher"], dim=-1)  # (B, N)
                    cosines.setdefault(name, []).append(cosine.mean(1).cpu())
    pooled = {name: torch.cat(parts).split([len(train_images), len(test_images)]) for name, parts in pooled.items()}
    result = {name: {} for name in pooled}
    for key, (train_labels, test_labels) in names.items():
        tests = [test for _, test in pooled.values()]
        transferred = linear_probe(pooled["teacher"][0], train_labels, tests, test_labels)
        for (name, (train, test)), transfer in zip(pooled.items(), transferred):
            result[name][f"{key}_transfer"] = transfer
            result[name][f"{key}_probe"] = (transfer if name == "teacher" else
                                            linear_probe(train, train_labels, [test], test_labels)[0])
            result[name][f"{key}_neighbours"] = nearest_neighbours(train, train_labels, test, test_labels)
    for name, values in cosines.items():
        result[name]["cosine"] = torch.cat(values).double().mean().item()
    return result


@torch.no_grad()
def evaluate(model, images, batch_size=64, device="cpu", workers=0, frechet_encoder=None, lpips=None,
             frechet_size=None):
    """Reconstruct every image of an ImageSet and return the metrics, averaged over images, as a dict of numbers.

    psnr, ssim, and seam_ratio, `seam_errors` at seams over those elsewhere (1: no visible grid). With a codebook also
    utilization, perplexity and tokens of this one pass. With `frechet_encoder`, the Frechet distance between its mean
    patch features of originals and reconstructions, shown to it with sides of `frechet_size` pixels or its own. With
    `lpips`, a function of two batches -> (B,), its mean.
    """
    scores, features, seams = {"psnr": [], "ssim": []}, ([], []), []
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for x in images.views(batch_size, device, workers):
        out = model(x)
        y = eight_bits(out.reconstruction)
        x = resize_to(x, y)
        scores["psnr"].append(psnr(x, y).cpu())
        scores["ssim"].append(ssim(x, y).cpu())
        seams.append(torch.stack(seam_errors(x, y, model.config.output_patch_size)).cpu())
        if lpips is not None:
            scores.setdefault("lpips", []).append(lpips(x, y).cpu())
        if frechet_encoder is not None:
            for side, part in zip(features, (x, y)):
                side.append(pooled_features(frechet_encoder, [part], frechet_size))
        if out.indices is not None:
            counts += model.count(out.indices).cpu()
    result = {name: torch.cat(values).double().mean().item() for name, values in scores.items()}
    across, elsewhere = torch.cat(seams, dim=1).double().mean(1)
    if (across / elsewhere).isfinite():  # there are seams and there is an elsewhere
        result["seam_ratio"] = (across / elsewhere).item()
    if frechet_encoder is not None and len(images) > 1:
        result["frechet"] = frechet_distance(*map(torch.cat, features))
    if counts.sum():
        utilization, perplexity = codebook_usage(counts)
        result.update(utilization=utilization, perplexity=perplexity, tokens=int(counts.sum()))
    return {"images": sum(map(len, scores["psnr"])), **result}


@torch.no_grad()
def pooled_features(encoder, images, side=None):
    """Mean patch features (n, d) on the CPU of an iterable of float batches (B, 3, H, W) in [0, 1].

    Images are resized to `side` pixels, or to those that the encoder was trained with.
    """
    side, device = side or encoder.config.image_size, next(encoder.parameters()).device
    return torch.cat([encoder(F.interpolate(x.to(device), (side, side), mode="bicubic", antialias=True)).mean(1).cpu()
                      for x in images])


def nearest(features, gallery):
    """The most similar, in cosine, of the gallery's vectors (n, d) to each of the features (m, d) -> (m,).

    Channels are standardised over the gallery, for pooled features of all images have much in common.
    """
    mean, std = gallery.mean(0), gallery.std(0) + 1e-6
    return (F.normalize((features - mean) / std, dim=1) @ F.normalize((gallery - mean) / std, dim=1).T).argmax(1)


def retrieval(found, records):
    """Shares of pictures whose nearest real image, a record of `found`, shows what was asked for, one of `records`.

    name (the same picture, of any style), category and subcategory, as far as the records have them and differ in them.
    """
    return {key: sum(a.get(key) == b.get(key) for a, b in zip(found, records)) / len(records)
            for key in ("name", "category", "subcategory") if any(record.get(key) for record in found + records)}


def caption_accuracy(captioner, images, batch_size=64, device="cpu", workers=0):
    """Shares of an ImageSet's images whose caption the captioner writes exactly, and whose category."""
    text, right = captioner.lm.text, {"exact": 0, "category": 0}
    for batch, places in images.batches(range(len(images)), batch_size, workers, indices=True):
        for said, place in zip(captioner.caption(batch.to(device).float() / 255), places):
            wanted = text.decode(text.encode(text_of(images.records[place])).ids).strip()  # as the tokenizer spells it
            right["exact"] += said == wanted
            right["category"] += said.split(": ")[0] == wanted.split(": ")[0]
    return {name: count / len(images) for name, count in right.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Image data
# ----------------------------------------------------------------------------------------------------------------------


def read_image(path, file=None):
    """Any image file as an upright 8-bit RGB PIL image, transparency on white; InputError when it is unreadable.

    With `file`, an open one, the path is only its name.
    """
    try:
        with Image.open(file or path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits instead of scaling it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if max(image.size) > 1000 * min(image.size):  # resized, it would have no end
                raise ValueError(f"{image.width} x {image.height} pixels are hardly more than a line")
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders raise a dozen types for bytes that are not an image
        raise InputError(f"cannot read {path} as an image: {(str(error) or type(error).__name__).splitlines()[0]}"
                         ) from None


@functools.cache
def find_images(folder):
    """Sorted paths of the image files below a folder; files that are none are counted and named once on stderr.

    A folder is listed once per process: both splits of a run come from one list.
    """
    found, skipped = [], []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(directory, name) for name in sorted(files) if not name.startswith(".")):
            try:
                if path.is_file():  # a pipe would be waited for
                    Image.open(path).close()  # reads the header only, so a large folder is listed quickly
                    found.append(str(path))
            except Exception:
                skipped.append(path)
    if skipped:
        names = ", ".join([str(path.relative_to(folder)) for path in skipped[:10]] + ["..."] * (len(skipped) > 10))
        print(f"skipped {len(skipped)} files in {folder} that are not images: {names}", file=sys.stderr)
    return found


def held_out(count):
    """Which of `count` images to validate on where the data do not say: a fixed random twentieth, at least one."""
    return set(np.random.RandomState(0).permutation(count)[:max(1, count // 20)].tolist()) if count > 1 else set()


class ImageSet(torch.utils.data.Dataset):
    """The images of one split as uint8 tensors (3, size, size), read one at a time when they are asked for.

    `folder` is one of our sets (index.json and sheets of tiles, held in memory), or any folder of images, flat or with
    one folder per class, or of tar shards (what data/imagenet/prepare.py packs, or anyone's in WebDataset's layout), or
    names such shards (shards-{000..009}.tar). A folder with train/ and val/ is split so; of any other every twentieth
    image, in a fixed random order, is held out (a single image is both splits). `split` is "train", "val" or "all".

    Keys: an int gives the evaluation view (shorter side resized, centre crop), a pair (int, seed) the training view
    (random crop, random flip) that this seed stands for. A readable neighbour stands in for an unreadable file, so
    every item comes with its own index, and with the names of files found unreadable on the way.
    """

    def __init__(self, folder, split, size):
        self.folder, self.size, self.unreadable = Path(folder), size, set()
        if not self.folder.is_dir() and self.folder.suffix != ".tar":
            raise InputError(f"no images at {folder}: it is not a folder")
        index = self.folder / "index.json"
        index = read_json(index) if index.exists() else None
        self.from_sheets = isinstance(index, dict) and "sheets" in index
        if self.from_sheets:
            self.read_sheets(index["sheets"], split)
        else:
            self.sources = self.find_files(split)
        if not self.sources:
            raise InputError(f"no images at {folder}: the {split} split is empty")

    def read_sheets(self, sheets, split):
        self.sources, self.sheet_records = [], []
        try:
            for sheet in sheets:
                canvas, side = np.asarray(read_image(self.folder / sheet["file"])), sheet["tile"]
                columns = canvas.shape[1] // side
                for i, record in enumerate(sheet["images"]):
                    record = {"style": sheet["style"], **record}
                    top, left = i // columns * side, i % columns * side
                    if not all(isinstance(value, str) for value in record.values()) or top + side > len(canvas):
                        raise ValueError(f"image {i} of {sheet['file']} has no place there or is not described")
                    if split in ("all", record["split"]):
                        self.sources.append(canvas[top:top + side, left:left + side])
                        self.sheet_records.append(record)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.folder}/index.json does not describe sheets of images: {error}") from None

    def find_files(self, split):
        """The paths of a split's images, or Shards."""
        halves = [self.folder / "train", self.folder / "val"]
        divided = all(half.is_dir() for half in halves)
        folders = [half for half in halves if split in ("all", half.name)] if divided else [self.folder]
        shards = [path for folder in folders for path in find_shards(folder)]
        images = Shards(shards) if shards else [path for folder in folders for path in find_images(folder)]
        chosen = held_out(len(images))
        if divided or split == "all" or not chosen:
            return images
        places = [place for place in range(len(images)) if (place in chosen) == (split == "val")]
        if not shards:
            return [images[place] for place in places]
        images.images = images.images[places]
        return images

    @functools.cached_property
    def records(self):
        """One dict per image: name and category, and for our own sets style, caption and more."""
        if self.from_sheets:
            return self.sheet_records
        if isinstance(self.sources, Shards):
            return [self.sources.record(place) for place in range(len(self))]
        no_class = {self.folder, self.folder / "train", self.folder / "val"}
        return [{"name": os.path.relpath(path, self.folder),
                 "category": "" if Path(path).parent in no_class else Path(path).parent.name} for path in self.sources]

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        unreadable = []
        for step in range(len(self.sources)):
            source = self.sources[(index + step) % len(self.sources)]
            try:
                image = self.read(source)
                break
            except InputError:
                unreadable.append(str(source))
        else:
            raise InputError(f"no image in {self.folder} can be read")
        return self.prepare(image, self.size, seed), (index + step) % len(self.sources), unreadable

    @staticmethod
    def read(source):
        if isinstance(source, Member):
            return decode_image(source.data(), source)
        return Image.fromarray(source) if isinstance(source, np.ndarray) else read_image(source)

    @staticmethod
    def prepare(image, size, seed=None):
        """PIL image -> uint8 (3, size, size): shorter side resized, centre crop; with a seed, random crop and flip."""
        image = pixels.resize(image, size, interpolation=pixels.InterpolationMode.BICUBIC)
        top, left = (image.height - size) // 2, (image.width - size) // 2
        if seed is not None:
            draw = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
            top, left = int(draw[0] * (image.height - size + 1)), int(draw[1] * (image.width - size + 1))
            image = pixels.hflip(image) if draw[2] < 0.5 else image
        return pixels.pil_to_tensor(pixels.crop(image, top, left, size, size))

    @staticmethod
    def collate(items):
        """Items -> images (B, 3, size, size), their indices and the names of unreadable files."""
        images, indices, names = zip(*items)
        return torch.stack(images), list(indices), [name for some in names for name in some]

    def views(self, batch_size=64, device="cpu", workers=0):
        """Yield the evaluation views of all images in their order, as floats (up to batch_size, 3, size, size)."""
        for batch in self.batches(range(len(self)), batch_size, workers):
            yield batch.to(device).float() / 255

    def spread_places(self, count):
        """Up to `count` places from all over the set."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]

    def spread(self, count):
        """Up to `count` images from all over the set, as floats (count, 3, size, size) in [0, 1]."""
        return torch.cat(list(self.batches(self.spread_places(count), count))).float() / 255

    def names(self):
        """The names of all images below `folder`, as bytes: the same wherever the folder is."""
        if isinstance(self.sources, Shards):
            return self.sources.rows["name"][self.sources.images].tobytes()
        return json.dumps([record.get("name") for record in self.records]).encode()

    def fingerprint(self):
        """SHA-256 of what the images depend on: pixels of our sheets; paths, sizes and dates of files; and the size."""
        digest = hashlib.sha256(str(self.size).encode())
        shards = isinstance(self.sources, Shards)
        if shards:
            digest.update(self.sources.images.tobytes())
        for source in self.sources.paths if shards else self.sources:
            if isinstance(source, np.ndarray):
                digest.update(source.tobytes())
            else:
                stat = os.stat(source)
                digest.update(f"{source} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def batches(self, keys, batch_size, workers=0, indices=False):
        """Yield the images of the keys, in their order, as uint8 tensors (up to batch_size, 3, size, size).

        With `indices`, pairs of such a tensor and the list of the images' places in the set.
        """
        loader = torch.utils.data.DataLoader(self, batch_size, sampler=keys, num_workers=workers,
                                             collate_fn=ImageSet.collate)
        try:
            for images, places, unreadable in loader:
                for name in set(unreadable) - self.unreadable:
                    self.unreadable.add(name)
                    count = len(self.unreadable)
                    print(f"skipped {name}, which cannot be read as an image ({count} so far)", file=sys.stderr)
                yield (images, places) if indices else images
        except InputError as error:  # a worker's comes with all its traceback
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("vqrae.InputError: ")) from None


class TrainingOrder:
    """Endless keys of training views: every epoch in a new random order, every view with a new seed.

    Key number k depends on `seed` and k alone, so a resumed run needs no state of the loader to see the same images,
    and of R ranks each takes every R-th key without asking the others.
    """

    def __init__(self, count, seed, start, rank=0, ranks=1):
        self.count, self.seed, self.start, self.rank, self.ranks = count, seed, start, rank, ranks

    def __iter__(self):
        position = self.start
        while True:
            epoch, done = divmod(position, self.count)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            for index in order[done:].tolist():
                if position % self.ranks == self.rank:
                    yield index, (self.seed * 2**40 + position) % 2**63
                position += 1


def save_side_by_side(versions, path, columns=None, side=128):
    """Write a PNG that shows every image in all its versions: originals, then one or more reconstructions of them.

    versions: lists of as many images (3, H, W) in [0, 1]; `columns` such groups to a row, every image of `side` pixels.
    """
    columns = columns or max(1, 8 - len(versions))  # the more versions, the fewer groups, at about the same width
    gap, margin = 4, 12
    group = len(versions) * (side + gap) - gap + margin  # width of one image's versions
    rows = -(-len(versions[0]) // columns)
    canvas = Image.new("RGB", (columns * group + margin, rows * (side + margin) + margin), "#d0d0d0")
    for i, images in enumerate(zip(*versions)):
        for place, image in enumerate(images):
            image = pixels.to_pil_image(eight_bits(image.cpu().float()))
            whole = side % image.width == 0  # then every pixel can become a square of pixels
            image = image.resize((side, side), Image.NEAREST if whole else Image.LANCZOS)
            x = margin + i % columns * group + place * (side + gap)
            canvas.paste(image, (x, margin + i // columns * (side + margin)))
    canvas.save(path)


@torch.no_grad()
def count_codes(model, images, batch_size=64, device="cpu", workers=0):
    """How often each code is chosen in one pass over an ImageSet, evaluation views -> (K,) int64."""
    counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
    for x in images.views(batch_size, device, workers):
        counts += model.count(model.encode(x)[1]).cpu()
    return counts


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
    digest = hashlib.sha256(json.dumps(asdict(model.config)).encode() + images.fingerprint().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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


# ----------------------------------------------------------------------------------------------------------------------
# Image data in tar shards, WebDataset's layout: files called alike up to the first dot of their name are one sample
# ----------------------------------------------------------------------------------------------------------------------

IMAGE_NAME = re.compile(r".*\.(jpg|jpeg|png|webp)", re.IGNORECASE | re.DOTALL)


def decode_image(data, name):
    """What read_image makes of a file with these bytes; JPEG goes through torchvision's decoder."""
    if data.startswith(b"\xff\xd8"):
        try:
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return pixels.to_pil_image(decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True))
        except RuntimeError:
            pass  # PIL reads it after all, or has a sentence for it
    return read_image(name, io.BytesIO(data))


@functools.cache
def map_file(path):
    """A file's bytes as an array; what is looked at is read from disk."""
    return np.memmap(path, np.uint8, "r")


class Member(NamedTuple):
    """A file inside a tar shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.shard}/{self.name}"

    def data(self):
        return map_file(self.shard)[self.offset:self.offset + self.size].tobytes()


def index_shard(path):
    """Name, offset and size of each file in a tar shard, as a structured array; InputError for a damaged shard.

    prepare.py leaves the array beside the shards it packs; others are searched from header to header.
    """
    try:
        if path.with_suffix(".npy").exists():
            rows = np.load(path.with_suffix(".npy"))  # does not unpickle
        else:
            with tarfile.open(path, "r:") as tar:
                files = [(os.fsencode(file.name), file.offset_data, file.size) for file in tar if file.isfile()]
            longest = max((len(name) for name, _, _ in files), default=1)
            rows = np.array(files, dtype=[("name", f"S{longest}"), ("offset", "<i8"), ("size", "<i8")])
        if (rows["offset"] + rows["size"]).max(initial=0) > path.stat().st_size:
            raise ValueError("it is cut off")
    except (OSError, EOFError, ValueError, IndexError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the shard {path} ({reason}): it must be fetched or packed again") from None
    return rows


def expand_braces(pattern):
    """shards-{000..009}.tar stands for ten names, as everywhere in WebDataset."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise InputError(f"{pattern} needs a package more: pip install webdataset") from None
    try:
        return expand_urls(pattern)
    except ValueError as error:
        raise InputError(f"{pattern} is no pattern of names: {error}") from None


def find_shards(folder):
    """The tar shards of a pattern or of a folder: those that its index.json names, or else all if no image is there."""
    if not folder.is_dir():
        pattern = str(folder)
        return [Path(path) for path in (expand_braces(pattern) if "{" in pattern else [pattern])]
    index = read_json(folder / "index.json") if (folder / "index.json").exists() else None
    if isinstance(index, dict) and isinstance(index.get("shards"), list):
        return [folder / str(name) for name in index["shards"]]
    found = sorted(folder.glob("*.tar"))
    return found if found and not any(IMAGE_NAME.fullmatch(path.name) for path in folder.iterdir()) else []


class Shards:
    """The images in tar shards, a sequence of Members. The index is in arrays, which worker processes share."""

    def __init__(self, paths):
        indices = [index_shard(path) for path in paths]
        self.paths, self.rows = paths, np.concatenate(indices)
        self.shard_of = np.repeat(np.arange(len(paths)), [len(index) for index in indices])
        names = map(os.fsdecode, self.rows["name"].tolist())
        self.images = np.flatnonzero([IMAGE_NAME.fullmatch(name) is not None for name in names])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return self.file(self.images[place])

    def file(self, row):
        name, offset, size = self.rows[row].tolist()
        return Member(self.paths[self.shard_of[row]], os.fsdecode(name), offset, size)

    def record(self, place):
        """Name; category, the .cls or else the folder's name; caption, the .txt; where .json says them, .json's."""
        def sample(file):
            return file.shard, file.name[:file.name.find(".", file.name.rfind("/") + 1)]

        image, row = self[place], self.images[place]
        near = map(self.file, range(max(0, row - 3), min(row + 4, len(self.rows))))
        texts = {file.name.rpartition(".")[2].lower(): file.data().decode(errors="replace").strip() for file in near
                 if sample(file) == sample(image) and not IMAGE_NAME.fullmatch(file.name)}
        try:
            described = dict(json.loads(texts.get("json", "{}")))
        except (ValueError, TypeError):  # it is no object
            described = {}
        found = {"category": texts.get("cls", Path(image.name).parent.name), "caption": texts.get("txt"), **described}
        found = {key: str(found[key]) for key in ("category", "caption") if found[key] is not None}
        return {"name": image.name, **found}


def open_images(data, split, size):
    """The ImageSet of a folder or pattern, or the ShardStream of a URL."""
    return (ShardStream if re.match(r"\w\w+:", data) else ImageSet)(data, split, size)


class ShardStream(ImageSet, torch.utils.data.IterableDataset):
    """Images of tar shards behind a URL, as the webdataset package reads them: from start to end, without a copy.

    The URL is a pattern for at least two shards (https://host/shards-{000..009}.tar; pipe:COMMAND for what a command
    prints); the last one is held out. What a key names here is a whole shard, and so is what ranks and workers take
    turns at: its evaluation views in their order or, for (shard, seed), training views in an order shuffled within
    1,000 images. Nobody knows the images' number, nor can ask for one of them.
    """

    def __init__(self, url, split, size):
        self.folder, self.size, self.unreadable, self.from_sheets, urls = url, size, set(), False, expand_braces(url)
        if len(urls) < 2:
            raise InputError(f"{url} is a single shard, and one more must be held out: name several, as {{000..009}}")
        self.sources = {"train": urls[:-1], "val": urls[-1:], "all": urls}[split]

    @property
    def records(self):
        raise InputError(f"{self.folder} is streamed, so its images cannot be asked for one by one: fetch the shards "
                         "into a folder")

    fingerprint = records.fget  # raises the same InputError

    def names(self):
        return "\n".join(self.sources).encode()

    def batches(self, keys, batch_size, workers=0, indices=False):
        self.keys = keys
        return super().batches(None, batch_size, workers, indices)

    def spread(self, count):
        """The first `count` images."""
        return next(self.batches(range(len(self)), count)).float() / 255

    def __iter__(self):
        worker, unreadable = torch.utils.data.get_worker_info(), []
        for key in itertools.islice(self.keys, worker.id if worker else 0, None, worker.num_workers if worker else 1):
            shard, seed = key if isinstance(key, tuple) else (key, None)
            draw, found = None if seed is None else random.Random(seed), False
            for name, data in stream_shard(self.sources[shard], draw):
                try:
                    image = decode_image(data, name)
                except InputError:
                    unreadable.append(name)
                    continue
                yield self.prepare(image, self.size, draw and draw.getrandbits(62)), shard, unreadable
                found, unreadable = True, []
            if not found:
                raise InputError(f"no image in the shard {self.sources[shard]} can be read")


def stream_shard(url, draw=None):
    """Yield name and bytes of every image of a tar shard, in its order or, with a random.Random, shuffled a little."""
    import webdataset

    stages = [webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples()]
    try:
        for sample in webdataset.DataPipeline(*stages, *([webdataset.shuffle(1000, rng=draw)] if draw else [])):
            for kind in sample:
                if IMAGE_NAME.fullmatch(f".{kind}"):
                    yield f"{url}/{sample['__key__']}.{kind}", sample[kind]
    except (OSError, ValueError, tarfile.TarError) as error:  # whose further arguments webdataset has added
        raise InputError(f"cannot read the shard {url}: {getattr(error, 'strerror', None) or error.args[0]}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: our own, and those of the hub
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A path to write what then takes the place of `path` in one step: readers meet the old file or the new one.

    InputError when it cannot be written, say on a full disk; nothing half written is left behind then.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path}, perhaps for want of room ({error}); what stood there before is kept"
                         ) from None
    finally:
        part.unlink(missing_ok=True)


def check_fields(config, at_least_1=()):
    """InputError for a field of a config that no model could have: a config.json may hold anything.

    at_least_1: names of whole numbers that must not be 0.
    """
    for entry in fields(config):
        name, value, kind = entry.name, getattr(config, entry.name), entry.type
        if kind is int:
            least, most = int(name in at_least_1), 1000 if name == "depth" else 2**24
            good = type(value) is int and least <= value <= most
        elif kind is float:
            good = type(value) in (int, float) and 0 <= value <= 1e12
        elif kind is tuple:
            good = len(value) == 3 and all(type(x) in (int, float) and abs(x) <= 1e12 for x in value)
        else:
            good = isinstance(value, kind)
        if not good:
            raise InputError(f"{name} is {value!r}")


def read_json(path):
    """The parsed JSON file; InputError names the path when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_config(path):
    """The JSON object in a file, as a dict; InputError when it is missing, damaged or something else."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object, which it should")
    return config


def read_safetensors(path):
    """The tensors of a safetensors file by name; InputError names the path when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the weights in {path}: {error}") from None


def read_checkpoint(folder):
    """All tensors of a hub folder by name, from model.safetensors or from the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / "model.safetensors")
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index} has no weight_map, which names the file of each tensor")
    weights = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise InputError(f"{index} names the file {name!r}, which is not in its folder")
        weights.update(read_safetensors(folder / name))
    return weights


def check_weights(expected, weights, path):
    """InputError names the first tensor that is missing among the weights, or is not as the expected one."""
    for name, tensor in expected.items():
        if name not in weights:
            raise InputError(f"{path} has no tensor {name!r}, so it does not fit its config.json")
        if weights[name].shape != tensor.shape:
            expected, found = tuple(tensor.shape), tuple(weights[name].shape)
            raise InputError(f"{path}: tensor {name!r} has shape {found} where config.json asks for {expected}")
        if weights[name].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{path}: tensor {name!r} is of type {weights[name].dtype}, which is not read here")
        if not weights[name].isfinite().all():
            raise InputError(f"{path}: tensor {name!r} has values that are no numbers, so it is damaged")


def save_model(model, folder):
    """Write config.json and model.safetensors, each replaced in one step."""
    folder = Path(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / "config.json") as config_part, replacing(folder / "model.safetensors") as weights_part:
        config_part.write_text(json.dumps(asdict(model.config), indent=2) + "\n")
        save_file(weights, weights_part)


def load_model(folder, kind, maker, build):
    """The model that `save_model` wrote, built from its config.json by `build`, in eval mode.

    `kind` and `maker` say, in the InputError about a missing or damaged folder, what it should be and what makes one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no model at {folder}: the folder does not exist; python train.py {maker}")
    saved = read_json(folder / "config.json")
    try:
        with torch.device("meta"):  # sizes without memory: config.json may ask for more than there is
            expected = build(saved).state_dict()
    except (KeyError, TypeError, InputError, RuntimeError) as error:  # the last for sizes that no memory has
        raise InputError(f"{folder}/config.json does not describe a {kind}: {str(error).splitlines()[0]}") from None
    weights = read_safetensors(folder / "model.safetensors")
    check_weights(expected, weights, folder / "model.safetensors")
    model = build(saved)
    model.load_state_dict({name: weights[name] for name in expected})
    return model.eval()


def load_text_tokenizer(path, vocabulary):
    """The tokenizer in a tokenizer.json; InputError when it is missing or damaged, or lacks our two special tokens, or
    has more tokens than the text part of the vocabulary has rows.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise InputError(f"cannot read the text tokenizer {path}: {error}") from None
    for token in (START_OF_IMAGE, END_OF_TEXT):
        if tokenizer.token_to_id(token) is None:
            raise InputError(f"the text tokenizer {path} has no token {token}")
    if max(tokenizer.get_vocab().values()) >= vocabulary:
        raise InputError(f"the text tokenizer {path} has more tokens than the {vocabulary} of its model's config.json")
    return tokenizer


def hub_folder(source):
    """A local folder as it is, or a download of the hub's model of this name; InputError says why there is none."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:  # offline, no such id, no permission: huggingface_hub has many ways to say no
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"no model at {source!r}: not a folder, and the hub says: {reason}") from None
    return folder


# What checkpoints call the parts of our Encoder; {} stands for query, key or value where they are kept apart.
HUB_NAMES = (
    # ours, DINOv2, SigLIP and CLIP, InternViT by OpenGVLab, InternViT by transformers
    ("cls_token", "embeddings.cls_token", "embeddings.class_embedding", "embeddings.class_embedding",
     "embeddings.cls_token"),
    ("registers", "embeddings.register_tokens", "", "", ""),
    ("positions", "embeddings.position_embeddings", "embeddings.position_embedding.weight",
     "embeddings.position_embedding", "embeddings.position_embeddings"),
    ("patch_embed.", "embeddings.patch_embeddings.projection.", "embeddings.patch_embedding.",
     "embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("pre_norm.", "", "pre_layrnorm.", "", ""),
    ("norm.", "layernorm.", "post_layernorm.", "", ""),
    ("blocks.", "encoder.layer.", "encoder.layers.", "encoder.layers.", "encoder.layer."),
    ("norm1.", "norm1.", "layer_norm1.", "norm1.", "layernorm_before."),
    ("norm2.", "norm2.", "layer_norm2.", "norm2.", "layernorm_after."),
    ("attention.qkv.", "attention.attention.{}.", "self_attn.{}_proj.", "attn.qkv.", "attention.{}_proj."),
    ("attention.out.", "attention.output.dense.", "self_attn.out_proj.", "attn.proj.", "attention.projection_layer."),
    ("mlp.0.", "mlp.fc1.", "mlp.fc1.", "mlp.fc1.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2.", "mlp.fc2.", "mlp.fc2.", "mlp.fc2."),
    ("scale1", "layer_scale1.lambda1", "", "ls1", "lambda_1"),
    ("scale2", "layer_scale2.lambda1", "", "ls2", "lambda_2"),
)

# By the model_type of the vision config: the column of HUB_NAMES, the transformers class, what config.json need not say
# (hub configs leave out what transformers has as default), and what of ViTConfig is the family's.
FAMILIES = {
    "dinov2": (1, "Dinov2Model", {}, {}),
    "dinov2_with_registers": (1, "Dinov2WithRegistersModel", {"num_register_tokens": 4}, {"antialias": True}),
    "siglip_vision_model": (2, "SiglipVisionModel", {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    }, {"layer_scale": False, "class_token": False, "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    "clip_vision_model": (2, "CLIPVisionModel", {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }, {"layer_scale": False, "patch_bias": False, "pre_norm": True, "final_norm": "class",
        "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}),
    "intern_vit_6b": (3, "InternVisionModel", {}, {"final_norm": "none"}),  # so called in the 300M's config too
    "internvl_vision": (4, "InternVLVisionModel", {"hidden_act": "gelu"}, {"final_norm": "none"}),
}


def hub_names(name, column):
    """What checkpoints of a column of HUB_NAMES call our parameter `name`: one name, or those of its three parts."""
    for row in HUB_NAMES:
        ours, theirs = row[0], row[column]
        if name.startswith(ours):
            name = theirs + name[len(ours):]
        elif name.startswith(("encoder.layer", "blocks.")):  # inside a block
            name = name.replace(f".{ours}", f".{theirs}")
    parts = ("query", "key", "value") if column == 1 else ("q", "k", "v")
    return [name.format(part) for part in parts] if "{}" in name else [name]


def load_encoder(source):
    """Load a vision encoder of FAMILIES: a folder in the hub's layout or a hub id, alone or inside a larger model.

    A folder of a trained VQRAE gives the encoder inside it. Returns an Encoder in eval mode and float32. Raises
    InputError when the source cannot be had or does not fit.
    """
    folder = hub_folder(source)
    hub = read_config(folder / "config.json")
    if "codebook_dim" in hub:
        return load_model(folder, "VQRAE", "--stage 1 makes one", lambda saved: nn.ModuleDict(
            {"encoder": Encoder(ViTConfig(**saved["encoder"]))}))["encoder"]
    config, expected = read_vit_config(hub, folder)
    column, weights = FAMILIES[config.family][0], {}
    # Inside a larger model the encoder's names have a prefix, and so has everything else another one.
    theirs = {re.sub(r"^(model\.)?((vision_model|vision_tower)\.)*", "", name): tensor
              for name, tensor in read_checkpoint(folder).items()}
    if column == 1:  # recent versions of transformers have other names for DINOv2 in memory; someone may have kept them
        for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
                         ("o_proj", "output.dense")):
            theirs = {name.replace(f"attention.{new}", f"attention.{old}"): tensor for name, tensor in theirs.items()}
    for name, ours in expected.items():
        names = hub_names(name, column)
        missing = [part for part in names if part not in theirs]
        if missing:
            raise InputError(f"the weights in {folder} have no tensor {missing[0]!r}")
        if any(theirs[part].shape[1:] != theirs[names[0]].shape[1:] or not theirs[part].dim() for part in names):
            raise InputError(f"the weights in {folder}: tensors {', '.join(map(repr, names))} do not fit together")
        weights[name] = torch.cat([theirs[part].float() for part in names])
        if name in ("cls_token", "positions") and weights[name].numel() == ours.numel():
            weights[name] = weights[name].reshape(ours.shape)  # some families store them without the batch dimension
    check_weights(expected, weights, folder)
    encoder = Encoder(config)
    encoder.load_state_dict(weights)
    return encoder.eval()


def read_vit_config(hub, folder):
    """The ViTConfig that config.json, as a dict, and preprocessor_config.json describe, and its encoder's tensors.

    The tensors are sizes without memory, as in `load_model`. Raises InputError when the files make no sense.
    """
    hub = hub.get("vision_config", hub)  # SigLIP and CLIP come with their text half, InternViT with a language model
    kind = hub.get("model_type") if isinstance(hub, dict) else hub
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"{folder}/config.json is of type {kind!r}; this loader reads {', '.join(FAMILIES)}")
    _, _, defaults, traits = FAMILIES[kind]
    hub = {**defaults, **hub}
    if (hub.get("use_swiglu_ffn") or hub.get("use_qk_norm") or hub.get("qk_normalization")
            or hub.get("norm_type") == "rms_norm" or str(hub.get("hidden_act")) not in ACTIVATIONS):
        raise InputError(f"{folder}/config.json asks for SwiGLU, q/k norms, RMSNorm or an activation other than "
                         f"{', '.join(ACTIVATIONS)}, as the largest models of these families have; none of it is here")
    statistics = folder / "preprocessor_config.json"
    statistics = read_config(statistics) if statistics.exists() else {}
    try:
        sides = [hub[name][0] if isinstance(hub[name], list) else hub[name] for name in ("image_size", "patch_size")]
        config = ViTConfig(
            image_size=sides[0],
            patch_size=sides[1],
            width=hub["hidden_size"],
            depth=hub["num_hidden_layers"],
            heads=hub["num_attention_heads"],
            mlp_width=hub.get("intermediate_size") or int(hub["hidden_size"] * hub["mlp_ratio"]),
            **{**traits, "family": kind, "activation": hub["hidden_act"], "layer_norm_eps": hub["layer_norm_eps"],
               "registers": hub.get("num_register_tokens", 0) if kind == "dinov2_with_registers" else 0,
               "mean": tuple(statistics.get("image_mean") or traits.get("mean", ViTConfig.mean)),
               "std": tuple(statistics.get("image_std") or traits.get("std", ViTConfig.std))})
        with torch.device("meta"):
            return config, Encoder(config).state_dict()
    except KeyError as error:
        raise InputError(f"{folder}/config.json lacks {error}") from None
    except (IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{folder}/config.json or preprocessor_config.json does not describe an encoder: "
                         f"{str(error).splitlines()[0]}") from None


def save_encoder(encoder, folder, dtype=torch.float32):
    """Write an Encoder as a checkpoint of its family, which `load_encoder` and transformers' own class both read.

    InternViT is written in the names of transformers' InternVLVisionModel, whichever names it came with.
    """
    config, folder = encoder.config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = "internvl_vision" if config.family == "intern_vit_6b" else config.family
    column, class_name, _, _ = FAMILIES[family]
    hub_config = {
        "architectures": [class_name], "model_type": family, "image_size": config.image_size,
        "patch_size": config.patch_size, "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "hidden_act": config.activation, "layer_norm_eps": config.layer_norm_eps,
    }
    if column == 1:
        hub_config.update(mlp_ratio=config.mlp_width // config.width, qkv_bias=True, use_swiglu_ffn=False,
                          use_mask_token=False)
    else:
        hub_config.update(intermediate_size=config.mlp_width)
    if config.registers:
        hub_config.update(num_register_tokens=config.registers)
    if family == "siglip_vision_model":
        hub_config.update(vision_use_head=False)  # the pooling head is no part of Z_I
    if family == "internvl_vision":
        hub_config.update(attention_bias=True, use_qk_norm=False, use_mean_pooling=True, norm_type="layer_norm")
    statistics = {"image_processor_type": "BitImageProcessor", "image_mean": config.mean, "image_std": config.std,
                  "size": {"shortest_edge": config.image_size},
                  "crop_size": {"height": config.image_size, "width": config.image_size}}
    weights = {}
    for name, tensor in encoder.state_dict().items():
        theirs = hub_names(name, column)
        if column == 2:
            theirs = [f"vision_model.{name}" for name in theirs]  # as on the hub; transformers before 5 needs it
        if column == 2 and name in ("cls_token", "positions"):
            tensor = tensor[0, 0] if name == "cls_token" else tensor[0]  # (d,), (N, d): they come without a batch
        weights.update(zip(theirs, (piece.to(dtype).contiguous() for piece in tensor.chunk(len(theirs)))))
    if config.family == "dinov2_with_registers":
        weights["embeddings.mask_token"] = torch.zeros(1, config.width, dtype=dtype)  # its class insists on one
    (folder / "config.json").write_text(json.dumps(hub_config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def qwen3_name(name):
    """The name that Qwen3 checkpoints on the hub use for our parameter `name`."""
    for ours, theirs in (("embedding.", "embed_tokens."), ("blocks.", "layers."),
                         ("attention.q_norm", "self_attn.q_norm"), ("attention.k_norm", "self_attn.k_norm"),
                         ("attention.out.", "self_attn.o_proj."),
                         ("attention.q.", "self_attn.q_proj."), ("attention.k.", "self_attn.k_proj."),
                         ("attention.v.", "self_attn.v_proj."), ("norm1.", "input_layernorm."),
                         ("norm2.", "post_attention_layernorm."), (".gate.", ".mlp.gate_proj."),
                         (".up.", ".mlp.up_proj."), (".down.", ".mlp.down_proj.")):
        name = name.replace(ours, theirs)
    return "model." + name


def load_qwen3(source, codebook_size, image_tokens=0):
    """A VisualLM from a Qwen3 checkpoint, a folder in the hub's layout or a hub id, with rows for K codes appended.

    All rows of the text embedding stay, padding included, so code k is token vocab_size + k. The new rows start as
    Qwen3's own did, N(0, 0.02^2). Its text tokenizer comes along. Raises InputError when the source cannot be had or
    is no Qwen3 with tied embeddings.
    """
    folder = hub_folder(source)
    hub = read_config(folder / "config.json")
    if hub.get("model_type") != "qwen3" or not hub.get("tie_word_embeddings") or hub.get("attention_bias"):
        raise InputError(f"{folder}/config.json is of type {hub.get('model_type')!r}; this loader reads dense Qwen3 "
                         "with tied embeddings, such as Qwen/Qwen3-0.6B")
    try:
        config = LMConfig(
            text_vocabulary=hub["vocab_size"], codebook_size=codebook_size, width=hub["hidden_size"],
            depth=hub["num_hidden_layers"], heads=hub["num_attention_heads"], kv_heads=hub["num_key_value_heads"],
            head_width=hub["head_dim"], mlp_width=hub["intermediate_size"], image_tokens=image_tokens,
            rope_theta=hub.get("rope_theta") or hub["rope_parameters"]["rope_theta"], norm_eps=hub["rms_norm_eps"])
        with torch.device("meta"):  # sizes without memory, as in `load_model`
            expected = VisualLM(replace(config, codebook_size=0)).state_dict()
    except KeyError as error:
        raise InputError(f"{folder}/config.json lacks {error}") from None
    except (TypeError, InputError, RuntimeError) as error:
        raise InputError(f"{folder}/config.json does not describe a Qwen3: {str(error).splitlines()[0]}") from None
    weights = read_checkpoint(folder)
    ours = {name: weights[qwen3_name(name)].float() for name in expected if qwen3_name(name) in weights}
    check_weights(expected, ours, folder)
    model = VisualLM(config)
    codes = model.embedding.weight.detach()[config.text_vocabulary:]
    ours["embedding.weight"] = torch.cat([ours["embedding.weight"], codes])
    model.load_state_dict(ours)
    if (folder / "tokenizer.json").exists():
        model.text = load_text_tokenizer(folder / "tokenizer.json", config.text_vocabulary)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Tables 7 to 9: the settings of a training run
# ----------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent


def setting(help, choices=None, zero=False, most=math.inf):
    """A field of the settings that `train.py` makes a flag of; a number is above 0, or 0 too with `zero`."""
    return field(metadata={"help": help, "choices": choices, "zero": zero, "most": most})


@dataclass(kw_only=True)
class CommonConfig:
    """Settings of every stage."""

    data: str = setting("folder of images, flat or one folder per class, or of tar shards; shards-{000..009}.tar; or "
                        "a URL of shards, to be streamed")
    steps: int = setting("training steps")
    batch_size: int = setting("images a step", most=2**20)
    accumulate: int = setting("parts that a step's images are taken in, one after the other, for want of memory")
    learning_rate: float = setting("at its highest, after the warm-up; of all that has no rate of its own")
    muon_learning_rate: float = setting("of matrices in blocks that start untrained, which Muon moves; 0: AdamW does",
                                        zero=True)
    end_factor: float = setting("what is left of each learning rate at the end of its cosine", zero=True, most=1)
    warmup_steps: int = setting("steps over which learning rates rise")
    weight_decay: float = setting("AdamW's, on matrices only", zero=True)
    max_grad_norm: float = setting("gradients are scaled down to this norm")
    ema_decay: float = setting("of the averaged weights, which are evaluated and saved", zero=True, most=1)
    betas: tuple = (0.9, 0.999)
    adam_epsilon: float = 1e-8


@dataclass(kw_only=True)
class TrainingConfig(CommonConfig):
    """Settings of stage 1 or 2, Table 7's rows among them."""

    encoder: str = setting("vision encoder: a folder in the hub's layout, a hub id, or a folder of a VQRAE")
    image_size: int = setting("side of the training images in pixels", most=16384)
    output_patch_size: int | None = setting("q, side of a token's patch of output (default: the encoder's p)",
                                            most=1024)
    quantizer: str = setting("simvq: the paper's; vq: plain; none: continuous", choices=list(QUANTIZERS))
    codebook_size: int = setting("number of codes, K")
    codebook_dim: int = setting("width of a code, e")
    beta_side: str = setting("which term of Eq. 3 the 0.25 weighs", choices=["commitment", "codebook"])
    codebook_init: str = setting("data: k-means of features; gaussian: the SimVQ authors'",
                                 choices=["data", "gaussian"])
    start_tokens: int = setting("features that the starts of codebook and projections look at, four to a code or more")
    projection_init: str = setting("pixels: distances that count what features tell of pixels; features: with all "
                                   "else that they tell in full; random: torch's",
                                   choices=["pixels", "features", "random"])
    perceptual: str = setting("vfm: the encoder's own features; lpips-convnext: the paper's networks, fetched on "
                              "first use", choices=["vfm", "lpips-convnext", "none"])
    perceptual_weight: float = setting("weight of the perceptual loss (paper: 1.1)", zero=True)
    quantizer_weight: float = setting("weight of the quantizer's two losses (paper: 1)", zero=True)
    distillation_weight: float = setting("weight of Eq. 5 when the encoder trains (paper: 1)", zero=True)
    adversarial_weight: float = setting("weight of the adversarial loss (paper: 0 in stage 1, 0.1 in stage 2)",
                                        zero=True)
    discriminator_start: int = setting("step at which discriminator and adversarial loss set in", zero=True)
    discriminator_width: int = setting("channels of the discriminator's first stage, a multiple of 32 (TiTok: 128)")
    encoder_learning_rate: float = setting("of the encoder; 0 keeps it frozen", zero=True)
    discriminator_learning_rate: float = setting("of the discriminator", zero=True)


@dataclass(kw_only=True)
class LanguageConfig(CommonConfig):
    """Settings of a transformer that writes codes (stage ar, Table 9) or captions (stage caption, Table 8)."""

    qwen3: str | None = setting("Qwen3 checkpoint to start from, a folder or a hub id; it has sizes of its own")
    text_vocabulary: int = setting("tokens of the text tokenizer, at most, 256 bytes among them")
    width: int = setting("of the transformer, d")
    depth: int = setting("blocks")
    heads: int = setting("query heads")
    kv_heads: int = setting("key and value heads, a divisor of the query heads")
    head_width: int = setting("channels of a head, an even number")
    mlp_width: int = setting("channels inside the MLP")


@dataclass(kw_only=True)
class GenerationConfig(LanguageConfig):
    """Settings of stage ar."""

    tokenizer: str = setting("the VQRAE whose codes are predicted, a folder")
    caption_dropout: float = setting("share of images without their caption, for guidance", zero=True, most=1)
    style_dropout: float = setting("share of captions that do not name the style", zero=True, most=1)
    code_noise: float = setting("largest share of an image's codes that are misread in training", zero=True, most=1)
    recolour: str = setting("whether what is captioned \"green ...\" is also learned in other colours, its hue turned",
                            choices=["yes", "no"])


@dataclass(kw_only=True)
class CaptionConfig(LanguageConfig):
    """Settings of stage caption. Table 8 tunes a ready language model; here a small one is trained from scratch."""

    encoder: str = setting("the encoder that is read")
    image_size: int = setting("side of the images", most=16384)


# Settings that a Qwen3 checkpoint brings with it, and settings that stage 2 takes over from the model of stage 1.
FIXED_BY_QWEN3 = ("text_vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width")

FIXED_BY_STAGE_1 = ("encoder", "image_size", "output_patch_size", "quantizer", "codebook_size", "codebook_dim",
                    "beta_side", "codebook_init", "start_tokens", "projection_init")

TINY = TrainingConfig(
    data=str(ROOT / "data/emoji"),
    encoder=str(ROOT / "data/tiny_vit"),
    image_size=64,
    output_patch_size=None,
    quantizer="simvq",
    codebook_size=4096,
    codebook_dim=256,
    beta_side="commitment",
    codebook_init="data",
    start_tokens=131072,
    projection_init="pixels",
    perceptual="vfm",
    perceptual_weight=1.1,
    quantizer_weight=1.0,
    distillation_weight=0.0,
    adversarial_weight=0.0,
    discriminator_start=0,
    discriminator_width=32,
    steps=1200,
    batch_size=16,
    accumulate=1,
    learning_rate=2e-3,
    muon_learning_rate=8e-3,
    encoder_learning_rate=0.0,
    discriminator_learning_rate=0.0,
    end_factor=0.01,
    warmup_steps=100,
    weight_decay=1e-4,
    max_grad_norm=1.0,
    ema_decay=0.999,
)

# A Qwen3 small enough for two CPU cores. `adam_epsilon` is Table 9's.
TINY_LM = dict(qwen3=None, text_vocabulary=1024, width=256, depth=6, heads=4, kv_heads=2, head_width=64, mlp_width=768,
               data=TINY.data, accumulate=1, muon_learning_rate=0.0, max_grad_norm=1.0, warmup_steps=100,
               end_factor=0.01, adam_epsilon=1e-15)

# Table 7, with the README's decisions where it is silent, among them how codebook and projections start.
PAPER_1 = replace(
    TINY,
    data=str(ROOT / "data/photos"),
    encoder="google/siglip2-so400m-patch16-256",
    image_size=256,
    codebook_size=16384,
    codebook_dim=1536,
    start_tokens=65536,
    projection_init="features",
    perceptual="lpips-convnext",
    discriminator_width=128,
    steps=100_000,
    batch_size=1024,
    learning_rate=4e-4,
    muon_learning_rate=0.0,
    end_factor=0.25,
    warmup_steps=2000,
)

PAPER_2 = replace(
    PAPER_1,
    distillation_weight=1.0,
    adversarial_weight=0.1,
    discriminator_start=50_000,
    steps=70_000,
    learning_rate=1e-4,
    encoder_learning_rate=1e-5,
    discriminator_learning_rate=4e-5,
    end_factor=0.1,
)
SIGLIP2_512 = {"encoder": "google/siglip2-so400m-patch16-512", "image_size": 512}
INTERNVIT = {"encoder": "OpenGVLab/InternViT-300M-448px", "image_size": 448, "batch_size": 768}
DINOV2_S = {"encoder": "facebook/dinov2-small", "image_size": 224, "codebook_dim": 512}

PRESETS = {
    # Made for two CPU cores and a few minutes, with nothing to download.
    "tiny": {
        "1": TINY,
        # Half of the paper's adversarial weight: the distance of features was lowest with it in short runs.
        "2": replace(TINY, distillation_weight=1.0, adversarial_weight=0.05, discriminator_start=1300, steps=2000,
                     learning_rate=1e-3, muon_learning_rate=5e-3, encoder_learning_rate=1e-3,
                     discriminator_learning_rate=4e-4),
        "ar": GenerationConfig(
            **{**TINY_LM, "muon_learning_rate": 8e-3}, tokenizer="out/stage2", caption_dropout=0.1, style_dropout=0.2,
            code_noise=0.3, recolour="yes", steps=2800, batch_size=32, learning_rate=4e-3, weight_decay=0.0,
            ema_decay=0.998),
        "caption": CaptionConfig(
            **TINY_LM, encoder=TINY.encoder, image_size=TINY.image_size, steps=1500, batch_size=32,
            learning_rate=1e-3, weight_decay=0.0, ema_decay=0.998),
    },
    # The paper's encoders, and a small one. Their global batch is for many GPUs; --accumulate makes it fit fewer.
    "siglip2-256": {"1": PAPER_1, "2": PAPER_2},
    "siglip2-512": {"1": replace(PAPER_1, **SIGLIP2_512), "2": replace(PAPER_2, **SIGLIP2_512)},
    "internvit-448": {"1": replace(PAPER_1, **INTERNVIT, steps=45_000),
                      "2": replace(PAPER_2, **INTERNVIT, steps=60_000, discriminator_start=30_000)},
    "dinov2-s": {"1": replace(PAPER_1, **DINOV2_S), "2": replace(PAPER_2, **DINOV2_S)},
    # The paper's language model, with Table 9's settings; steps it does not say. Needs a GPU.
    "qwen3-0.6b": {
        "ar": GenerationConfig(
            **{**TINY_LM, "qwen3": "Qwen/Qwen3-0.6B", "warmup_steps": 4000, "end_factor": 1.0}, tokenizer="out/stage2",
            caption_dropout=0.1, style_dropout=0.2, code_noise=0.0, recolour="no", steps=100_000, batch_size=512,
            learning_rate=1e-4, weight_decay=0.0, ema_decay=0.999),
    },
}

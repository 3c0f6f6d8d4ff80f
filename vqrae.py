"""VQRAE in one file, section by section of the paper (Du et al. 2025, arXiv 2511.23386).

    images -> encoder E -> Linear d->e -> SimVQ codebook -> Linear e->d -> symmetric decoder D -> images

Sections 3.2 to 3.5, and behind them how pretrained weights are read. Metrics, image data and the files of a model are
in support/, Tables 7 to 9 in presets.py, a training step in train.py. Shapes used in the comments, with the paper's
letter where it has one:
    B  images in a batch            d  width of encoder and decoder     p  patch side the encoder reads
    N  tokens of an image, HW/p^2   e  width of a code                  q  patch side the decoder writes
    K  codes in the codebook (n and k in the paper)
    V  tokens of the text vocabulary                                    h  width of an attention head
H and W are the sides of an image (h and w in the paper), n and m any number of rows. Models take and return images as
float tensors (B, 3, H, W) in [0, 1], and each encoder applies its own mean and std. A `--flag` in a comment is one of
train.py's.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from support.checks import (check_codes, check_form, check_images, check_prompts, check_sampling, list_of_texts,
                            number_in, rows_and_columns)
from support.files import (InputError, check_fields, check_weights, load_model, read_config, save_model,
                           without_memory)
from support.hub import IMAGENET, HubModel, hub_folder, qwen3_fields, read_checkpoint, vision_fields, vision_weights
from support.images import resize_to
from support.metrics import codebook_usage, psnr  # noqa: F401  for whoever uses this file as a library
from support.networks import convnext_small, lpips_vgg
from support.quick import quick_products
from support.text import END_OF_TEXT, START_OF_IMAGE, id_of, load_text_tokenizer, tokens_of


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
    # Which tokens the last norm is for: all "tokens", the "class" token alone (Z_I is before it), or "none".
    final_norm: str = "tokens"
    antialias: bool = False  # when positions are resized
    mean: tuple = IMAGENET["mean"]
    std: tuple = IMAGENET["std"]

    def __post_init__(self):
        self.mean, self.std = tuple(self.mean), tuple(self.std)  # a JSON file has lists
        check_fields(self, ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"))
        if self.width % self.heads or self.image_size < self.patch_size or min(self.std) <= 0:
            raise InputError(f"width {self.width} must be a multiple of heads {self.heads}, image_size "
                             f"{self.image_size} no less than patch_size {self.patch_size}, and std {self.std} above 0")
        if (self.family not in FAMILIES or self.activation not in ACTIVATIONS
                or self.final_norm not in ("tokens", "class", "none")):
            raise InputError(f"family {self.family!r}, activation {self.activation!r} or final_norm "
                             f"{self.final_norm!r} is unknown")


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(h)) v: queries (B, heads, n, h) and keys, values (B, kv_heads, m, h) -> (B, heads, n, h).

    With fewer heads of keys than of queries, neighbouring query heads share one. mask (B or 1, 1, n, m), added to the
    scores, is 0 where a query may see a key and -inf elsewhere, see `mask_of`; without it, all see all.
    """
    B, heads, n, h = q.shape
    if q.device.type != "cpu" or n > 512 or n == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != k.shape[1])
    # For a few hundred queries on a CPU, torch's fused kernel and above all its backward is slower than two products.
    q = (q * h**-0.5).reshape(B, k.shape[1], -1, h)  # (B, kv_heads, heads/kv_heads * n, h): sharing is stacking
    scores = (q @ k.transpose(-2, -1)).view(B, k.shape[1], -1, n, k.shape[2])  # (B, kv_heads, sharing, n, m)
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
        """Yield all tokens (B, [1 +] registers + N, d) as they are after each block, before the last norm.

        Raises InputError for what is no images, or when their sides are not multiples of the patch size.
        """
        p = self.config.patch_size
        check_form(images)
        height, width = images.shape[-2:]
        if height % p or width % p:
            raise InputError(f"images of {height} x {width} pixels do not divide into patches of {p}")
        images = (images - self.mean) / self.std
        x = self.patch_embed(images.to(self.patch_embed.weight.dtype))  # (B, d, H/p, W/p)
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
        if not torch.compiler.is_compiling():
            check_images(images, most=0.5, wait=False)  # resizing goes beyond [0, 1], but not so far
        for x in self.hidden_states(images):  # (B, [1 +] registers + N, d), none kept but the last
            pass
        x = self.norm(x) if self.config.final_norm == "tokens" else x  # "class": readers apply it
        return x[:, self.config.class_token + self.config.registers:]  # (B, N, d)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "High Dimensional VQ": Eq. 1, and the quantizer's loss, Eq. 3; Section 3.3, 100% utilization
# ----------------------------------------------------------------------------------------------------------------------


class VectorQuantizer(nn.Module):
    """Plain vector quantization (van den Oord et al. 2017): every code is a free parameter.

    Only the codes that some token chose receive a gradient. A code that no token chooses any more coasts on AdamW's
    momentum, and features go on moving away from it: that is how codebooks collapse.
    """

    def __init__(self, codebook_size, dim, beta=0.25, beta_side="commitment"):
        super().__init__()
        self.beta, self.beta_side = beta, beta_side
        # The SimVQ authors' start, i.i.d. Gaussian with E||c||^2 = 1; `start_codebook` has a better one.
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) * dim**-0.5)  # the paper's C, (K, e)

    def project(self, codes):
        """Effective codes (..., e) of rows of the codebook (..., e): here, the rows themselves."""
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
            codes = self.project(self.codebook[first:first + code_chunk]).to(z.dtype)  # (chunk, e)
            squared_norms = codes.pow(2).sum(1)  # (chunk,)
            for begin in range(0, len(z), token_chunk):
                part = slice(begin, begin + token_chunk)
                distance, nearest = torch.addmm(squared_norms, z[part], codes.T, alpha=-2).min(1)  # (part,) each
                closer = distance < best[part]
                best[part] = torch.where(closer, distance, best[part])
                indices[part] = torch.where(closer, first + nearest, indices[part])
        return indices

    def sizes(self):
        """K, and how many indices a token has, one per codebook; 0 here: a single index, without a dimension for it."""
        return len(self.codebook), 0

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
            q = self.lookup(indices).float()  # (..., e)
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
        return self.W(codes)  # (..., e)


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
    # Tokens look for their centres along the principal axes that hold 99 % of the variance; the others, most of them,
    # would take most of the time.
    variance, axes = torch.linalg.eigh(torch.cov(z.T).cpu())  # (e,) rising, (e, e)
    axes = axes[:, variance.cumsum(0) >= 0.01 * variance.sum()].to(z)  # (e, r)
    short, kmeans = z @ axes, VectorQuantizer(K, axes.shape[1]).to(z.device)  # (n, r)
    kmeans.codebook.copy_(short[torch.randperm(len(z), generator=generator)[:K].to(z.device)])
    for step in range(steps + 10):  # `steps` rounds, and up to 10 more while a code has too few tokens
        indices = kmeans.search(short)  # (n,)
        counts = torch.bincount(indices, minlength=K)  # (K,)
        few = 0.4 * len(z) / K
        weak = counts < few
        if step >= steps and not weak.any():
            break
        errors = (short - kmeans.codebook[indices]).pow(2).sum(1)  # (n,)
        centres = means_of(short, indices, counts)  # (K, r)
        # Of codes drawn from copies of one token all but one get none, and a code that serves a single odd token is
        # lost once features move. So codes with little to do start again, each beside a code whose tokens lose most in
        # all and are enough for two (Linde, Buzo and Gray 1980).
        lost = torch.zeros(K, device=z.device).index_add_(0, indices, errors)  # (K,)
        lost[counts < 2 * few] *= 1e-6  # the last ones to be asked
        worst = lost.topk(int(weak.sum())).indices
        spread = (lost[worst] / counts[worst].clamp(min=1) / axes.shape[1]).sqrt()[:, None]
        aside = torch.randn(len(worst), axes.shape[1], generator=generator).to(z)
        centres[weak] = centres[worst] + 0.1 * spread * aside
        kmeans.codebook.copy_(centres)
    indices = kmeans.search(short)  # (n,)
    counts = torch.bincount(indices, minlength=K)[:, None]  # (K, 1)
    quantizer.codebook.copy_(torch.where(counts > 0, means_of(z, indices, counts[:, 0]), kmeans.codebook @ axes.T))


def means_of(z, indices, counts):
    """The means (K, e) of the vectors z (n, e) that have the same index (n,); of how many each is, counts (K,) tell."""
    sums = z.new_zeros(len(counts), z.shape[1]).index_add_(0, indices, z)  # (K, e)
    return sums / counts.clamp(min=1)[:, None]


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

    Not in the paper: `overlap`. Tokens that each paint a patch alone choose slightly different tones, and the eye sees
    a grid. With an overlap of m a token paints m pixels more on every side, and where patches meet, both fade out over
    2 m pixels, so that neighbours settle on what lies between them.
    """

    def __init__(self, config, patch_size, overlap=0):
        super().__init__()
        self.patch_size, self.overlap, self.width = patch_size, overlap, config.width
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width, config.layer_norm_eps)
        side = patch_size + 2 * overlap
        self.head = nn.Linear(config.width, 3 * side**2)
        # From the edge inwards: 1/4m, 3/4m, ... up to 1, so that the weights of two neighbours add up to 1.
        edge = (torch.arange(side) + 0.5).minimum(side - 0.5 - torch.arange(side))  # (side,)
        fade = (edge / (2 * overlap)).clamp(max=1) if overlap else torch.ones(side)  # (side,)
        self.register_buffer("window", fade.outer(fade).flatten().repeat(3)[:, None], persistent=False)

    def forward(self, x, rows, columns):
        x = x.to(self.norm.weight.dtype)  # also under autocast: a stream in bf16 would round after every block
        x = x + sincos_positions(rows, columns, self.width).to(x)  # (B, N, d)
        for block in self.blocks:
            x = block(x)  # (B, N, d)
        x = self.head(self.norm(x)).transpose(1, 2)  # (B, 3*(q+2m)^2, N)
        painted = self.place(self.window * x, rows, columns)  # (B, 3, rows*q, columns*q)
        # The weights add up to 1, but at the image's edge, where no neighbour adds its part.
        return painted / self.place(self.window.expand(1, -1, rows * columns), rows, columns)

    def place(self, patches, rows, columns):
        """Patches (B, 3*(q+2m)^2, rows*columns) at their places, added where they overlap, as images."""
        q = self.patch_size
        return F.fold(patches, (rows * q, columns * q), q + 2 * self.overlap, padding=self.overlap, stride=q)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2: the tokenizer as a whole
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class VQRAEConfig:
    """Everything that a VQRAE is built from; `config.json` of a saved model holds just this."""

    encoder: ViTConfig
    image_size: int  # side of the images it was trained on
    output_patch_size: int  # q; equal to the encoder's p keeps the size of the image
    codebook_size: int  # K
    codebook_dim: int  # e
    quantizer: str = "simvq"  # a name in QUANTIZERS
    beta: float = 0.25
    beta_side: str = "commitment"
    output_overlap: int = 0  # pixels that a token's patch reaches into its neighbours, see Decoder

    def __post_init__(self):
        check_fields(self, ("image_size", "output_patch_size", "codebook_size", "codebook_dim"))
        if not 0 <= self.output_overlap <= self.output_patch_size // 2:
            raise InputError(f"output_overlap {self.output_overlap} is not from 0 to half of a patch of "
                             f"{self.output_patch_size} pixels")
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


class VQRAE(nn.Module, HubModel):
    """Representation-quantization autoencoder: one encoder, continuous features and discrete tokens."""

    made_by = "--stage 1 makes one, and --stage 2 a better one"

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, e = config.encoder.width, config.codebook_dim
        self.encoder = Encoder(config.encoder)
        # Not in the paper: channels of a pretrained encoder differ in scale, and a few would outweigh all others in a
        # distance. `start` sets both; until then they change nothing.
        self.register_buffer("feature_mean", torch.zeros(d))
        self.register_buffer("feature_std", torch.ones(d))
        # Fitted once training is over: what least squares reads of the features from a code vector and a 1 behind it.
        self.register_buffer("reading", torch.zeros(e + 1, d))
        self.project_in = nn.Linear(d, e)
        self.quantizer = QUANTIZERS[config.quantizer](config.codebook_size, e, config.beta, config.beta_side)
        self.project_out = nn.Linear(e, d)
        self.decoder = Decoder(config.encoder, config.output_patch_size, config.output_overlap)
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
            standardised = self.standardise(features.float())
            return self.project_in(standardised.to(self.project_in.weight.dtype)).float()

    def count(self, indices):
        """How often each of the K codes is among indices -> (K,) int64."""
        return torch.bincount(indices.flatten(), minlength=self.config.codebook_size)

    def features_of(self, z_q):
        """What least squares reads of the features (B, N, d) from codes (B, N, e), for the understanding of tokens.

        Raises InputError for a model saved before its reading was fitted.
        """
        if not self.reading.any():
            raise InputError("this model has no reading of features from its codes: it was saved without `fit_reading`")
        return F.pad(z_q.to(self.reading.dtype), (0, 1), value=1.0) @ self.reading

    def grid(self, images):
        """Rows and columns of tokens of images (B, 3, H, W)."""
        return images.shape[-2] // self.config.encoder.patch_size, images.shape[-1] // self.config.encoder.patch_size

    def forward(self, images):
        features = self.encoder(images)  # Z_I (B, N, d)
        z = self.project_features(features)  # Z^_c (B, N, e)
        z_q, indices, codebook_loss, commitment_loss = self.quantizer(z)  # Z_q (B, N, e), (B, N)
        bottleneck = self.project_out(z_q.to(self.project_out.weight.dtype))  # Z_bot (B, N, d)
        reconstruction = self.decoder(bottleneck, *self.grid(images))  # X' (B, 3, H*q/p, W*q/p)
        return Output(reconstruction, features, indices, codebook_loss, commitment_loss, z, z_q)

    @torch.no_grad()
    def encode(self, images):
        """Images (B, 3, H, W) in [0, 1] -> features (B, N, d), codes (B, N) int64 or None; InputError for all else."""
        check_images(images)
        features = self.encoder(images)  # (B, N, d)
        _, indices, _, _ = self.quantizer(self.project_features(features))  # (B, N)
        return features, indices

    @torch.no_grad()
    def decode(self, indices, rows=None):
        """Codes (B, N) of any integer type -> images (B, 3, rows*q, N/rows*q) in [0, 1].

        Without `rows`, N codes are those of a square image. Raises InputError for what cannot be decoded.
        """
        if isinstance(self.quantizer, NoQuantizer):
            raise InputError("this model has no codebook, so there are no codes to decode")
        z_q = self.quantizer.lookup(check_codes(indices, *self.quantizer.sizes()))  # (B, N, e)
        bottleneck = self.project_out(z_q.to(self.project_out.weight.dtype))  # (B, N, d)
        return self.decoder(bottleneck, *rows_and_columns(indices.shape[1], rows)).float().clamp(0, 1)

    @torch.no_grad()
    def start(self, features, patches, codebook_init="data", projection_init="pixels", generator=None):
        """Before the first step: fit standardisation, projections and codebook to training tokens (not in the paper).

        features (n, d) and patches (n, 3*p*p), the pixels of the same tokens. projection_init: "pixels", see
        `start_projections`; "features", the same at full scale in every direction, on random orthogonal axes; or
        "random", torch's own. codebook_init: "data", see `start_codebook`; or "gaussian", as it was made.
        """
        self.feature_mean.copy_(features.mean(0))
        self.feature_std.copy_(features.std(0) + 1e-6)
        if projection_init != "random":
            minor = 0.1 if projection_init == "pixels" else 1.0
            self.start_projections(self.standardise(features), patches, generator, minor)
        if codebook_init == "data" and not isinstance(self.quantizer, NoQuantizer):
            # Plain patches are many and are painted alike, whatever the encoder says of them. Left with all, k-means
            # spends a fifth of the codes there, and those die first once the encoder trains. A few tell all colours.
            spread = patches.unflatten(1, (3, -1)).std(2).amax(1)  # (n,)
            kept = (spread > 0.01) | (torch.rand(len(spread), generator=generator).to(spread.device) < 0.03)
            if kept.sum() < self.config.codebook_size:
                kept[:] = True  # too few others to start from
            self.quantizer.start(self.project_features(features[kept]), generator)

    def start_projections(self, features, patches, generator, minor=0.1):
        """`--projection-init pixels`: squared distances of z are half those of features, half those of told pixels.

        A distance among semantic features alone would spend codes on what no pixel shows. What features tell of the
        pixels of their own patch is read off by least squares. Most directions tell next to nothing, yet features vary
        most along them: all but the weightiest third start at a tenth (`minor`) of their scale. The way out starts as
        the pseudo-inverse of that third's way in, so that the decoder meets features from step 0 on.
        """
        features, patches = features.cpu(), patches.cpu()  # the one device that has all the solvers
        d, e = features.shape[1], self.config.codebook_dim
        ridge = 1e-3 * len(features) * torch.eye(d)
        told = torch.linalg.solve(features.T @ features + ridge, features.T @ (patches - patches.mean(0)))  # (d, 3*p*p)
        variance = (features @ told).pow(2).sum(1).mean().clamp(min=1e-12)  # 0 where all images are alike
        told = told * (d / variance).sqrt()  # as much variance as the features have
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

    @classmethod
    def _from_pretrained(cls, folder):  # `from_pretrained`, `save_pretrained` and `push_to_hub` are HubModel's
        return load_model(folder, "VQRAE", cls.made_by, lambda saved: cls(
            VQRAEConfig(**{**saved, "encoder": ViTConfig(**saved["encoder"])})), optional=["reading"])


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "Two-Stage Training": the losses. Stage 1, Eq. 2 and Eq. 4
# ----------------------------------------------------------------------------------------------------------------------


def unit(features, dim):
    """Features scaled to length 1 along `dim`. LPIPS adds its eps outside the root, whose gradient at 0 is infinite."""
    return features * (features.pow(2).sum(dim, keepdim=True) + 1e-8).rsqrt()


class VFMPerceptual(nn.Module):
    """`--perceptual vfm`: L_P as the distance between the frozen encoder's own features of both images.

    LPIPS' recipe on tokens, without download or convolution: behind each of the first sixth of the blocks (later ones
    are no better guides to pixels), scale each token to unit length and take squared differences. Encoder and decoder
    share one grid of patches, so the encoder would not see a seam between two: it is shown both images cropped, at one
    random offset. Added are the steps between neighbouring pixels, where an eye sees noise and seams.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, y, generator=None):
        """Originals x, reconstructions y (B, 3, H, W) in [0, 1] -> scalar; `generator` draws the offset."""
        p, window = self.encoder.config.patch_size, [...]  # batch and channels whole; then rows and columns
        for size in x.shape[-2:]:
            side = (size // p - 1) * p  # one patch less, so that the window has room to move by a whole one
            start = int(torch.randint(size - side + 1, (), generator=generator))
            window.append(slice(start, start + side))
        window, blocks = tuple(window), math.ceil(self.encoder.config.depth / 6)
        with torch.no_grad():
            targets = list(itertools.islice(self.encoder.hidden_states(x[window]), blocks))
        states = list(itertools.islice(self.encoder.hidden_states(y[window]), blocks))
        distances = [(unit(a.float(), -1) - unit(b.float(), -1)).pow(2).sum(-1).mean() for a, b in zip(states, targets)]
        gradients = [(y - x).diff(dim=dim).pow(2).mean() for dim in (-2, -1)]
        return sum(distances) / len(distances) / 2 + 2 * sum(gradients)


class PaperPerceptual(nn.Module):
    """`--perceptual lpips-convnext`, the paper's L_P: LPIPS on VGG16 + 0.1 x squared error of ConvNeXt-S logits, / 1.1.

    The weights are torchvision's and are fetched on first use; InputError when that fails. `vgg` (an lpips.LPIPS) and
    `convnext` can be handed in instead.
    """

    def __init__(self, vgg=None, convnext=None):
        super().__init__()
        vgg, convnext = vgg or lpips_vgg(), convnext or convnext_small()
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
    """LeCam (Tseng et al. 2021), against a discriminator that wins outright where data are few: logits -> scalar.

    Real logits should not rise far above the running average of fake ones, nor fake ones fall far below that of real.
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

    def loss(self, real, fake, lecam_weight=0.001, over_ranks=lambda means: None):
        """What the discriminator minimises on originals and reconstructions, hinge + LeCam, and a dict of scalars.

        LeCam looks at mean logits. When several processes share a batch, `over_ranks` replaces each tensor of a list by
        its mean over the processes. `remember` is for afterwards.
        """
        real, fake = self(real), self(fake.detach())  # (B, 1, 16, 16)
        hinge, means = hinge_loss(real, fake), [real.mean(), fake.mean()]
        whole = [mean.detach().clone() for mean in means]  # of the batch, where `means` are of this process' share
        over_ranks(whole)
        # The whole batch's value with this share's gradient; those of all processes are averaged later.
        real_mean, fake_mean = (mean + (all_of_it - mean).detach() for mean, all_of_it in zip(means, whole))
        lecam = lecam_penalty(real_mean, fake_mean, self.real_average, self.fake_average)
        return hinge + lecam_weight * lecam, {"hinge": hinge, "real_logit": means[0], "fake_logit": means[1]}

    @torch.no_grad()
    def remember(self, real_mean, fake_mean, decay=0.999):
        """Move LeCam's averages by the mean logits of a whole batch, once a step and after its use."""
        self.real_average.lerp_(real_mean, 1 - decay)
        self.fake_average.lerp_(fake_mean, 1 - decay)


def stage2_loss(images, out, perceptual, perceptual_weight=1.1, quantizer_weight=1.0, generator=None,
                teacher_features=None, distillation_weight=1.0, discriminator=None, adversarial_weight=0.1):
    """Eq. 6, L_stage2 = l2 + 1.1 L_P + 0.1 L_G + L_quant + L_distill, and its terms as a dict of scalars.

    Stage 1's loss plus what is given: `teacher_features` for the distillation, and once its time has come the
    `discriminator`: L_G is minus its mean logit on X'.
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
# Section 3.5, "Visual Generation with VQRAE": Qwen3's transformer over text and visual codes reads text, writes codes
# ----------------------------------------------------------------------------------------------------------------------

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
    max_tokens: int = 1536  # of text and image together (Table 9)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    def __post_init__(self):
        check_fields(self, ("text_vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width"))
        if self.heads % self.kv_heads or self.head_width % 2:
            raise InputError(f"heads (--heads) {self.heads} must be a multiple of kv_heads {self.kv_heads}, and "
                             f"head_width {self.head_width} even")
        if self.image_tokens + 2 > self.max_tokens:
            raise InputError(f"an image of {self.image_tokens} tokens leaves no room for text in {self.max_tokens}")


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


class CausalAttention(nn.Module):
    """Qwen3's attention: grouped queries, RMSNorm on every head of q and k before the rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        h, d = config.head_width, config.width
        self.q = nn.Linear(d, config.heads * h, bias=False)
        self.k, self.v = (nn.Linear(d, config.kv_heads * h, bias=False) for _ in range(2))
        self.out = nn.Linear(config.heads * h, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(h, config.norm_eps), RMSNorm(h, config.norm_eps)

    def forward(self, x, turn, mask, cache=None, layer=0):
        """x (B, n, d) -> (B, n, d). turn: see `rotate`; mask: see `attend`; layer: which part of the cache is ours."""
        B, n, _ = x.shape
        h = self.config.head_width
        q, k, v = (linear(x).view(B, n, -1, h) for linear in (self.q, self.k, self.v))  # each (B, n, its heads, h)
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
        self.gate, self.up = (nn.Linear(d, config.mlp_width, bias=False) for _ in range(2))
        self.down = nn.Linear(config.mlp_width, d, bias=False)

    def forward(self, x, *where):  # turn, mask, cache and layer of CausalAttention
        x = x + self.attention(self.norm1(x), *where)  # (B, n, d)
        y = self.norm2(x)  # (B, n, d)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # (B, n, d)


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one of K by logits (B, K) -> (B,), among the top_k likeliest (0: all) and the fewest that make up top_p."""
    if temperature < 1e-6:  # divided by less, logits would be no numbers
        return logits.argmax(1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[1]:
        kept = logits.topk(top_k, dim=1)  # by place, not by value: of equally likely codes no more than asked
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values)
    if top_p < 1:
        ordered, order = logits.softmax(1).sort(dim=1, descending=True)
        drop = ordered.cumsum(1) - ordered >= top_p  # what stands before it is enough already
        drop[:, 0] = False  # also where top_p is 0 in float32
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    draw = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)[:, 0]  # on the CPU: one seed, one picture
    return draw.to(logits.device)


class VisualLM(nn.Module, HubModel):
    """Text and visual tokens in one vocabulary, predicted from left to right: tokens (B, n) -> logits (B, n, V + K)."""

    Config, made_by = LMConfig, "--stage ar makes one"

    def __init__(self, config, text=None):
        super().__init__()
        self.config = config
        self.text = text  # the tokenizers.Tokenizer of its text; None when only tokens come and go
        self.embedding = nn.Embedding(config.text_vocabulary + config.codebook_size, config.width)  # also the head
        self.blocks = nn.ModuleList([CausalBlock(config) for _ in range(config.depth)])
        self.norm = RMSNorm(config.width, config.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def transform(self, x, first=None, cache=None):
        """What the blocks make of embedded tokens (B, n, d) -> (B, n, d), each seeing itself and those to its left.

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
        """The tokens that an image's codes follow: those of its caption, "" for none, and the start of the image.

        A caption that does not fit `max_tokens` is cut; `generate` refuses it.
        """
        room = max(0, self.config.max_tokens - self.config.image_tokens - 1)
        return tokens_of(self.text, caption)[:room] + [id_of(self.text, START_OF_IMAGE)]

    def pack(self, prompts, codes=None):
        """Prompts, B lists of ids padded on the left, and codes (B, N) behind them -> tokens (B, n), `first` (B,)."""
        longest, device = max(map(len, prompts)), self.embedding.weight.device
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        if codes is not None:
            tokens = torch.cat([tokens, codes.to(device) + self.config.text_vocabulary], dim=1)
        return tokens, torch.tensor([longest - len(prompt) for prompt in prompts], device=device)

    def generate(self, text, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, seed=0, progress=iter):
        """Draw an image for each caption of the list `text`, "" for no caption -> codes (B, N), for `VQRAE.decode`.

        A single caption may be a string. Options as in `extend`; the same seed and captions draw the same codes.
        Raises InputError for what is no caption, and for options with which nothing can be drawn.
        """
        captions = list_of_texts(text)
        prompts = [self.prompt(caption) for caption in captions]
        for caption, prompt in zip(captions, prompts):
            if len(tokens_of(self.text, caption)) >= len(prompt):
                raise InputError(f"a caption may have {len(prompt) - 1} tokens here, and {caption[:40]!r}... has more")
        generator = torch.Generator().manual_seed(number_in("seed", seed, -2**63, 2**64 - 1, Integral))
        return self.extend(prompts, self.config.image_tokens, self.prompt(""), cfg_scale, temperature, top_k, top_p,
                           generator, progress)

    @torch.inference_mode()
    def extend(self, prompts, count, without=None, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None,
               progress=iter):
        """Continue every prompt, a list of token ids, by `count` visual tokens -> codes (B, count) in [0, K).

        Classifier-free guidance: with `cfg_scale` other than 1, logits are those of the prompt `without` its caption
        plus cfg_scale times the difference that the caption makes. temperature 0 takes the likeliest code.
        `progress` wraps the range of steps, as tqdm does.
        """
        cfg_scale, temperature, top_k, top_p = check_sampling(cfg_scale, temperature, top_k, top_p)
        check_prompts(prompts, len(self.embedding.weight), count, self.config.codebook_size)
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

        with quick_products(self, weight[V:]) as head:  # the same products, quicker on a CPU
            for _ in progress(range(count)):
                x = self.transform(self.embedding(tokens), first, cache)[:, -1]  # (B or 2B, d)
                codes.append(self.draw(x, head, pick))  # (B,)
                tokens = torch.cat([V + codes[-1]] * (2 if guided else 1))[:, None]  # (B or 2B, 1)
        return torch.stack(codes, dim=1)  # (B, count)

    def draw(self, x, head, pick):  # a method of its own, for in unitok.py a place has several codes
        """The codes (B,) that `pick` takes by the logits of what follows x (B or 2B, d): only codes may follow."""
        return pick(head(x).float())

    def _save_pretrained(self, folder):  # with tokenizer.json beside
        save_model(self, folder, self.text)

    @classmethod
    def _from_pretrained(cls, folder):
        model = load_model(folder, cls.__name__, cls.made_by, lambda saved: cls(cls.Config(**saved)))
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
        replace(self.lm, image_tokens=(self.image_size // self.encoder.patch_size) ** 2)  # checks that an image fits


class Captioner(nn.Module, HubModel):
    """A language model that reads an image's features Z_I in the place of words and continues with its caption.

    The paper puts its encoder into ready ones (LLaVA-1.5, InternVL3); this is one small enough to be trained here.
    """

    made_by = "--stage caption makes one"

    def __init__(self, config, text=None):
        super().__init__()
        self.config = config
        d = config.lm.width
        self.encoder = Encoder(config.encoder)
        self.projector = nn.Sequential(nn.Linear(config.encoder.width, d), nn.GELU(), nn.Linear(d, d))  # mlp2x_gelu
        self.lm = VisualLM(config.lm, text)

    def read(self, features):
        """Features (B, N, d of the encoder) -> what the transformer meets before the text (B, N + 1, d)."""
        start = self.lm.embedding.weight[id_of(self.lm.text, START_OF_IMAGE)]  # (d,)
        return torch.cat([start.expand(len(features), 1, -1), self.projector(features)], dim=1)

    def tokens(self, caption):
        """A caption, cut where it does not fit behind an image, as the tokens that are to be written and their end."""
        room = self.config.lm.max_tokens - (self.config.image_size // self.config.encoder.patch_size) ** 2 - 2
        return tokens_of(self.lm.text, caption)[:max(0, room)] + [id_of(self.lm.text, END_OF_TEXT)]

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
        check_images(images)
        most = number_in("most", most, 1, 2**20, Integral)
        x, end = self.read(self.encoder(images)), id_of(self.lm.text, END_OF_TEXT)  # (B, N + 1, d)
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

    def _save_pretrained(self, folder):  # the encoder included, and tokenizer.json beside
        save_model(self, folder, self.lm.text)

    @classmethod
    def _from_pretrained(cls, folder):
        model = load_model(folder, "Captioner", cls.made_by, lambda saved: cls(
            CaptionerConfig(ViTConfig(**saved["encoder"]), saved["image_size"], LMConfig(**saved["lm"]))))
        model.lm.text = load_text_tokenizer(Path(folder) / "tokenizer.json", model.config.lm.text_vocabulary)
        return model


# ----------------------------------------------------------------------------------------------------------------------
# Section 4.1's pretrained weights: encoders of six families, and Qwen3, from folders in the hub's layout
# ----------------------------------------------------------------------------------------------------------------------

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
    ("norm.", "layernorm.", "post_layernorm.", "", "layernorm."),
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
    "intern_vit_6b": (3, "InternVisionModel", {  # so called in the 300M's config too
        "qk_normalization": True, "norm_type": "rms_norm"}, {"final_norm": "none"}),
    "internvl_vision": (4, "InternVLVisionModel", {"hidden_act": "gelu", "attention_bias": False}, {
        "final_norm": "none"}),
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

    A folder of a trained VQRAE gives the encoder inside it. In eval mode and float32; InputError if it does not fit.
    """
    folder = hub_folder(source)
    path = folder / "config.json"
    hub = read_config(path)
    if "codebook_dim" in hub:
        return load_model(folder, "VQRAE", "--stage 1 makes one", lambda saved: nn.ModuleDict(
            {"encoder": Encoder(ViTConfig(**saved["encoder"]))}))["encoder"]
    fields = vision_fields(hub, path, {kind: family[2:] for kind, family in FAMILIES.items()}, ACTIVATIONS)
    sizes = without_memory(path, "an encoder", lambda: Encoder(ViTConfig(**fields)))
    column, expected = FAMILIES[sizes.config.family][0], sizes.state_dict()
    weights = vision_weights(folder, {name: hub_names(name, column) for name in expected}, dinov2=column == 1)
    for name in ("cls_token", "positions"):  # some families store them without the batch dimension
        if name in expected and weights[name].numel() == expected[name].numel():
            weights[name] = weights[name].reshape(expected[name].shape)
    check_weights(expected, weights, folder)
    encoder = Encoder(sizes.config)
    encoder.load_state_dict(weights)
    return encoder.eval()


def qwen3_name(name):
    """The name that Qwen3 checkpoints on the hub use for our parameter `name`."""
    for ours, theirs in (("embedding.", "embed_tokens."), ("blocks.", "layers."), ("attention.", "self_attn."),
                         (".q.", ".q_proj."), (".k.", ".k_proj."), (".v.", ".v_proj."), (".out.", ".o_proj."),
                         ("norm1.", "input_layernorm."), ("norm2.", "post_attention_layernorm."),
                         (".gate.", ".mlp.gate_proj."), (".up.", ".mlp.up_proj."), (".down.", ".mlp.down_proj.")):
        name = name.replace(ours, theirs)
    return "model." + name


def load_qwen3(source, codebook_size, image_tokens=0):
    """A VisualLM from a Qwen3 checkpoint, a folder in the hub's layout or a hub id, with rows for K codes appended.

    All rows of the text embedding stay, padding included, so code k is token vocab_size + k. New rows start as Qwen3's
    own did, N(0, 0.02^2). Its text tokenizer comes along. InputError for what is no Qwen3 with tied embeddings.
    """
    folder = hub_folder(source)
    path = folder / "config.json"
    fields = qwen3_fields(read_config(path), path)
    sizes = without_memory(path, "a Qwen3", lambda: VisualLM(LMConfig(**fields, codebook_size=0)))
    config, expected = replace(sizes.config, codebook_size=codebook_size, image_tokens=image_tokens), sizes.state_dict()
    weights = read_checkpoint(folder)
    ours = {name: weights[qwen3_name(name)] for name in expected if qwen3_name(name) in weights}
    check_weights(expected, ours, folder)
    model = VisualLM(config)
    codes = model.embedding.weight.detach()[config.text_vocabulary:]
    ours["embedding.weight"] = torch.cat([ours["embedding.weight"], codes])
    model.load_state_dict(ours)
    if (folder / "tokenizer.json").exists():
        model.text = load_text_tokenizer(folder / "tokenizer.json", config.text_vocabulary)
    return model.eval()

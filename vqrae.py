"""VQRAE in one file, in the order of the paper (Du et al. 2025, arXiv 2511.23386).

    images -> encoder E -> Linear d->e -> SimVQ codebook -> Linear e->d -> symmetric decoder D -> images

Shapes used in the comments, with the paper's letter where it has one:
    B  images in a batch            d  width of encoder and decoder     p  patch side the encoder reads
    N  tokens of an image, hw/p^2   e  width of a code                  q  patch side the decoder writes
    K  codes in the codebook (n and k in the paper)
Images are float tensors (B, 3, H, W) in [0, 1] everywhere; each encoder applies its own mean and std.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


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
    layer_norm_eps: float = 1e-6
    layer_scale: bool = True
    mean: tuple = (0.485, 0.456, 0.406)  # ImageNet's, which DINOv2 was trained with
    std: tuple = (0.229, 0.224, 0.225)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, d) -> (B, N, d)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, N, d = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, d/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d/heads)
        return self.out(x.transpose(1, 2).reshape(B, N, d))  # (B, N, d)


class Block(nn.Module):
    """Pre-norm transformer block with optional LayerScale, (B, N, d) -> (B, N, d)."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = Attention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, width))
        self.scale1 = nn.Parameter(torch.ones(width)) if config.layer_scale else 1.0
        self.scale2 = nn.Parameter(torch.ones(width)) if config.layer_scale else 1.0

    def forward(self, x):
        x = x + self.scale1 * self.attention(self.norm1(x))  # (B, N, d)
        x = x + self.scale2 * self.mlp(self.norm2(x))  # (B, N, d)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "VFMs as Unified Encoder": a pretrained vision transformer E
# ----------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The vision foundation model E: images (B, 3, H, W) in [0, 1] -> features Z_I (B, N, d), N = HW/p^2.

    The layout is DINOv2's: a class token first, learned positions, LayerScale, and a final norm.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, p = config.width, config.patch_size
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)
        # Stride equals kernel: not a convolution over the image but one Linear applied to each patch.
        self.patch_embed = nn.Conv2d(3, d, kernel_size=p, stride=p)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (config.image_size // p) ** 2, d) * 0.02)  # class token first
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)

    def positions_for(self, rows, columns):
        """Learned positions for a grid of patches (1, 1 + rows*columns, d), resized bicubically as DINOv2 does."""
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.positions
        cls, grid = self.positions[:, :1], self.positions[:, 1:]
        grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()  # (1, d, side, side)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)  # (1, d, rows, columns)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)  # (1, 1 + rows*columns, d)

    def hidden_states(self, images):
        """All tokens, class token included, after every block: a list of `depth` tensors (B, 1 + N, d), before the norm.

        Raises InputError when the image's sides are not multiples of the patch size.
        """
        p = self.config.patch_size
        if images.shape[-2] % p or images.shape[-1] % p:
            raise InputError(f"images of {images.shape[-2]} x {images.shape[-1]} pixels do not divide into patches of {p}")
        x = self.patch_embed((images - self.mean) / self.std)  # (B, d, H/p, W/p)
        positions = self.positions_for(*x.shape[-2:])  # (1, 1 + N, d)
        x = x.flatten(2).transpose(1, 2)  # (B, N, d)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + positions  # (B, 1 + N, d)
        states = []
        for block in self.blocks:
            x = block(x)  # (B, 1 + N, d)
            states.append(x)
        return states

    def forward(self, images):
        return self.norm(self.hidden_states(images)[-1])[:, 1:]  # (B, N, d)


def hub_name(name):
    """The name that DINOv2 checkpoints on the hub use for our parameter `name`; query, key, value stand apart there."""
    for ours, theirs in (
        ("cls_token", "embeddings.cls_token"),
        ("positions", "embeddings.position_embeddings"),
        ("patch_embed.", "embeddings.patch_embeddings.projection."),
        ("blocks.", "encoder.layer."),
        ("attention.out.", "attention.output.dense."),
        ("attention.qkv.", "attention.attention.{}."),
        ("mlp.0.", "mlp.fc1."),
        ("mlp.2.", "mlp.fc2."),
        ("scale1", "layer_scale1.lambda1"),
        ("scale2", "layer_scale2.lambda1"),
    ):
        name = name.replace(ours, theirs)
    return "layernorm." + name[len("norm."):] if name.startswith("norm.") else name


def hub_state_dict(encoder):
    """The encoder's weights under the hub's names, ready for `save_file`; `load_encoder` and transformers read them."""
    weights = {}
    for name, tensor in encoder.state_dict().items():
        if "qkv" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            weights.update({hub_name(name).format(part): piece.contiguous() for part, piece in parts})
        else:
            weights[hub_name(name)] = tensor.contiguous()
    return weights


def read_json(path):
    """The parsed JSON file; InputError names the path when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def read_safetensors(path):
    """The tensors of a safetensors file by name; InputError names the path when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the weights in {path}: {error}") from None


def load_weights(module, weights, path):
    """Put named tensors into a module, all of them; InputError names the first missing name or wrong shape."""
    for name, tensor in module.state_dict().items():
        if name not in weights:
            raise InputError(f"{path} has no tensor {name!r}, so it does not fit its config.json")
        if weights[name].shape != tensor.shape:
            expected, found = tuple(tensor.shape), tuple(weights[name].shape)
            raise InputError(f"{path}: tensor {name!r} has shape {found} where config.json asks for {expected}")
    module.load_state_dict({name: weights[name] for name in module.state_dict()})


def load_encoder(source):
    """Load a DINOv2 checkpoint: a folder in the hub's layout (config.json + model.safetensors), or a hub id.

    Returns an Encoder in eval mode and float32. Raises InputError when the source cannot be had or does not fit.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(source), allow_patterns=["*config.json", "model.safetensors"]))
        except Exception as error:  # offline, no such id, no permission: huggingface_hub has many ways to say no
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"no encoder at {source!r}: not a folder, and the hub says: {reason}") from None
    hub = read_json(folder / "config.json")
    if hub.get("model_type") != "dinov2" or hub.get("use_swiglu_ffn") or hub.get("hidden_act") != "gelu":
        raise InputError(f"{folder}/config.json is of type {hub.get('model_type')!r}; this loader reads DINOv2 S, B and L")
    pixels = folder / "preprocessor_config.json"
    pixels = read_json(pixels) if pixels.exists() else {}
    try:
        config = ViTConfig(
            image_size=hub["image_size"],
            patch_size=hub["patch_size"],
            width=hub["hidden_size"],
            depth=hub["num_hidden_layers"],
            heads=hub["num_attention_heads"],
            mlp_width=int(hub["hidden_size"] * hub["mlp_ratio"]),
            layer_norm_eps=hub["layer_norm_eps"],
            mean=tuple(pixels.get("image_mean", ViTConfig.mean)),
            std=tuple(pixels.get("image_std", ViTConfig.std)),
        )
    except KeyError as error:
        raise InputError(f"{folder}/config.json lacks {error}") from None
    encoder = Encoder(config)
    theirs = read_safetensors(folder / "model.safetensors")
    weights = {}
    for name in encoder.state_dict():
        parts = [hub_name(name).format(part) for part in (("query", "key", "value") if "qkv" in name else ("",))]
        missing = [part for part in parts if part not in theirs]
        if missing:
            raise InputError(f"{folder}/model.safetensors has no tensor {missing[0]!r}")
        weights[name] = torch.cat([theirs[part].float() for part in parts])
    load_weights(encoder, weights, folder / "model.safetensors")
    return encoder.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


def linear_probe(train_features, train_labels, test_features, test_labels, strengths=(0.001, 0.01, 0.1)):
    """Accuracy in [0, 1] on the test set of multinomial logistic regression on standardised features (n, d).

    `strengths` are values of C, the weight of the data against half the squared norm of the weights; the best of them
    counts, as for the figures in the README. The problem is convex, so the answer does not depend on a seed.
    """
    mean, std = train_features.double().mean(0), train_features.double().std(0) + 1e-6
    train, test = (train_features.double() - mean) / std, (test_features.double() - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    best = 0.0
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    for C in strengths:  # from the strongest regularisation on, each solution is the start of the next
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            logits = train @ weight.T + bias  # (n, classes)
            loss = F.cross_entropy(logits, train_labels, reduction="sum") + weight.pow(2).sum() / (2 * C)
            loss.backward()
            return loss

        optimizer.step(closure)
        accuracy = ((test @ weight.T + bias).argmax(1) == test_labels).double().mean().item()
        best = max(best, accuracy)
    return best

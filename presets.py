"""The settings of a training run as plain data: Tables 7 to 9 of the paper, and tiny ones for two CPU cores."""

from dataclasses import dataclass, replace
from pathlib import Path

from support.settings import setting
from vqrae import QUANTIZERS

ROOT = Path(__file__).resolve().parent


@dataclass(kw_only=True)
class CommonConfig:
    """Settings of every stage."""

    data: str = setting("images", "folder of images, flat or a folder a class; a set that datasets saved; "
                        "hub:USER/NAME; tars of WebDataset: a folder, shards-{000..009}.tar, a URL")
    steps: int = setting("optimisation", "training steps")
    batch_size: int = setting("optimisation", "images a step", most=2**20)
    accumulate: int = setting("optimisation", "parts a step's images are taken in, to save memory")
    learning_rate: float = setting("optimisation", "at its highest; of all without a rate of its own")
    muon_learning_rate: float = setting("optimisation", "of matrices in blocks that start untrained, which Muon moves; "
                                        "0: AdamW does", zero=True)
    end_factor: float = setting("optimisation", "share of a rate left at the end of its cosine", zero=True, most=1)
    warmup_steps: int = setting("optimisation", "steps over which learning rates rise")
    weight_decay: float = setting("optimisation", "AdamW's, on matrices only", zero=True)
    max_grad_norm: float = setting("optimisation", "gradients are scaled down to this norm")
    ema_decay: float = setting("optimisation", "of the averaged weights, which are saved", zero=True, most=1)
    betas: tuple = (0.9, 0.999)
    adam_epsilon: float = 1e-8


@dataclass(kw_only=True)
class TrainingConfig(CommonConfig):
    """Settings of stage 1 or 2, Table 7's rows among them."""

    encoder: str = setting("model", "vision encoder: a folder in the hub's layout, a hub id, or a folder of a VQRAE")
    image_size: int = setting("images", "side of the training images in pixels", most=16384)
    features: str = setting("model", "Z_I, behind the encoder's last norm or before it, where LLaVA reads",
                            choices=["behind_norm", "before_norm"])
    output_patch_size: int | None = setting("model", "q, side of a token's output (default: p)", most=1024)
    output_overlap: int = setting("model", "pixels that a token paints beyond its patch on every side, blended; paper: "
                                  "0", zero=True, most=512)
    quantizer: str = setting("model", "simvq: the paper's; vq: plain; none: continuous", choices=list(QUANTIZERS))
    codebook_size: int = setting("model", "number of codes, K")
    codebook_dim: int = setting("model", "width of a code, e")
    beta_side: str = setting("loss", "which term of Eq. 3 the 0.25 weighs", choices=["commitment", "codebook"])
    codebook_init: str = setting("model", "k-means of features, or the SimVQ authors'", choices=["data", "gaussian"])
    start_tokens: int = setting("model", "features that the starts look at, at least 4 a code")
    projection_init: str = setting("model", "pixels: distances that count what features tell of pixels; features: all "
                                   "else in full too; random: torch's", choices=["pixels", "features", "random"])
    perceptual: str = setting("loss", "vfm: the encoder's own features; lpips-convnext: the paper's networks, fetched "
                              "on first use", choices=["vfm", "lpips-convnext", "none"])
    perceptual_weight: float = setting("loss", "of the perceptual loss (paper: 1.1)", zero=True)
    quantizer_weight: float = setting("loss", "of the quantizer's two losses (paper: 1)", zero=True)
    distillation_weight: float = setting("loss", "of Eq. 5 when the encoder trains (paper: 1)", zero=True)
    adversarial_weight: float = setting("loss", "of L_G (paper: 0 in stage 1, 0.1 in stage 2)", zero=True)
    discriminator_start: int = setting("loss", "step at which discriminator and L_G set in", zero=True)
    discriminator_width: int = setting("loss", "channels of its first stage, a multiple of 32 (TiTok: 128)")
    encoder_learning_rate: float = setting("optimisation", "of the encoder; 0 keeps it frozen", zero=True)
    discriminator_learning_rate: float = setting("optimisation", "of the discriminator", zero=True)


@dataclass(kw_only=True)
class LanguageConfig(CommonConfig):
    """Settings of a transformer that writes codes (stage ar, Table 9) or captions (stage caption, Table 8)."""

    qwen3: str | None = setting("model", "Qwen3 checkpoint to start from, a folder or a hub id, with its own sizes")
    text_vocabulary: int = setting("model", "tokens of the text tokenizer at most, 256 are bytes")
    width: int = setting("model", "of the transformer, d")
    depth: int = setting("model", "blocks")
    heads: int = setting("model", "query heads")
    kv_heads: int = setting("model", "key and value heads, a divisor of the query heads")
    head_width: int = setting("model", "channels of a head, an even number")
    mlp_width: int = setting("model", "channels inside the MLP")


@dataclass(kw_only=True)
class GenerationConfig(LanguageConfig):
    """Settings of stage ar."""

    tokenizer: str = setting("model", "the VQRAE whose codes are predicted, a folder")
    caption_dropout: float = setting("images", "share without their caption, for guidance", zero=True, most=1)
    style_dropout: float = setting("images", "share of captions that do not name the style", zero=True, most=1)
    code_noise: float = setting("images", "largest share of an image's codes misread in training", zero=True, most=1)
    recolour: str = setting("images", "learn what is captioned \"green ...\" in other colours too, its hue turned",
                            choices=["yes", "no"])


@dataclass(kw_only=True)
class CaptionConfig(LanguageConfig):
    """Settings of stage caption. Table 8 tunes a ready language model; here a small one is trained from scratch."""

    encoder: str = setting("model", "the encoder that is read")
    image_size: int = setting("images", "side of the images", most=16384)


# Settings that a Qwen3 checkpoint brings with it, and settings that stage 2 takes over from the model of stage 1.
FIXED_BY_QWEN3 = ("text_vocabulary", "width", "depth", "heads", "kv_heads", "head_width", "mlp_width")

FIXED_BY_STAGE_1 = ("encoder", "image_size", "features", "output_patch_size", "output_overlap", "quantizer",
                    "codebook_size", "codebook_dim", "beta_side", "codebook_init", "start_tokens", "projection_init")

TINY = TrainingConfig(
    data=str(ROOT / "data/emoji"),
    encoder=str(ROOT / "data/tiny_vit"),
    image_size=64,
    features="before_norm",  # how long a token is tells of pixels, and the last norm takes that away
    output_patch_size=None,
    output_overlap=2,
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
    steps=1000,
    batch_size=32,
    accumulate=1,
    learning_rate=2e-3,
    muon_learning_rate=8e-3,
    encoder_learning_rate=0.0,
    discriminator_learning_rate=0.0,
    end_factor=0.01,
    warmup_steps=50,
    weight_decay=1e-4,
    max_grad_norm=1.0,
    ema_decay=0.998,
)

# A Qwen3 small enough for two CPU cores. `adam_epsilon` is Table 9's.
TINY_LM = dict(qwen3=None, text_vocabulary=1024, width=256, depth=6, heads=4, kv_heads=2, head_width=64, mlp_width=768,
               data=TINY.data, accumulate=1, muon_learning_rate=0.0, max_grad_norm=1.0, warmup_steps=100,
               end_factor=0.01, adam_epsilon=1e-15)

# Table 7, with our decisions (docs/paper.md) where it is silent, among them how codebook and projections start.
PAPER_1 = replace(
    TINY,
    data=str(ROOT / "data/photos"),
    encoder="google/siglip2-so400m-patch16-256",
    image_size=256,
    features="behind_norm",
    output_overlap=0,
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
    ema_decay=0.999,
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

# The ViT inside InternVL3, not the one that is alone: only that one can be put back without training.
INTERNVIT = {"encoder": "OpenGVLab/InternVL3-8B-hf", "image_size": 448, "batch_size": 768}

DINOV2_S = {"encoder": "facebook/dinov2-small", "image_size": 224, "codebook_dim": 512}

PRESETS = {
    # Made for two CPU cores and a few minutes, with nothing to download.
    "tiny": {
        "1": TINY,
        # Before their last norm the features' variance is 13 times what it is behind it, so distillation has a tenth of
        # the paper's weight. The adversarial loss has a fiftieth: more costs PSNR and brings features no closer.
        "2": replace(TINY, distillation_weight=0.1, adversarial_weight=0.002, discriminator_start=1200, steps=1500,
                     learning_rate=7e-4, muon_learning_rate=3.5e-3, encoder_learning_rate=1e-3,
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

# The default sampling, chosen by measurement for the tiny preset: a higher temperature makes pictures more varied and
# less like what was asked for; the likeliest codes alone leave some pages blank.
SAMPLING = {"cfg_scale": 1.25, "temperature": 0.2}

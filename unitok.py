"""UniTok's choices on top of VQRAE (Ma et al. 2025, arXiv 2502.20321), and two more quantizers to hold beside them.

VQRAE has one codebook of many dimensions behind linear projections. UniTok has many small codebooks of few dimensions
behind attention, and learns from captions as well as from pixels. Whatever is not here is VQRAE's: encoder, decoder,
training and metrics are those of `vqrae.py`, so a comparison compares the choices and nothing else.

Shapes as in `vqrae.py`, and
    M  codebooks (n in UniTok's paper)    S  codes in each of them, K / M: K counts the codes of all codebooks
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather

import vqrae
from presets import TrainingConfig
from support.files import PRETRAINED, InputError, check_fields, load_model, read_json, save_model
from support.settings import setting
from support.text import caption_of, load_text_tokenizer, train_text_tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.3, "Multi-Codebook Quantization"
# ----------------------------------------------------------------------------------------------------------------------


class CosineVQ(vqrae.VectorQuantizer):
    """Plain vector quantization on the unit sphere: the nearest code is the one of the largest cosine.

    Between unit vectors ||z - q||^2 = 2 - 2 cos(z, q), so the search, the losses and the straight-through estimator are
    those of `VectorQuantizer`. The length of z is lost.
    """

    def project(self, codes):
        return F.normalize(codes, dim=-1)  # (n, e)

    def forward(self, z):
        return super().forward(F.normalize(z.float(), dim=-1))

    def start(self, z, generator):
        super().start(F.normalize(z, dim=-1), generator)


class MultiCodebook(nn.Module):
    """Channels in M equal chunks, each with a small codebook of its own, instead of one large codebook for all.

    M codebooks of S codes each tell S^M tokens apart, where one codebook with as many codes tells M * S apart; and a
    search among S codes of few dimensions is cheap. The losses are means over the codebooks. `single` makes each of
    them: UniTok's is CosineVQ.
    """

    def __init__(self, codebooks, codebook_size, dim, beta=0.25, beta_side="commitment", single=CosineVQ):
        super().__init__()
        if codebook_size % codebooks or dim % codebooks:
            raise InputError(f"{codebook_size} codes of {dim} dimensions cannot be shared out evenly to {codebooks} "
                             "codebooks; choose another --codebooks, --codebook-size or --codebook-dim")
        self.parts = nn.ModuleList([single(codebook_size // codebooks, dim // codebooks, beta, beta_side)
                                    for _ in range(codebooks)])

    def sizes(self):
        """S and M, as in VectorQuantizer."""
        return len(self.parts[0].codebook), len(self.parts)

    def lookup(self, indices):
        """Effective codes (..., e) of indices (..., M)."""
        return torch.cat([part.lookup(i) for part, i in zip(self.parts, indices.unbind(-1))], dim=-1)

    def forward(self, z):
        """Quantize z (..., e) -> z_q (..., e), indices (..., M) in [0, S), codebook loss, commitment loss."""
        chunks = z.chunk(len(self.parts), dim=-1)  # M of (..., e/M)
        z_q, indices, *losses = zip(*(part(chunk) for part, chunk in zip(self.parts, chunks)))
        return torch.cat(z_q, dim=-1), torch.stack(indices, dim=-1), *(torch.stack(loss).mean() for loss in losses)

    def start(self, z, generator):
        """Codes start as k-means centres of their chunks of z (n, e)."""
        for part, chunk in zip(self.parts, z.chunk(len(self.parts), dim=-1)):
            part.start(chunk, generator)


# ----------------------------------------------------------------------------------------------------------------------
# Table 7: residual quantization (Lee et al. 2022), the comparator
# ----------------------------------------------------------------------------------------------------------------------


class ResidualPart(vqrae.VectorQuantizer):
    """One depth of `ResidualVQ`. Its code 0 is the zero vector for good: to add nothing is always a choice."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.zeros_(self.codebook[0])

    def lookup(self, indices):
        return F.embedding(indices, self.codebook, padding_idx=0)  # no gradient reaches code 0

    def start(self, z, generator):
        super().start(z, generator)
        with torch.no_grad():
            self.codebook[0] = 0


class ResidualVQ(nn.Module):
    """M codebooks of all dimensions, each for what those before it have left: z ~ q_1 + ... + q_M, coarse to fine.

    Where MultiCodebook divides the channels, this divides the precision. The m-th commitment loss, of the m-th residual
    to its code, is that of z to the sum of the first m codes.
    """

    def __init__(self, codebooks, codebook_size, dim, beta=0.25, beta_side="commitment"):
        super().__init__()
        if codebook_size % codebooks:
            raise InputError(f"{codebook_size} codes cannot be shared out evenly to {codebooks} codebooks; choose "
                             "another --codebooks or --codebook-size")
        self.parts = nn.ModuleList([ResidualPart(codebook_size // codebooks, dim, beta, beta_side)
                                    for _ in range(codebooks)])

    def sizes(self):
        """S and M, as in VectorQuantizer."""
        return len(self.parts[0].codebook), len(self.parts)

    def lookup(self, indices):
        """Effective codes (..., e), the sums of the codes that indices (..., M) name."""
        return sum(part.lookup(i) for part, i in zip(self.parts, indices.unbind(-1)))

    def forward(self, z):
        """Quantize z (..., e) -> z_q (..., e), indices (..., M) in [0, S), codebook loss, commitment loss."""
        residual, q, results = z.float(), 0, []
        for part in self.parts:
            _, *result = part(residual)
            code = part.lookup(result[0]).detach()  # (..., e)
            residual, q = residual - code, q + code
            results.append(result)
        indices, *losses = zip(*results)
        z_q = z + (q - z).detach()  # straight-through, once for the sum
        return z_q, torch.stack(indices, dim=-1), *(torch.stack(loss).mean() for loss in losses)

    def start(self, z, generator):
        """Codes of each depth start as k-means centres of what the depths before it leave of z (n, e)."""
        for part in self.parts:
            part.start(z, generator)
            with torch.no_grad():
                z = z - part.lookup(part.search(z))


# ----------------------------------------------------------------------------------------------------------------------
# The continuous ceiling: RAE (Zheng et al. 2025)
# ----------------------------------------------------------------------------------------------------------------------


class NoisyLatent(vqrae.NoQuantizer):
    """No quantizer, and in training RAE's noise: z + s * N(0, I), for each image its own s, uniform up to `noise`.

    A decoder that has seen only clean latents paints badly what a diffusion model writes, which is never quite clean.
    RAE's latents have unit variance; here `noise` is in units of the standard deviation of z.
    """

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, z):
        if self.training and self.noise > 0:
            share = self.noise * torch.rand(len(z), *[1] * (z.dim() - 1), device=z.device)  # (B, 1, 1)
            z = z + share * z.detach().std() * torch.randn_like(z)
        return super().forward(z)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.3, "Attention Projection"
# ----------------------------------------------------------------------------------------------------------------------


class HeadwiseAttention(nn.Module):
    """Self-attention between two widths: down, its heads are averaged and not concatenated; up, they are concatenated.

    A head is as wide as the narrower side, and there are as many as it goes into the wider one.
    """

    def __init__(self, in_width, out_width):
        super().__init__()
        wide, self.head_width = max(in_width, out_width), min(in_width, out_width)
        self.narrows = in_width > out_width
        self.qkv = nn.Linear(in_width, 3 * wide, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(wide)), nn.Parameter(torch.zeros(wide))
        self.out = nn.Linear(out_width, out_width)

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, wide) each
        parts = q + self.q_bias, k, v + self.v_bias  # a bias of k would change no softmax
        q, k, v = (part.view(B, N, -1, self.head_width).transpose(1, 2) for part in parts)  # (B, heads, N, narrow)
        x = vqrae.attend(q, k, v)  # (B, heads, N, narrow)
        x = x.mean(1) if self.narrows else x.transpose(1, 2).flatten(2)  # (B, N, out)
        return self.out(x)


class GatedMLP(nn.Module):
    """w2(GELU(w0 x) * w1 x) of the normalised x, (B, N, d) -> (B, N, d)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-6)
        self.w0, self.w1, self.w2 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x), approximate="tanh") * self.w1(x))


class AttentionProjection(nn.Module):
    """In the place of a Linear between widths of which one divides the other: (B, N, in) -> (B, N, out).

        y = Linear(LN(x)) + Attention(LN(x)),    out = y + MLP(LN(y))

    UniTok does not say how it starts. Here attention and MLP begin with zeros, so that it starts as its `shortcut`,
    which `VQRAE.start` fits to data as it does a Linear: that is what `weight` and `bias` are for.
    """

    def __init__(self, in_width, out_width):
        super().__init__()
        if in_width % out_width and out_width % in_width:
            raise InputError(f"--projection attention is between widths of which one divides the other, not "
                             f"{in_width} and {out_width}; choose another --codebook-dim")
        self.norm1, self.norm2 = nn.LayerNorm(in_width), nn.LayerNorm(out_width)
        self.norm3 = nn.LayerNorm(in_width)
        self.shortcut = nn.Linear(in_width, out_width)
        self.attention = HeadwiseAttention(in_width, out_width)
        self.mlp = GatedMLP(out_width, 2 * out_width)
        for last in (self.attention.out, self.mlp.w2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    weight = property(lambda self: self.shortcut.weight)
    bias = property(lambda self: self.shortcut.bias)

    def forward(self, x):
        y = self.shortcut(self.norm3(x)).to(x.dtype)  # x is in float32 under autocast, and so what is added up
        y = y + self.attention(self.norm1(x))  # (B, N, out)
        return y + self.mlp(self.norm2(y))


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, "Unified Supervision": captions beside pixels
# ----------------------------------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    """CLIP's text encoder, as small as our captions ask for: a causal transformer, whose last token sums a text up."""

    def __init__(self, config, width, text=None):
        super().__init__()
        self.lm = vqrae.VisualLM(config, text)  # that of section 3.5, which has no code to predict here
        self.out = nn.Linear(config.width, width)

    def forward(self, captions):
        """B strings -> (B, width)."""
        tokens, first = self.lm.pack([self.lm.prompt(caption) for caption in captions])  # (B, n), (B,)
        return self.out(self.lm.transform(self.lm.embedding(tokens), first)[:, -1])


def contrastive_loss(images, texts, scale, bias, form):
    """Images and texts (B, w), row i of one belonging to row i of the other -> a scalar.

    With x_ij = scale * cos(image_i, text_j) + bias,
        "softmax" (CLIP):   each image has to find its text among all of the batch, and each text its image;
        "sigmoid" (SigLIP): each of the B x B pairs has to be told right from wrong: a sum over pairs, over B.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T + bias  # (B, B)
    own = torch.arange(len(logits), device=logits.device)  # (B,)
    if form == "softmax":
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1  # 1 for what belongs together, -1 for what does not
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def of_all_ranks(features):
    """Features (B, d) of this rank -> those of all (ranks * B, d), with gradient: every other text is a negative."""
    return torch.cat(all_gather(features)) if dist.is_initialized() and dist.get_world_size() > 1 else features


def words_of(record):
    """What an image shows, in words, whatever its style: the style is too easy to tell, and would be all one learns."""
    return caption_of(record, style=False)


@torch.no_grad()
def zero_shot(model, train_records, images, batch_size=64, device="cpu", workers=0):
    """Accuracy over the categories of an ImageSet that a model with a text tower reads off its discrete tokens.

    An image is of the category whose captions, the mean over those of `train_records`, it is nearest to in cosine.
    Where images have captions, training shows the tower these and no category.
    """
    names = sorted({record.get("category", "") for record in train_records})
    means = torch.zeros(len(names), model.config.encoder.width)
    for i in range(0, len(train_records), batch_size):
        part = train_records[i:i + batch_size]
        texts = F.normalize(model.tower([words_of(record) for record in part]).float(), dim=1).cpu()  # (B, w)
        means.index_add_(0, torch.tensor([names.index(record.get("category", "")) for record in part]), texts)
    right = 0
    for batch, places in images.batches(range(len(images)), batch_size, workers, indices=True):
        out = model(batch.to(device).float() / 255)
        found = (model.summarise(out.z_q).float().cpu() @ F.normalize(means, dim=1).T).argmax(1)  # (B,), by cosine
        right += sum(names[i] == images.records[place].get("category", "") for i, place in zip(found.tolist(), places))
    return right / len(images)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer as a whole
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class UniTokConfig(vqrae.VQRAEConfig):
    """A VQRAEConfig, its `quantizer` a name in QUANTIZERS here or in `vqrae.py`, and the choices around it."""

    codebooks: int = 1  # M, of mcq, mcq-simvq and rq
    projection: str = "linear"  # or "attention"
    latent_noise: float = 0.0  # in units of the standard deviation of z, of the quantizer "none"
    text: vqrae.LMConfig | None = None  # of the text tower, if there is one

    def __post_init__(self):
        quantizer = self.quantizer
        if quantizer in QUANTIZERS:
            self.quantizer = "none"  # the one that VQRAEConfig knows too
        super().__post_init__()
        self.quantizer = quantizer
        check_fields(self, ("codebooks",))
        if self.projection not in ("linear", "attention"):
            raise InputError(f"projection {self.projection!r} is unknown")


QUANTIZERS = {
    "mcq": MultiCodebook,
    "mcq-simvq": lambda *sizes: MultiCodebook(*sizes, single=vqrae.SimVQ),  # in neither paper: each codebook a SimVQ
    "rq": ResidualVQ,
}


class UniTok(vqrae.VQRAE):
    """A VQRAE with another quantizer, with attention for its projections, or with a text tower beside it.

    Indices are (B, N, M) in [0, S) with a quantizer of this file. Raises InputError when sizes do not fit together.
    """

    made_by = "--stage 1 --quantizer mcq makes one"

    def __init__(self, config, text=None):
        super().__init__(replace(config, quantizer="none"))  # and now what is other than in a VQRAE
        self.config = config
        d, e = config.encoder.width, config.codebook_dim
        sizes = config.codebook_size, e, config.beta, config.beta_side
        if config.quantizer in QUANTIZERS:
            self.quantizer = QUANTIZERS[config.quantizer](config.codebooks, *sizes)
        elif config.codebooks > 1:
            raise InputError(f"--quantizer {config.quantizer} has one codebook; --codebooks is for "
                             f"{', '.join(QUANTIZERS)}")
        else:
            self.quantizer = (NoisyLatent(config.latent_noise) if config.quantizer == "none" else
                              vqrae.QUANTIZERS[config.quantizer](*sizes))
        if config.projection == "attention":
            self.project_in, self.project_out = AttentionProjection(d, e), AttentionProjection(e, d)
        self.tower = None
        if config.text is not None:
            self.tower, self.image_head = TextTower(config.text, d, text), nn.Linear(d, d)
            # SigLIP's start: with B x B pairs of which B belong together, "no" is the better guess.
            self.log_scale, self.bias = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-10.0))

    def count(self, indices):
        """How often each of the K codes is among indices -> (K,) int64, codebook by codebook."""
        if self.config.quantizer in QUANTIZERS:
            step = self.config.codebook_size // self.config.codebooks  # S
            indices = indices + step * torch.arange(self.config.codebooks, device=indices.device)
        return super().count(indices)

    @torch.no_grad()
    def start(self, features, patches, codebook_init="data", projection_init="pixels", generator=None):
        """As in VQRAE; where the inverse of the way in would not meet z, but a unit vector, least squares lead out."""
        super().start(features, patches, codebook_init, projection_init, generator)
        attention = self.config.projection == "attention"
        if projection_init != "random" and (attention or self.config.quantizer in QUANTIZERS):
            x = self.quantizer(self.project_features(features))[0]  # (n, e)
            x = F.pad(self.project_out.norm3(x) if attention else x, (0, 1), value=1.0).cpu().double()  # (n, e + 1)
            squares, products = x.T @ x, x.T @ self.standardise(features).cpu().double()
            back = (torch.linalg.pinv(squares, hermitian=True, rtol=1e-9) @ products).float().T  # (d, e + 1)
            self.project_out.weight.copy_(back[:, :-1])
            self.project_out.bias.copy_(back[:, -1])

    def project_features(self, features):
        if features.dim() == 2:  # tokens without their images, before step 0: attention adds nothing yet
            return super().project_features(features[:, None])[:, 0]
        return super().project_features(features)

    def summarise(self, z_q, read_along=False):
        """Codes (B, N, e) -> what the image is about (B, d), in the text tower's space.

        With `read_along` no gradient goes back from here into the tokenizer.
        """
        bottleneck = self.project_out(z_q.to(self.project_out.weight.dtype))  # (B, N, d)
        return self.image_head((bottleneck.detach() if read_along else bottleneck).mean(1))

    def contrast(self, z_q, captions, form, read_along=False):
        """The contrastive loss between codes (B, N, e) and B captions, of all ranks together.

        UniTok has a LayerNorm before its image head and keeps the scale under 100; short runs here need neither.
        """
        images, texts = self.summarise(z_q, read_along), self.tower(captions)  # (B, d) each
        with torch.autocast(z_q.device.type, enabled=False):
            images, texts = (of_all_ranks(side.float()) for side in (images, texts))  # (B of all ranks, d) each
            return contrastive_loss(images, texts, self.log_scale.exp(), self.bias, form)

    def bits_per_image(self, tokens):
        """What an image of so many tokens is told by: log2 of the number of different token sequences."""
        codes = torch.tensor(self.config.codebook_size // self.config.codebooks, dtype=torch.float64)
        return tokens * self.config.codebooks * codes.log2().item()

    def supervise(self, loss, terms, out, config, images, places):
        """Stage 1's loss and terms with what a StageOneConfig adds; `out` is of the images at `places` of a set."""
        of_pixels = terms["mse"] + config.perceptual_weight * terms.get("perceptual", 0.0)
        loss = loss + (config.reconstruction_weight - 1) * of_pixels
        if config.contrastive != "none":
            captions = [words_of(images.records[place]) for place in places]
            terms["contrastive"] = self.contrast(out.z_q, captions, config.contrastive,
                                                 read_along=config.contrastive_weight == 0)
            loss = loss + (config.contrastive_weight or 1.0) * terms["contrastive"]
        return loss, terms

    def _save_pretrained(self, folder):  # with tokenizer.json beside for the text tower's text
        save_model(self, folder, None if self.tower is None else self.tower.lm.text)

    @classmethod
    def _from_pretrained(cls, folder):
        model = load_model(folder, "UniTok", cls.made_by, lambda saved: cls(UniTokConfig(**{
            **saved, "encoder": vqrae.ViTConfig(**saved["encoder"]),
            "text": saved["text"] and vqrae.LMConfig(**saved["text"])})), optional=["reading"])
        if model.tower is not None:
            path = Path(folder) / "tokenizer.json"
            model.tower.lm.text = load_text_tokenizer(path, model.config.text.text_vocabulary)
        return model


def has_codebooks(folder):
    """Whether the model in a folder is one of this file: its config.json counts codebooks."""
    path = Path(folder) / "config.json"
    saved = read_json(path) if path.exists() else None
    return isinstance(saved, dict) and "codebooks" in saved


def load_tokenizer(source):
    """The VQRAE or UniTok in a folder or on the hub, in eval mode; InputError says what is missing or damaged."""
    folder = vqrae.VQRAE.find(source)
    return (UniTok if has_codebooks(folder) else vqrae.VQRAE).from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# Section 3.4: M codes at every place of an image, and a transformer that writes them
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class DepthLMConfig(vqrae.LMConfig):
    """An LMConfig, and how many codes stand at every place of an image."""

    codebooks: int = 1  # M

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, ("codebooks",))


class SummedEmbedding(nn.Embedding):
    """Tokens (B, n, M) -> (B, n, d): the sum over the M codes of a place, each from its own codebook's rows.

    Tokens from `text_vocabulary` on are codes, numbered alike in all codebooks. A place of text has its token first and
    -1 for the rest.
    """

    def __init__(self, config):
        super().__init__(config.text_vocabulary + config.codebook_size, config.width)
        self.config = config

    def rows(self, tokens):
        """Tokens (..., M) -> their rows among all codebooks' (..., M), -1 where there is none."""
        step = self.config.codebook_size // self.config.codebooks  # S
        which = step * torch.arange(self.config.codebooks, device=tokens.device)  # (M,)
        return torch.where(tokens >= self.config.text_vocabulary, tokens + which, tokens)

    def forward(self, tokens):
        rows = self.rows(tokens)
        return (super().forward(rows.clamp(min=0)) * (rows >= 0)[..., None]).sum(-2)


class DepthLM(vqrae.VisualLM):
    """A VisualLM that reads and writes M codes at every place: tokens (B, n, M) -> logits (B, n - 1, M, S).

    The large transformer sees one token for a place, the sum of its codes, and writes one vector h for the next. From h
    a small one, the depth head, writes the codes of that place one after the other, each seeing those before it:
    otherwise they would be drawn as if they had nothing to do with each other.
    """

    Config = DepthLMConfig

    def __init__(self, config, text=None):
        super().__init__(config, text)
        if config.codebook_size % config.codebooks:
            raise InputError(f"{config.codebook_size} codes cannot be shared out evenly to {config.codebooks} "
                             "codebooks")
        self.embedding = SummedEmbedding(config)
        self.depth = vqrae.CausalBlock(config)
        self.depth_norm = vqrae.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.codebook_size // config.codebooks, bias=False)  # one for all M
        for module in (self.embedding, *self.depth.modules(), self.head):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @classmethod
    def around(cls, lm, codebooks):
        """A DepthLM with all that a VisualLM has, Qwen3 perhaps, and a new depth head."""
        model = cls(DepthLMConfig(**asdict(lm.config), codebooks=codebooks), lm.text)
        model.load_state_dict(lm.state_dict(), strict=False)
        return model

    def think(self, sequence):
        """Logits (n, m, S) of the code after each of a sequence (n, m, d): h, and the first codes of its place."""
        m, h = sequence.shape[1], self.config.head_width
        still = torch.tensor([1.0, 0.0], device=sequence.device)[:, None, None].expand(2, m, h)  # no rotary positions
        visible = torch.ones(m, m, dtype=torch.bool, device=sequence.device).tril()[None, None]
        return self.head(self.depth_norm(self.depth(sequence, still, vqrae.mask_of(visible, sequence.dtype))))

    def code_vectors(self, tokens):
        """The embedding of every single code of tokens (..., M) -> (..., M, d)."""
        return F.embedding(self.embedding.rows(tokens), self.embedding.weight)

    def logits(self, x, tokens):
        """Logits (n, M, S) of the codes of n places, given vectors x (n, d) before them and the codes (n, M) there."""
        return self.think(torch.cat([x[:, None], self.code_vectors(tokens)[:, :-1]], dim=1))

    def forward(self, tokens, first=None):
        """Logits (B, n - 1, M, S) of the codes of each place but the first, given all places and codes before.

        Those of a place of text mean nothing: text is only read.
        """
        x = self.transform(self.embedding(tokens), first)[:, :-1]  # (B, n - 1, d)
        following = tokens[:, 1:].clamp(min=self.config.text_vocabulary).flatten(0, 1)  # (B * (n - 1), M)
        return self.logits(x.flatten(0, 1), following).unflatten(0, x.shape[:2])

    def loss(self, tokens, first=None, seen=None):
        """Mean cross-entropy of the codes among tokens (B, n, M) given all before them; `seen` as in VisualLM."""
        x = self.transform(self.embedding((tokens if seen is None else seen)[:, :-1]), first)  # (B, n - 1, d)
        targets = tokens[:, 1:]
        visual = targets[..., -1] >= self.config.text_vocabulary  # (B, n - 1)
        logits = self.logits(x[visual], targets[visual])  # (places, M, S)
        return F.cross_entropy(logits.flatten(0, 1).float(), (targets[visual] - self.config.text_vocabulary).flatten())

    def pack(self, prompts, codes=None):
        """Prompts, B lists of token ids, and codes (B, N, M) behind them -> tokens (B, n, M), and `first` (B,)."""
        text, first = super().pack(prompts)  # (B, m)
        tokens = text.new_full((*text.shape, self.config.codebooks), -1)
        tokens[..., 0] = text
        if codes is not None:
            tokens = torch.cat([tokens, codes.to(tokens.device) + self.config.text_vocabulary], dim=1)
        return tokens, first

    def draw(self, x, head, pick):
        """The codes (B, M) of the place that follows x (B or 2B, d), one after the other."""
        sequence, codes = x[:, None], []  # (B or 2B, 1, d)
        step = self.config.codebook_size // self.config.codebooks  # S
        for m in range(self.config.codebooks):
            code = pick(self.think(sequence)[:, -1].float())  # (B,)
            codes.append(code)
            vector = self.embedding.weight[self.config.text_vocabulary + m * step + code]  # (B, d)
            sequence = torch.cat([sequence, vector.repeat(len(x) // len(code), 1)[:, None]], dim=1)
        return torch.stack(codes, dim=1)


def writes_codes_of(lm, tokenizer):
    """Whether a language model writes as many codes, and as many of them at a place, as a tokenizer has."""
    several = tokenizer.config.codebooks if tokenizer.config.quantizer in QUANTIZERS else 0
    return (lm.config.codebook_size, getattr(lm.config, "codebooks", 0)) == (tokenizer.config.codebook_size, several)


def load_language_model(source):
    """The VisualLM or DepthLM in a folder or on the hub, in eval mode; InputError says what is missing or damaged."""
    folder = vqrae.VisualLM.find(source)
    return (DepthLM if has_codebooks(folder) else vqrae.VisualLM).from_pretrained(folder)


def load_generator(folder, device):
    """What `load_language_model` finds in a folder, and the tokenizer whose codes it writes.

    That one is inside, in vqrae/. The models that came with the code share one, which is beside it, in stage2/.
    """
    came_with_the_code = Path(folder).resolve().parent == PRETRAINED
    place = Path(folder).with_name("stage2") if came_with_the_code else Path(folder) / "vqrae"
    lm, model = load_language_model(folder).to(device), load_tokenizer(place).to(device)
    if not writes_codes_of(lm, model):
        raise InputError(f"{folder} writes {lm.config.codebook_size} codes, {getattr(lm.config, 'codebooks', 1)} at a "
                         f"place, and the tokenizer in {place} has {model.config.codebook_size}, "
                         f"{getattr(model.config, 'codebooks', 1)} at a place; they were not trained together")
    return lm, model


# ----------------------------------------------------------------------------------------------------------------------
# What a training run has of all this: train.py calls these, and for a plain VQRAE they do nothing
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class StageOneConfig(TrainingConfig):
    """Stage 1's settings, and those that only a UniTok has."""

    quantizer: str = setting("model", "simvq: VQRAE's; vq: plain; none: continuous; mcq: UniTok's many codebooks; "
                             "mcq-simvq: the same of SimVQ codebooks; rq: residual",
                             choices=[*vqrae.QUANTIZERS, *QUANTIZERS])
    codebooks: int = setting("model", "of mcq, mcq-simvq and rq; --codebook-size counts the codes of all")
    projection: str = setting("model", "d -> e and e -> d: or UniTok's", choices=["linear", "attention"])
    latent_noise: float = setting("model", "RAE's noise on the latents of --quantizer none, in standard deviations "
                                  "(RAE: 0.8)", zero=True)
    contrastive: str = setting("loss", "captions as a second supervision, in SigLIP's form or CLIP's",
                               choices=["none", "sigmoid", "softmax"])
    contrastive_weight: float = setting("loss", "of that loss; 0: the text tower only reads along", zero=True)
    reconstruction_weight: float = setting("loss", "of pixel and perceptual loss together", zero=True)


DEFAULTS = dict(codebooks=1, projection="linear", latent_noise=0.0, contrastive="none", contrastive_weight=1.0,
                reconstruction_weight=1.0)

# A text tower small enough for two CPU cores.
TOWER = vqrae.LMConfig(text_vocabulary=1024, codebook_size=0, width=128, depth=2, heads=4, kv_heads=4, head_width=32,
                       mlp_width=384)


def stage_one_config(config, given):
    """A preset's TrainingConfig; a StageOneConfig when the flags `given` ask for what only a UniTok has."""
    asked = given.get("quantizer") in QUANTIZERS or DEFAULTS.keys() & given.keys()
    return StageOneConfig(**asdict(config), **DEFAULTS) if asked else config


def new_tokenizer(config, images):
    """An untrained VQRAE, or UniTok for a StageOneConfig, around the pretrained encoder.

    `images`, the training set, have the captions that a text tower is to read. Raises InputError when sizes do not fit
    together.
    """
    encoder = vqrae.load_encoder(config.encoder)
    if config.features == "before_norm" and encoder.config.final_norm == "tokens":
        encoder.config = replace(encoder.config, final_norm="class")  # it stays, for who reads behind it
    p = encoder.config.patch_size
    q = config.output_patch_size or p
    if config.image_size % p or config.image_size < 2 * p:
        raise InputError(f"--image-size {config.image_size} is not a multiple, at least twice, of the encoder's "
                         f"patches of {p} pixels")
    if config.image_size * q // p < max(11, 2 * p):
        raise InputError(f"images of {config.image_size * q // p} pixels would come out; SSIM needs 11 and the "
                         f"perceptual loss {2 * p}: choose a larger --image-size or --output-patch-size")
    sizes = dict(encoder=encoder.config, image_size=config.image_size, output_patch_size=q,
                 output_overlap=config.output_overlap,
                 codebook_size=config.codebook_size, codebook_dim=config.codebook_dim, quantizer=config.quantizer,
                 beta_side=config.beta_side)
    if isinstance(config, StageOneConfig):
        tower, text = text_tower(config, images) if config.contrastive != "none" else (None, None)
        model = UniTok(UniTokConfig(**sizes, codebooks=config.codebooks, projection=config.projection,
                                    latent_noise=config.latent_noise, text=tower), text)
    else:
        model = vqrae.VQRAE(vqrae.VQRAEConfig(**sizes))
    model.encoder = encoder
    return model


def check_supervision(model, config):
    """InputError when a StageOneConfig asks for captions and the model cannot read them, or not a batch's at once."""
    if isinstance(config, StageOneConfig) and not isinstance(model, UniTok):
        raise InputError("the model of --init is a plain VQRAE; --contrastive, --contrastive-weight and "
                         "--reconstruction-weight are for a UniTok")
    if getattr(config, "contrastive", "none") != "none":
        if model.tower is None:
            raise InputError("--contrastive needs a text tower, and the model of --init was trained without one")
        if config.accumulate > 1:
            raise InputError("--accumulate would take --contrastive its negatives: a part sees only its own captions; "
                             "take a smaller --batch-size, or more processes by torchrun")


def text_tower(config, images):
    """The sizes of a text tower for the captions of an ImageSet, and its text tokenizer; InputError for no captions."""
    texts = [words_of(record) for record in images.records]
    if not any(texts):
        raise InputError(f"--contrastive needs captions: put the images in {config.data} into one folder per class")
    text = train_text_tokenizer(texts, TOWER.text_vocabulary)
    return replace(TOWER, text_vocabulary=text.get_vocab_size()), text


def further_figures(model, config, tokens, train_images, val_images, *where):
    """The last figures of a run that only a UniTok has; `tokens` of an image; `where`: batch size, device, workers."""
    figures = {}
    if isinstance(model, UniTok) and model.config.quantizer != "none":
        figures["bits_per_image"] = model.bits_per_image(tokens)
    if getattr(config, "contrastive", "none") != "none":
        figures["val_zero_shot"] = zero_shot(model, train_images.records, val_images, *where)
    return figures


def with_depth(lm, tokenizer):
    """A VisualLM as it is or, where a tokenizer has several codes at every place, with a head that writes them."""
    several = tokenizer.config.quantizer in QUANTIZERS
    return DepthLM.around(lm, tokenizer.config.codebooks) if several else lm

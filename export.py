"""A trained model for others: its encoder for transformers, codes of images in shards, graphs in ONNX."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from support.codes import codes_digest, codes_of, write_codes
from support.files import InputError, read_safetensors, replace_text, replacing_all
from support.text import caption_of
from vqrae import FAMILIES, hub_names


def save_encoder(encoder, folder, dtype=torch.float32):
    """Write an Encoder as a checkpoint of its family, which `load_encoder` and transformers' own class both read.

    InternViT is written in the names of transformers' InternVLVisionModel, whichever names it came with.
    """
    config, folder = encoder.config, Path(folder)
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
        hub_config.update(attention_bias=True, use_qk_norm=False, norm_type="layer_norm",
                          use_mean_pooling=config.final_norm == "none")  # which to transformers means: no last norm
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
    with replacing_all(folder) as part:
        replace_text(part / "config.json", json.dumps(hub_config, indent=2) + "\n")
        replace_text(part / "preprocessor_config.json", json.dumps(statistics, indent=2) + "\n")
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})


def export_tokens(model, images, folder, shard_size=10000, batch_size=64, device="cpu"):
    """Write the codes of all images of an ImageSet in shards of so many images, and index.json beside them.

    A shard that is there is not written again; InputError when the folder is of other codes, which digest.txt tells,
    or of something else.
    Returns what index.json says: of each shard its file, and of each image in it name and caption.
    """
    digest, records, shards = codes_digest(model, images), images.records, []
    folder = Path(folder)
    note, wanted = folder / "digest.txt", f"{digest} in shards of {shard_size}\n"
    if not note.exists() and (folder / "index.json").exists():
        raise InputError(f"{folder} has an index.json that is not of tokens; choose another --out")
    if note.exists() and note.read_text("utf-8", "replace") != wanted:
        raise InputError(f"{folder} holds tokens of another model or other images, or in shards of another size; "
                         "choose another --out")
    for shard, begin in enumerate(tqdm(range(0, len(images), shard_size), desc="tokens", unit="shard")):
        path = folder / f"codes-{shard:05}.safetensors"
        if not path.exists():
            keys = range(begin, min(begin + shard_size, len(images)))
            codes_and_places = codes_of(model, images, keys, batch_size, device)
            replace_text(note, wanted)
            write_codes(path, *codes_and_places)
        places = read_safetensors(path)["places"].tolist()
        shards.append({"file": path.name, "images": len(places), "names": [records[i].get("name") for i in places],
                       "captions": [caption_of(records[i]) for i in places]})
    index = {"codebook_size": model.config.codebook_size, "codebooks": getattr(model.config, "codebooks", 1),
             "tokens_per_image": (images.size // model.config.encoder.patch_size) ** 2, "digest": digest,
             "shards": shards}
    replace_text(folder / "index.json", json.dumps(index))
    return index


class ToCodes(torch.nn.Module):
    """Images (B, 3, H, W) -> codes (B, N): `VQRAE.encode` with one product in the place of its search in chunks."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("codes", model.quantizer.project(model.quantizer.codebook).detach().clone())  # (K, e)

    def forward(self, images):
        z = self.model.project_features(self.model.encoder(images))  # (B, N, e)
        return (self.codes.pow(2).sum(1) - 2 * z @ self.codes.T).argmin(-1)


class ToImages(torch.nn.Module):
    """Codes (B, N) -> images (B, 3, H*q/p, W*q/p): `VQRAE.decode` without its checks, which are no graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, indices):
        side = math.isqrt(indices.shape[1])
        bottleneck = self.model.project_out(self.model.quantizer.lookup(indices))  # (B, N, d)
        return self.model.decoder(bottleneck, side, side).clamp(0, 1)


def export_onnx(model, side, folder):
    """Write encode.onnx and decode.onnx of a VQRAE on the CPU, for batches of any number of side x side images.

    Both are asked what torch says of some images: codes must be equal, InputError if not. Returns by how much images
    differ at most. InputError too when packages are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch exports with
    except ImportError as error:
        raise InputError(f"--format onnx needs packages: pip install onnx onnxscript onnxruntime ({error})") from None
    p, folder = model.config.encoder.patch_size, Path(folder)
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    _, indices = model.encode(images)  # (3, N); InputError when patches do not fit
    expected = {"encode": (images, indices), "decode": (indices, model.decode(indices))}
    resized, encoder = copy.deepcopy(model), model.encoder
    with torch.no_grad():  # ONNX cannot resize positions as torch does, so they come in the size of the images
        resized.encoder.positions = torch.nn.Parameter(encoder.positions_for(side // p, side // p))
    resized.encoder.config = replace(encoder.config, image_size=side)
    graphs = {"encode": ToCodes(resized), "decode": ToImages(resized)}
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    for name, (given, answer) in expected.items():
        path = folder / f"{name}.onnx"
        torch.onnx.export(graphs[name].eval(), (given[:2],), path, dynamo=True, verbose=False, dynamic_shapes=(
            {0: torch.export.Dim("batch")},), input_names=["images" if name == "encode" else "indices"],
            output_names=["indices" if name == "encode" else "images"])
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for some in (slice(0, 1), slice(0, 3)):  # other batches than it was written with
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given[some].numpy()})[0])
            gap = (found - answer[some]).abs().max().item()
            worst = max(worst, gap)  # of the images: codes that differ at all end here
            if gap > (0 if name == "encode" else 1e-4):
                raise InputError(f"{path} does not say what torch says, but something else by up to {gap}")
    return worst

"""Checkpoints in the hub's layout: where they are, what their config.json says, and what of that is there here."""

from pathlib import Path

from support.files import InputError, read_config, read_safetensors

# Mean and std of ImageNet's images in [0, 1], which most encoders were trained with.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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


def refuse_other(hub, path, known):
    """InputError for a field of a config that makes a model compute what is not implemented here.

    known: names, "outer.inner" for a field inside a field, to the values that are; a field that is missing, or None,
    has the usual one. Of a list, all must be among them.
    """
    for name, values in known.items():
        value = hub
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each not in values:
                raise InputError(f"{path} asks for {name} {each!r}, which is not implemented here" + bool(values) *
                                 f": only {', '.join(map(str, values))}")


def square_side(value, name):
    """A side in pixels of a hub's config, a number or a pair of equal ones; ValueError for a pair of two."""
    sides = value if isinstance(value, list) else [value]
    if len(set(sides)) != 1:
        raise ValueError(f"{name} {value!r} is no square")
    return sides[0]


def preprocessor_of(folder):
    """What a hub folder's preprocessor_config.json says, or a part of its processor_config.json, and its path.

    A dict, which is empty where there is neither.
    """
    path = folder / "preprocessor_config.json"
    if path.exists():
        return read_config(path), path
    path = folder / "processor_config.json"
    inside = read_config(path).get("image_processor") if path.exists() else None
    return inside if isinstance(inside, dict) else {}, path


def pixel_statistics(preprocessor, path, mean, std):
    """Mean and std of images in [0, 1], as tuples, that a preprocessor asks for; `mean` and `std` by default.

    It may scale the bytes of an image by another factor than 1/255, or leave out either step. Raises InputError for
    what is not implemented, and a TypeError or ValueError for what is no number.
    """
    steps = ("do_rescale", "do_normalize")
    refuse_other(preprocessor, path, {**dict.fromkeys(steps, [True, False]), **dict.fromkeys(
        ("do_flip_channel_order", "do_grayscale", "offset", "rescale_offset"), [False])})
    rescales, normalises = (preprocessor.get(step) is not False for step in steps)
    scale = 255 * preprocessor.get("rescale_factor", 1 / 255) if rescales else 255
    scale = 1 if abs(scale - 1) < 1e-6 else scale
    if not scale > 0:
        raise ValueError(f"rescale_factor {preprocessor['rescale_factor']!r} is not above 0")
    if normalises:
        given = [preprocessor.get(name) for name in ("image_mean", "image_std")]
        mean, std = (usual if value is None else value for value, usual in zip(given, (mean, std)))
        mean, std = (3 * (value,) if isinstance(value, (int, float)) else value for value in (mean, std))
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def vision_fields(hub, path, families, activations):
    """What a vision encoder's config.json, read as `hub`, and its preprocessor_config.json say of its sizes.

    families: model_type to what of these fields its files need not say, and what is the same for all of the family.
    Returns the fields of a ViTConfig. Raises InputError when the files make no sense or ask for what is not here.
    """
    hub = hub.get("vision_config", hub)  # SigLIP and CLIP come with their text half, InternViT with a language model
    kind = hub.get("model_type") if isinstance(hub, dict) else hub
    if not isinstance(kind, str) or kind not in families:
        raise InputError(f"{path} is of type {kind!r}; this loader reads {', '.join(families)}")
    defaults, traits = families[kind]
    hub = {**defaults, **hub}
    refuse_other(hub, path, {
        "use_swiglu_ffn": [False], "use_qk_norm": [False], "qk_normalization": [False], "norm_type": ["layer_norm"],
        "hidden_act": list(activations), "num_channels": [3], "use_absolute_position_embeddings": [True],
        "qkv_bias": [True], "attention_bias": [True], "quantization_config": []})
    if kind == "internvl_vision" and not hub.get("use_mean_pooling", True):  # its way to say that there is a last norm
        traits = {**traits, "final_norm": "tokens"}
    preprocessor, statistics = preprocessor_of(path.parent)
    try:
        mean, std = pixel_statistics(preprocessor, statistics, **{
            name: traits.get(name, usual) for name, usual in IMAGENET.items()})
        return {**traits, "family": kind, "activation": hub["hidden_act"], "layer_norm_eps": hub["layer_norm_eps"],
                "image_size": square_side(hub["image_size"], "image_size"),
                "patch_size": square_side(hub["patch_size"], "patch_size"), "width": hub["hidden_size"],
                "depth": hub["num_hidden_layers"], "heads": hub["num_attention_heads"],
                "mlp_width": hub.get("intermediate_size") or int(hub["hidden_size"] * hub["mlp_ratio"]),
                "registers": hub.get("num_register_tokens", 0) if kind == "dinov2_with_registers" else 0,
                "mean": mean, "std": std}
    except KeyError as error:
        raise InputError(f"{path} lacks {error}") from None
    except InputError:
        raise
    except (IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"{path} or {statistics.name} does not describe an encoder: {str(error).splitlines()[0]}"
                         ) from None


def qwen3_fields(hub, path):
    """What a Qwen3's config.json, read as `hub`, says of its sizes: fields of an LMConfig; InputError as above."""
    if hub.get("model_type") != "qwen3" or not hub.get("tie_word_embeddings"):
        raise InputError(f"{path} is of type {hub.get('model_type')!r}; this loader reads dense Qwen3 with tied "
                         "embeddings, such as Qwen/Qwen3-0.6B")
    refuse_other(hub, path, {
        "rope_parameters.rope_type": ["default"], "rope_scaling.rope_type": ["default"],
        "rope_scaling.type": ["default"], "layer_types": ["full_attention"], "attention_bias": [False],
        "hidden_act": ["silu"], "use_sliding_window": [False], "partial_rotary_factor": [1],
        "rope_parameters.partial_rotary_factor": [1], "rope_scaling.partial_rotary_factor": [1], "mlp_bias": [False],
        "is_causal": [True], "quantization_config": []})
    try:
        # Older and newer versions of transformers have it, and read it, at different places.
        places = [hub, hub.get("rope_parameters") or {}, hub.get("rope_scaling") or {}]
        thetas = {place["rope_theta"] for place in places if place.get("rope_theta") is not None}
        if len(thetas) != 1:
            raise InputError(f"{path} has {'more than one' if thetas else 'no'} rope_theta")
        return {"text_vocabulary": hub["vocab_size"], "width": hub["hidden_size"], "depth": hub["num_hidden_layers"],
                "heads": hub["num_attention_heads"], "kv_heads": hub["num_key_value_heads"],
                "head_width": hub["head_dim"], "mlp_width": hub["intermediate_size"], "norm_eps": hub["rms_norm_eps"],
                "rope_theta": thetas.pop()}
    except KeyError as error:
        raise InputError(f"{path} lacks {error}") from None
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path} does not describe a Qwen3: {error}") from None

"""The Hugging Face hub: models that go there and come back, and the checkpoints of others: where they are, what their
config.json says, and what of that is there here."""

import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download

from support.files import InputError, read_config, read_safetensors, save_model

# Mean and std of ImageNet's images in [0, 1], which most encoders were trained with.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@contextmanager
def asking_hub(what):
    """InputError with what failed and the first line of why, for all that the hub answers with."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # offline, no such id, no permission: huggingface_hub has many ways to say no
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what}: {reason}") from None


def hub_folder(source, **download):
    """A local folder as it is, or a download of the hub's model of this name, "user/name", or of a folder in it.

    download: what snapshot_download takes, such as revision= and token=. InputError says why there is none.
    """
    folder = Path(source)
    if not folder.is_dir():
        found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/(.+)", str(source))
        name, inside = found.groups() if found else (str(source), "")
        with asking_hub(f"no model at {str(source)!r}: not a folder, and the hub says"):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **download), inside)
    return folder


CARD = """---
{{ card_data }}
---

# {{ name }}

A {{ kind }} of the educational implementation of *VQRAE: Representation Quantization Autoencoders*
([arXiv 2511.23386]({{ paper_url }})).

```python
model = {{ module }}.{{ kind }}.from_pretrained("{{ name }}")
{%- if tokenizer %}
tokenizer = vqrae.VQRAE.from_pretrained("{{ name }}/vqrae")  # whose codes it writes
{%- endif %}
```

## Data

{{ data }}
{% for title, rows in (("Figures", figures), ("Settings", settings)) if rows %}
## {{ title }}

| | |
|---|---|
{%- for key, value in rows.items() %}
| {{ key }} | {{ value }} |
{%- endfor %}
{% endfor %}"""


class HubModel(PyTorchModelHubMixin, library_name="vqrae", paper_url="https://arxiv.org/abs/2511.23386",
               model_card_template=CARD):
    """What lets a model be saved, loaded, and pushed to the hub: `model.push_to_hub("user/name")`.

    A class has `_from_pretrained(folder)`, which reads what `_save_pretrained(folder)` wrote, and `made_by`, the flags
    of train.py that make one.
    """

    folder = None  # where it was read from, with what lies beside it

    def _save_pretrained(self, folder):
        save_model(self, folder)

    def save_pretrained(self, folder, config=None, model_card_kwargs=None):
        """Write config.json, model.safetensors and what else `from_pretrained` reads.

        In place of the mixin's, which would remove config.json first and put a card into every folder. Its push_to_hub
        hands over the two further arguments; then the card, summary.json and the VQRAE of a generator come along.
        """
        self._save_pretrained(folder)
        if model_card_kwargs is None:
            return
        self.generate_model_card(**model_card_kwargs).save(Path(folder) / "README.md")
        if self.folder and (self.folder / "summary.json").exists():
            shutil.copy(self.folder / "summary.json", folder)
        if self.folder and (self.folder / "vqrae").is_dir():
            shutil.copytree(self.folder / "vqrae", Path(folder) / "vqrae")

    def push_to_hub(self, repo_id, data=None, **how):
        """Upload the model and its card; `data` says there what it was trained on, `how` is the mixin's.

        Figures and settings of the card are those in summary.json beside the model. Returns the address of the commit;
        InputError says why there is none.
        """
        with asking_hub(f"{repo_id!r} was not pushed; the hub says"):
            return super().push_to_hub(repo_id, model_card_kwargs=self.card(repo_id, data), **how)

    def card(self, repo_id, data=None):
        """What the model card says, as a dict."""
        path = self.folder and self.folder / "summary.json"
        summary = read_config(path) if path and path.exists() else {}
        figures = dict(takewhile(lambda row: row[0] != "preset", summary.items()))  # settings stand behind them
        settings = {key: value for key, value in (summary or asdict(self.config)).items() if key not in figures}
        data = data or ", ".join(f"{key}: {summary[key]}" for key in ("data", "training images") if key in summary)
        return {"name": repo_id, "kind": type(self).__name__, "module": type(self).__module__,
                "data": data or "Not stated.", "tokenizer": bool(self.folder) and (self.folder / "vqrae").is_dir(),
                "figures": {key: f"{value:.4g}" if isinstance(value, float) else value
                            for key, value in figures.items()},
                "settings": {key: value for key, value in settings.items()
                             if value is not None and not isinstance(value, dict)}}

    @classmethod
    def find(cls, source, **download):
        """The folder of a model: a local one, or a download of the hub's "user/name", or of a folder in it.

        A Path, and what would lie in a folder that is here, is never looked for on the hub. InputError says why there
        is none.
        """
        named = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)+", source)
        if not named or Path(source).parent.is_dir():
            return Path(source)
        try:
            return hub_folder(source, **download)
        except InputError as error:
            raise InputError(f"{error}; python train.py {cls.made_by}") from None

    @classmethod
    def from_pretrained(cls, source, **download):
        """Load what `save_pretrained` wrote, in eval mode, from a folder or from the hub's "user/name".

        download: such as revision= and token=. InputError says what is missing or damaged.
        """
        folder = cls.find(source, **download)
        model = cls._from_pretrained(folder)
        model.folder = folder
        return model


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


def vision_weights(folder, names, dinov2=False):
    """The tensors of a vision encoder, alone or inside a larger model, by our names.

    names: our name to what a tensor is called there, or what its parts are, which are stacked. Raises InputError when
    one is missing or parts do not fit together.
    """
    # Inside a larger model the encoder's names have a prefix, and so has everything else another one.
    theirs = {re.sub(r"^(model\.)?((vision_model|vision_tower)\.)*", "", name): tensor
              for name, tensor in read_checkpoint(folder).items()}
    if dinov2:  # recent versions of transformers have other names for it in memory; someone may have kept them
        for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"),
                         ("o_proj", "output.dense")):
            theirs = {name.replace(f"attention.{new}", f"attention.{old}"): tensor for name, tensor in theirs.items()}
    weights = {}
    for ours, parts in names.items():
        missing = [part for part in parts if part not in theirs]
        if missing:
            raise InputError(f"the weights in {folder} have no tensor {missing[0]!r}")
        if any(theirs[part].shape[1:] != theirs[parts[0]].shape[1:] or not theirs[part].dim() for part in parts):
            raise InputError(f"the weights in {folder}: tensors {', '.join(map(repr, parts))} do not fit together")
        weights[ours] = torch.cat([theirs[part] for part in parts])
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

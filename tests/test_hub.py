"""Checkpoints in the hub's layout: what changes what a model computes is done as transformers does it, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vqrae
from conftest import SIZES, family_twin, small_vit
from export import save_encoder
from support.files import InputError
from support.hub import IMAGENET, pixel_statistics


def change(folder, name="config.json", **fields):
    """Set fields of a JSON file, or take those away that are ...; a file that is not there is begun."""
    path = folder / name
    config = {**(json.loads(path.read_text()) if path.exists() else {}), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def assert_one_sentence(load, path, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        load()
    assert "\n" not in str(error.value) and str(error.value).count(str(path)) == 1


# --- Qwen3 ---


@pytest.fixture
def qwen3(qwen3_twin, tmp_path):
    """A folder of a small Qwen3 of which a test may change something."""
    shutil.copytree(qwen3_twin[1], tmp_path / "qwen3")
    return tmp_path / "qwen3"


THETA = {"rope_theta": 1e6}
REFUSED = [
    {"rope_parameters": {**THETA, "rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {**THETA, "rope_type": "dynamic"}}, {"rope_parameters": {**THETA, "rope_type": "llama3"}},
    {"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, {"partial_rotary_factor": 0.5},
    {"rope_parameters": ..., **THETA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_parameters": ..., **THETA, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": ..., **THETA, "rope_scaling": {"partial_rotary_factor": 0.25}},
    {"rope_theta": 5e5}, {"rope_parameters": ...}, {"rope_parameters": None}, {"rope_parameters": "yarn"},
    {"rope_parameters": {"full_attention": THETA}}, {"rope_parameters": [1e6]},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, {"is_causal": False},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4},
    {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"hidden_act": "relu"},
    {"quantization_config": {"quant_method": "fp8"}}, {"tie_word_embeddings": False}, {"tie_word_embeddings": ...},
    {"model_type": "qwen3_moe"}, {"model_type": "qwen2"}, {"head_dim": ...}, {"head_dim": None},
    {"num_key_value_heads": ...}, {"rms_norm_eps": ...}, {"num_hidden_layers": 2.5}, {"vocab_size": "50"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_a_qwen3_that_computes_something_else_is_refused_in_a_sentence(fields, qwen3):
    vqrae.load_qwen3(qwen3, 7)
    change(qwen3, **fields)
    assert_one_sentence(lambda: vqrae.load_qwen3(qwen3, 7), qwen3, "config.json")


@pytest.mark.parametrize("fields", [
    {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, {"rope_parameters": ..., "rope_theta": 1e4},
    {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": None}, {"rope_theta": 1e6}, {"rms_norm_eps": 0.01},
    {"sliding_window": 4}, {"attention_dropout": 0.5}, {"layer_types": ...}, {"hidden_act": ...}], ids=str)
def test_a_qwen3_of_other_settings_equals_transformers_with_these(fields, qwen3):
    from transformers import Qwen3ForCausalLM

    change(qwen3, **fields)
    twin, tokens = Qwen3ForCausalLM.from_pretrained(qwen3).eval(), torch.randint(50, (2, 12))
    with torch.no_grad():
        assert (vqrae.load_qwen3(qwen3, 7)(tokens)[..., :50] - twin(tokens).logits).abs().max() < 1e-4


# --- encoders ---


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder of a small encoder of every family of transformers'."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        family_twin(family)[0].save_pretrained(folder / family)
    return folder


FAMILIES = ["dinov2_with_registers", "siglip_vision_model", "clip_vision_model", "internvl_vision"]


@pytest.fixture(params=FAMILIES)
def encoder(request, encoders, tmp_path):
    """A folder of a small encoder of which a test may change something."""
    shutil.copytree(encoders / request.param, tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("fields", [
    {"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"hidden_act": None}, {"use_swiglu_ffn": True},
    {"use_qk_norm": True}, {"qk_normalization": True}, {"norm_type": "rms_norm"}, {"num_channels": 1},
    {"use_absolute_position_embeddings": False}, {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"qkv_bias": False}, {"attention_bias": False}, {"image_size": [20, 16]}, {"patch_size": [4, 2]},
    {"image_size": []}, {"patch_size": 5}, {"model_type": "siglip2_vision_model"}, {"vision_config": None}], ids=str)
def test_an_encoder_that_computes_something_else_is_refused_in_a_sentence(fields, encoder):
    vqrae.load_encoder(encoder)
    change(encoder, **fields)
    assert_one_sentence(lambda: vqrae.load_encoder(encoder), encoder, ".")


@pytest.mark.parametrize("fields", [
    {}, {"layer_norm_eps": 1e-3}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "quick_gelu"},
    {"use_mean_pooling": True}, {"use_mask_token": True}, {"drop_path_rate": 0.5}, {"attention_dropout": 0.5}], ids=str)
def test_an_encoder_of_other_settings_equals_transformers_with_these(fields, encoder):
    import transformers

    change(encoder, **fields)
    ours, images = vqrae.load_encoder(encoder), torch.rand(2, 3, 20, 20)
    twin = getattr(transformers, vqrae.FAMILIES[ours.config.family][1]).from_pretrained(encoder).eval()
    with torch.no_grad():
        expected = twin((images - ours.mean) / ours.std).last_hidden_state[:, -25:]
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


def test_a_vit_of_opengvlab_whose_config_does_not_say_so_has_norms_that_are_not_here(tmp_path):
    change(tmp_path, **SIZES, model_type="intern_vit_6b", intermediate_size=48, hidden_act="gelu", layer_norm_eps=1e-6)
    assert_one_sentence(lambda: vqrae.load_encoder(tmp_path), tmp_path, "asks for (qk_normalization|norm_type)")
    change(tmp_path, qk_normalization=False, norm_type="layer_norm", qkv_bias=False)
    assert_one_sentence(lambda: vqrae.load_encoder(tmp_path), tmp_path, "asks for qkv_bias False")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_and_not_taken_for_numbers(dtype, encoder, qwen3):
    for folder, load in ((encoder, vqrae.load_encoder), (qwen3, lambda folder: vqrae.load_qwen3(folder, 7))):
        path = folder / "model.safetensors"
        weights = load_file(path)
        save_file({name: (tensor.to(dtype) if "fc1.weight" in name or "gate_proj" in name else tensor)
                   for name, tensor in weights.items()}, path)
        assert_one_sentence(lambda: load(folder), folder, f"is of type {dtype}, which is not read here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_become_float32(dtype, encoder, qwen3):
    for folder, load in ((encoder, vqrae.load_encoder), (qwen3, lambda folder: vqrae.load_qwen3(folder, 7))):
        path = folder / "model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        assert {parameter.dtype for parameter in load(folder).parameters()} == {torch.float32}


# --- the last norm of InternVL's encoder ---


def internvl_without_mean_pooling(seed=0):
    """A small random encoder of transformers', in which a last norm follows the blocks."""
    import transformers

    torch.manual_seed(seed)
    sizes = {**SIZES, "image_size": [20, 20], "patch_size": [4, 4]}
    twin = transformers.InternVLVisionModel(transformers.InternVLVisionConfig(
        **sizes, intermediate_size=48, attention_bias=True, use_mean_pooling=False)).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return twin


def assert_same_tokens(encoder, twin):
    for size in (20, 28):
        images = torch.rand(2, 3, size, size)
        with torch.no_grad():
            expected = twin((images - encoder.mean) / encoder.std).last_hidden_state[:, 1:]
            torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_an_internvl_encoder_without_mean_pooling_has_its_last_norm(tmp_path):
    twin = internvl_without_mean_pooling()
    twin.save_pretrained(tmp_path)
    encoder = vqrae.load_encoder(tmp_path)
    assert encoder.config.final_norm == "tokens"
    assert_same_tokens(encoder, twin)


def test_an_encoder_inside_an_internvl_without_mean_pooling_has_its_last_norm(tmp_path):
    import transformers

    vision = internvl_without_mean_pooling()
    text = transformers.Qwen2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                    intermediate_size=16, vocab_size=30)
    whole = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
        vision_config=vision.config.to_dict(), text_config=text.to_dict(), image_token_id=1)).eval()
    inside = whole.model.vision_tower
    inside.load_state_dict(vision.state_dict())
    whole.save_pretrained(tmp_path)
    assert_same_tokens(vqrae.load_encoder(tmp_path), inside)


@pytest.mark.parametrize("final_norm", ["none", "tokens", "class"])
def test_an_internvl_encoder_is_exported_with_the_norm_that_it_has(final_norm, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = replace(small_vit(), family="internvl_vision", final_norm=final_norm)
    encoder = vqrae.Encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_encoder(encoder, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_mean_pooling"] == (final_norm == "none")
    twin, images = transformers.InternVLVisionModel.from_pretrained(tmp_path).eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        last = [*encoder.hidden_states(images)][-1]
        expected = encoder.norm(last)[:, 1:]  # "class": it is only left out while Z_I is read before it
        found = twin((images - encoder.mean) / encoder.std).last_hidden_state[:, 1:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vqrae.load_encoder(tmp_path)(images), expected, rtol=1e-5, atol=1e-5)


def test_mean_pooling_is_no_matter_of_other_families(encoders, tmp_path):
    shutil.copytree(encoders / "clip_vision_model", tmp_path / "clip")
    change(tmp_path / "clip", use_mean_pooling=False)
    assert vqrae.load_encoder(tmp_path / "clip").config.final_norm == "class"


# --- what comes before an encoder ---


triples = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@given(mean=triples, std=triples, factor=st.floats(1e-3, 1), rescales=st.booleans(), normalises=st.booleans())
def test_pixels_are_rescaled_and_normalised_as_the_preprocessor_says(mean, std, factor, rescales, normalises):
    preprocessor = {"image_mean": mean, "image_std": std, "rescale_factor": factor, "do_rescale": rescales,
                    "do_normalize": normalises}
    image = torch.rand(3, dtype=torch.float64)
    pixels = 255 * image
    if rescales:
        pixels = factor * pixels
    if normalises:
        pixels = (pixels - torch.tensor(mean).double()) / torch.tensor(std).double()
    found = [torch.tensor(values).double() for values in pixel_statistics(preprocessor, "a path", **IMAGENET)]
    torch.testing.assert_close((image - found[0]) / found[1], pixels, rtol=1e-5, atol=1e-5)


def test_what_a_preprocessor_does_not_say_is_the_familys_and_one_number_is_for_all_channels(encoder):
    usual = vqrae.load_encoder(encoder).config
    for fields, mean, std in (({}, usual.mean, usual.std), ({"image_mean": 0.25}, (0.25,) * 3, usual.std),
                              ({"image_std": 0.5}, (0.25,) * 3, (0.5,) * 3), ({"rescale_factor": 0.00392156862745098},
                                                                            (0.25,) * 3, (0.5,) * 3)):
        change(encoder, "preprocessor_config.json", **fields)
        config = vqrae.load_encoder(encoder).config
        assert config.mean == pytest.approx(mean) and config.std == pytest.approx(std)


def test_a_preprocessor_may_be_a_part_of_a_processor(encoder):
    change(encoder, "processor_config.json", image_processor={"image_mean": [0.25] * 3, "do_rescale": True})
    assert vqrae.load_encoder(encoder).config.mean == (0.25,) * 3


@pytest.mark.parametrize("fields", [
    {"image_mean": [0.5]}, {"image_mean": [0.5] * 4}, {"image_mean": []}, {"image_mean": "0.5"},
    {"image_mean": [None] * 3}, {"image_mean": float("nan")}, {"image_std": 0}, {"image_std": [0.5, 0.0, 0.5]},
    {"image_std": [-1, 1, 1]}, {"rescale_factor": 0}, {"rescale_factor": -1}, {"rescale_factor": None},
    {"rescale_factor": "1/255"}, {"rescale_factor": float("nan")}, {"do_normalize": "no"}, {"do_rescale": "false"},
    {"do_flip_channel_order": True}, {"do_grayscale": True}, {"offset": True}, {"rescale_offset": True}], ids=str)
def test_a_preprocessor_that_makes_no_sense_or_does_something_else_is_one_sentence(fields, encoders, tmp_path):
    shutil.copytree(encoders / "clip_vision_model", tmp_path / "clip")
    change(tmp_path / "clip", "preprocessor_config.json", **fields)
    assert_one_sentence(lambda: vqrae.load_encoder(tmp_path / "clip"), tmp_path, ".")

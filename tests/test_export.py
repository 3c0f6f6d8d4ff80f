"""What is exported: encoders that transformers reads, tokens in shards, graphs in ONNX."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import sample
import vqrae
from conftest import family_twin, needs, normalise, seeds, small_model, small_vit
from export import export_tokens, save_encoder
from support.images import ImageSet


# --- encoders ---


def test_a_saved_encoder_loads_as_the_same_encoder(tmp_path):
    torch.manual_seed(1)
    encoder, images = vqrae.Encoder(small_vit()).eval(), torch.rand(2, 3, 16, 16)
    save_encoder(encoder, tmp_path)
    assert torch.equal(vqrae.load_encoder(tmp_path)(images), encoder(images))


@pytest.mark.parametrize("family", ["dinov2_with_registers", "siglip_vision_model", "clip_vision_model",
                                    "internvl_vision"])
def test_what_we_write_loads_in_transformers_own_class_with_no_key_too_few_or_too_many(family, tmp_path):
    import transformers

    twin, patch_tokens = family_twin(family)
    twin.save_pretrained(tmp_path / "theirs")
    save_encoder(vqrae.load_encoder(tmp_path / "theirs"), tmp_path / "ours")
    kind = getattr(transformers, vqrae.FAMILIES[family][1])
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        ours = vqrae.load_encoder(tmp_path / "ours")
        found = again.eval()((images - ours.mean) / ours.std).last_hidden_state[:, -25:]
    torch.testing.assert_close(found, patch_tokens(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images), patch_tokens(images), rtol=1e-5, atol=1e-5)


def test_the_exported_encoder_and_tokenizer_are_those_of_the_model(saved_model, tmp_path):
    import transformers

    sample.main(["export", "--format", "hf", "--model", str(saved_model), "--out", str(tmp_path / "out"), "--device",
                 "cpu"])
    model, images = vqrae.VQRAE.from_pretrained(saved_model), torch.rand(2, 3, 16, 16)
    twin, report = transformers.Dinov2Model.from_pretrained(tmp_path / "out/encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    features, indices = model.encode(images)
    with torch.no_grad():
        found = twin.eval()(normalise(images)).last_hidden_state[:, 1:]
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)
    assert torch.equal(vqrae.VQRAE.from_pretrained(tmp_path / "out/tokenizer").encode(images)[1], indices)


# --- tokens and graphs ---


@given(shard_size=st.integers(1, 14), seed=seeds)
@settings(max_examples=8)
def test_exported_tokens_are_the_codes_and_the_index_names_their_images(photo_folder, shard_size, seed):
    model, images = small_model(seed), ImageSet(photo_folder, "all", 16)
    with tempfile.TemporaryDirectory() as folder:
        index = export_tokens(model, images, folder, shard_size)
        assert index == json.loads((Path(folder) / "index.json").read_text()) and index["tokens_per_image"] == 16
        codes = torch.cat([load_file(Path(folder) / shard["file"])["codes"] for shard in index["shards"]])
    assert all(shard["images"] == len(shard["names"]) <= shard_size for shard in index["shards"])
    assert sum((shard["names"] for shard in index["shards"]), []) == [record["name"] for record in images.records]
    [batch] = images.batches(range(12), 12)
    assert torch.equal(codes.long(), model.encode(batch.float() / 255)[1])


def test_an_interrupted_export_makes_only_the_codes_that_are_missing(photo_folder, tmp_path, monkeypatch):
    model, images = small_model(), ImageSet(photo_folder, "all", 16)
    index = export_tokens(model, images, tmp_path, 5)
    before = (tmp_path / "index.json").read_bytes()
    (tmp_path / index["shards"][1]["file"]).unlink()
    calls, real = [], vqrae.VQRAE.encode
    monkeypatch.setattr(vqrae.VQRAE, "encode", lambda model, x: (calls.append(len(x)), real(model, x))[1])
    export_tokens(model, images, tmp_path, 5)
    assert calls == [5] and (tmp_path / "index.json").read_bytes() == before


@pytest.mark.parametrize("content", ['["mine"]', '{"shards": ["00000.tar"]}'])
def test_an_index_of_something_else_is_not_written_over(content, saved_model, photo_folder, tmp_path):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(SystemExit, match="has an index.json that is not of tokens; choose another --out"):
        sample.main(["export", "--format", "tokens", "--model", str(saved_model), "--data", str(photo_folder), "--out",
                     str(tmp_path), "--device", "cpu"])
    assert (tmp_path / "index.json").read_text() == content


@pytest.mark.parametrize("form, inside", [("hf", "tokenizer"), ("hf", "encoder"), ("tokens", ".")])
def test_an_export_does_not_write_into_the_folder_of_its_model(form, inside, saved_model, photo_folder, tmp_path):
    shutil.copytree(saved_model, tmp_path / "out" / inside, dirs_exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "out" / inside)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="is what --model .* reads, which would be lost; choose another --out"):
        sample.main(["export", "--format", form, "--model", str(tmp_path / "link"), "--out", str(tmp_path / "out"),
                     "--device", "cpu", *(["--data", str(photo_folder)] if form == "tokens" else [])])
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_tokens_are_not_written_into_the_folder_of_the_images(saved_model, photo_folder):
    with pytest.raises(SystemExit, match="is what --data .* reads"):
        sample.main(["export", "--format", "tokens", "--model", str(saved_model), "--data", str(photo_folder), "--out",
                     str(photo_folder), "--device", "cpu"])


def test_a_model_that_the_new_files_are_linked_to_is_not_changed(saved_model, tmp_path):
    (tmp_path / "out/tokenizer").mkdir(parents=True)
    os.link(saved_model / "model.safetensors", tmp_path / "out/tokenizer/model.safetensors")
    (tmp_path / "out/tokenizer/config.json").symlink_to(saved_model / "config.json")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved_model.iterdir()}
    sample.main(["export", "--format", "hf", "--model", str(saved_model), "--out", str(tmp_path / "out"), "--device",
                 "cpu"])
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in saved_model.iterdir()}
    assert not (tmp_path / "out/tokenizer/config.json").is_symlink()


def test_tokens_of_another_model_are_not_mixed_in(saved_model, photo_folder, tmp_path):
    arguments = ["export", "--format", "tokens", "--model", str(saved_model), "--data", str(photo_folder), "--out",
                 str(tmp_path / "out"), "--device", "cpu"]
    sample.main(arguments)
    small_model(seed=9).save_pretrained(saved_model)
    with pytest.raises(SystemExit, match="tokens of another model or other images"):
        sample.main(arguments)


def test_an_export_does_not_go_on_in_shards_of_another_size(saved_model, photo_folder, tmp_path):
    arguments = ["export", "--format", "tokens", "--model", str(saved_model), "--data", str(photo_folder), "--out",
                 str(tmp_path / "out"), "--device", "cpu", "--shard-size"]
    with pytest.raises(SystemExit, match="do not divide into patches"):
        sample.main(arguments + ["5", "--image-size", "18"])
    sample.main(arguments + ["5"])  # what failed before anything was written is no obstacle
    assert sum(shard["images"] for shard in json.loads((tmp_path / "out/index.json").read_text())["shards"]) == 12
    with pytest.raises(SystemExit, match="shards of another size"):
        sample.main(arguments + ["4"])


@pytest.mark.parametrize("K", [40, 4097])  # few codes, and more than the search sees at a time
def test_exported_onnx_graphs_say_what_torch_says_of_batches_of_any_size(K, saved_model, tmp_path, capsys):
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    small_model(codebook_size=K).save_pretrained(saved_model)
    sample.main(["export", "--format", "onnx", "--model", str(saved_model), "--out", str(tmp_path / "out"), "--device",
                 "cpu", "--image-size", "24"])
    assert "codes equal torch's" in capsys.readouterr().out
    model, images = vqrae.VQRAE.from_pretrained(saved_model), torch.rand(5, 3, 24, 24)
    encode, decode = (onnxruntime.InferenceSession(tmp_path / f"out/{name}.onnx") for name in ("encode", "decode"))
    _, indices = model.encode(images)
    assert np.array_equal(encode.run(["indices"], {"images": images.numpy()})[0], indices)
    decoded = decode.run(["images"], {"indices": indices.numpy()})[0]
    np.testing.assert_allclose(decoded, model.decode(indices), atol=1e-4)


def test_packages_that_onnx_needs_are_named_where_they_are_missing(saved_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="needs packages: pip install onnx onnxscript onnxruntime"):
        sample.main(["export", "--format", "onnx", "--model", str(saved_model), "--out", str(tmp_path), "--device",
                     "cpu"])


@pytest.mark.parametrize("form", ["tokens", "onnx"])
def test_a_model_without_codes_has_none_to_export(form, tmp_path):
    small_model(quantizer="none").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="has no codes"):
        sample.main(["export", "--format", form, "--model", str(tmp_path / "model"), "--device", "cpu"])

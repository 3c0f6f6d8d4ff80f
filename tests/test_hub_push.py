"""Models go to the hub and come back: huggingface_hub's own client, and on 127.0.0.1 what it asks of a hub."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import unitok
import vqrae
from conftest import small_captioner, small_model, small_vit, text_lm
from support.files import InputError


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as push and pull take: `server.repositories` has files by their names, by repository."""

    def log_message(self, *words):
        pass

    def answer(self, content, status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{constants.ENDPOINT}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, action = re.match(r"/api/models/([\w-]+/[\w-]+)/(\w+)/main", self.path).groups()
        if action == "preupload":
            return self.answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                          for file in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{40 * '1'}", "commitOid": 40 * "1",
                     "success": True})

    def do_GET(self):
        found = re.match(r"/(?:api/models/)?([\w-]+/[\w-]+)", self.path)
        files = self.server.repositories.get(found and found[1])
        if files is None:
            return self.answer({}, 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if self.path.startswith("/api/"):
            listed = [{"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": 40 * "2"}
                      for name, content in files.items()]
            return self.answer(listed if "/tree/" in self.path else {"id": found[1], "sha": 40 * "1",
                                                                     "siblings": listed})
        content = files[self.path.split("/resolve/")[1].split("/", 1)[1]]
        etag = hashlib.sha1(content).hexdigest()
        self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=40 * "1")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, as files by their names, by repository."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = {}
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server.repositories
    server.shutdown()




def same(one, other):
    """Whether two models are of one class, with the same config, weights to the last bit, and words."""
    texts = [getattr(model, "text", None) or getattr(getattr(model, "lm", None), "text", None)
             for model in (one, other)]
    ours, theirs = one.state_dict(), other.state_dict()
    return (type(one) is type(other) and one.config == other.config and list(ours) == list(theirs)
            and all(torch.equal(ours[name], theirs[name]) for name in ours)
            and len({text and text.to_str() for text in texts}) == 1)


def small_unitok():
    torch.manual_seed(0)
    return unitok.UniTok(unitok.UniTokConfig(small_vit(), 16, 4, codebook_size=40, codebook_dim=12, quantizer="mcq",
                                             codebooks=4)).eval()


MODELS = {"VQRAE": small_model, "VisualLM": text_lm, "Captioner": small_captioner, "UniTok": small_unitok,
          "DepthLM": lambda: unitok.DepthLM.around(text_lm(), 4).eval()}


# --- push and pull ---


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_pushed_and_pulled_is_the_same_model(hub, kind):
    model = MODELS[kind]()
    model.push_to_hub("somebody/something")
    pulled = type(model).from_pretrained("somebody/something")
    assert same(model, pulled) and not pulled.training


@pytest.mark.parametrize("kind, load", [("VQRAE", unitok.load_tokenizer), ("UniTok", unitok.load_tokenizer),
                                        ("VisualLM", unitok.load_language_model),
                                        ("DepthLM", unitok.load_language_model)])
def test_what_is_pulled_is_of_the_class_that_was_pushed(hub, kind, load):
    model = MODELS[kind]()
    model.push_to_hub("somebody/something")
    assert same(model, load("somebody/something"))


def test_the_tokenizer_of_a_generator_goes_along_on_push_and_pull_and_push_again(hub, tmp_path):
    tokenizer = small_model()
    text_lm().save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar/vqrae")
    vqrae.VisualLM.from_pretrained(tmp_path / "ar").push_to_hub("somebody/writer")
    vqrae.VisualLM.from_pretrained("somebody/writer").push_to_hub("another/writer")
    for name in hub:
        assert same(tokenizer, vqrae.VQRAE.from_pretrained(f"{name}/vqrae"))
        assert "another/writer/vqrae" in hub["another/writer"]["README.md"].decode()


def test_the_encoder_of_a_pushed_tokenizer_is_read_from_the_hub(hub):
    model = small_model()
    model.push_to_hub("somebody/tokenizer")
    assert same(model.encoder, vqrae.load_encoder("somebody/tokenizer"))


# --- the card ---


def test_the_card_states_data_settings_and_figures_of_the_run(hub, tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(
        {"val_psnr": 22.512345, "val_tokens": 61824, "preset": "tiny", "data": "emoji", "steps": 1200, "unsaid": None}))
    vqrae.VQRAE.from_pretrained(tmp_path).push_to_hub("somebody/tokenizer")
    card = huggingface_hub.ModelCard(hub["somebody/tokenizer"]["README.md"].decode())
    figures, settings = card.text.split("## Figures")[1].split("## Settings")
    assert "| val_psnr | 22.51 |" in figures and "| val_tokens | 61824 |" in figures
    assert "| steps | 1200 |" in settings and "unsaid" not in settings
    assert "data: emoji" in card.text.split("## Data")[1] and card.data.library_name == "vqrae"
    assert json.loads(hub["somebody/tokenizer"]["summary.json"])["val_psnr"] == 22.512345


def test_without_a_run_the_card_states_the_sizes_and_the_data_that_one_names(hub):
    small_model().push_to_hub("somebody/tokenizer", data="Emoji of three styles.")
    card = hub["somebody/tokenizer"]["README.md"].decode()
    assert "Emoji of three styles." in card and "| codebook_size | 40 |" in card and "Figures" not in card
    assert 'vqrae.VQRAE.from_pretrained("somebody/tokenizer")' in card


# --- local folders, and sentences ---


def test_a_saved_model_has_no_card_and_keeps_what_else_is_in_the_folder(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    small_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_local_folder_comes_before_a_model_of_the_hub(hub, tmp_path, monkeypatch):
    small_model(seed=1).push_to_hub("out/stage1")
    monkeypatch.chdir(tmp_path)
    small_model(seed=2).save_pretrained("out/stage1")
    assert same(vqrae.VQRAE.from_pretrained("out/stage1"), small_model(seed=2))


@pytest.mark.parametrize("source", [Path("out/stage2"), "out/stage2", "stage2", "./nowhere/stage2", "/nowhere/stage2"])
def test_what_can_only_be_a_local_folder_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch, source):
    small_model().push_to_hub("out/stage2")
    monkeypatch.chdir(tmp_path)
    if isinstance(source, str):
        (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="the folder does not exist; python train.py --stage 1 makes one"):
        vqrae.VQRAE.from_pretrained(source)


def test_what_is_neither_here_nor_on_the_hub_ends_in_a_sentence(hub):
    with pytest.raises(InputError, match="no model at 'nobody/nothing': .*; python train.py --stage ar makes one"):
        vqrae.VisualLM.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"encoder": 1}'])
def test_what_comes_damaged_from_the_hub_ends_in_a_sentence(hub, content):
    small_model().push_to_hub("somebody/tokenizer")
    hub["somebody/tokenizer"]["config.json"] = content
    with pytest.raises(InputError, match="config.json"):
        vqrae.VQRAE.from_pretrained("somebody/tokenizer")


def test_a_push_that_is_refused_ends_in_a_sentence(hub, monkeypatch):
    monkeypatch.setattr(Hub, "do_POST", lambda self: self.answer({"error": "no"}, 403))
    with pytest.raises(InputError, match="'somebody/tokenizer' was not pushed; the hub says: .*403"):
        small_model().push_to_hub("somebody/tokenizer")

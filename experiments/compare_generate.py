"""Greedy generation beside transformers' `generate`: the same weights, prompts and machine, in alternating processes.

    python experiments/compare_generate.py --model out/ar

Also times ours at growing lengths, for what a longer picture costs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import vqrae  # noqa: E402

CAPTIONS = [f"{style} {words}" for words in ("red apple", "cat face", "waving hand", "flag: Chile")
            for style in ("noto", "fluent", "twemoji", "emoji")]


def transformers_twin(model):
    """transformers' Qwen3 with the weights of a VisualLM, text and codes in one vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config
    twin = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=config.text_vocabulary + config.codebook_size, hidden_size=config.width,
        num_hidden_layers=config.depth, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_width, intermediate_size=config.mlp_width, rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=True, attention_bias=False)).eval()
    weights = {vqrae.qwen3_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return twin


@torch.no_grad()
def measure(which, folder, repeats):
    """One process: the codes, and the median seconds of a whole batch."""
    model = vqrae.VisualLM.from_pretrained(folder)
    V, count = model.config.text_vocabulary, model.config.image_tokens
    tokens, first = model.pack([model.prompt(caption) for caption in CAPTIONS])
    if which == "ours":
        def run():
            return model.generate(CAPTIONS, temperature=0)
    else:
        twin = transformers_twin(model)
        mask = (torch.arange(tokens.shape[1]) >= first[:, None]).long()

        def run():
            out = twin.generate(tokens, attention_mask=mask, max_new_tokens=count, min_new_tokens=count,
                                do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=list(range(V)))
            return out[:, tokens.shape[1]:] - V
    codes, times = run(), []
    for _ in range(repeats):
        begin = time.time()
        run()
        times.append(time.time() - begin)
    return {"codes": codes.tolist(), "seconds": statistics.median(times)}


@torch.no_grad()
def lengths(folder):
    """Milliseconds a token, of a batch of one, and megabytes of the cache at growing lengths."""
    model = vqrae.VisualLM.from_pretrained(folder)
    for count in (64, 256, 1024, 4096):
        begin = time.time()
        model.extend([model.prompt("red apple")], count, temperature=0)
        took = time.time() - begin
        cache = vqrae.KeyValueCache(model.config, 1, count, "cpu", torch.float32)
        print(f"{count:5} tokens: {1000 * took / count:.2f} ms each, cache {cache.memory.nbytes / 2**20:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out/ar")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind, in turn")
    parser.add_argument("--repeats", type=int, default=5, help="timed batches in a process")
    parser.add_argument("--only", choices=["ours", "transformers", "lengths"], help="what a process measures")
    args = parser.parse_args()
    if args.only == "lengths":
        lengths(args.model)
    elif args.only:
        print(json.dumps(measure(args.only, args.model, args.repeats)))
    else:
        found = {"ours": [], "transformers": []}
        for _ in range(args.rounds):
            for which, results in found.items():
                result = subprocess.run([sys.executable, *sys.argv, "--only", which], check=True, text=True,
                                        stdout=subprocess.PIPE)
                results.append(json.loads(result.stdout.splitlines()[-1]))
        codes = found["ours"][0]["codes"]
        rates = {which: len(codes) * len(codes[0]) / statistics.median(r["seconds"] for r in results)
                 for which, results in found.items()}
        same = all(result["codes"] == codes for results in found.values() for result in results)
        print(f"batch {len(codes)}, {len(codes[0])} tokens each: ours {rates['ours']:,.0f} tokens/s, transformers "
              f"{rates['transformers']:,.0f}, ratio {rates['ours'] / rates['transformers']:.2f}, "
              f"{'the same tokens' if same else 'DIFFERENT TOKENS'}")
        subprocess.run([sys.executable, *sys.argv, "--only", "lengths"], check=True)


if __name__ == "__main__":
    main()

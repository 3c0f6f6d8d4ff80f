"""Train a VQRAE, and the transformers that write and read its images.

    python train.py --stage 1                      # the shipped encoder and emoji, a laptop, a few minutes
    python train.py --stage 1 --data my/photos     # any folder of images
    python train.py --stage 1 --resume             # go on after an interruption, bit for bit
    python train.py --stage 2 --init out/stage1    # unfreeze the encoder, under self-distillation
    python train.py --stage ar --tokenizer out/stage2    # a transformer that writes images, code by code, from text
    python train.py --stage caption                # one that reads the encoder's features and writes captions
    python train.py --stage 1 --help               # the flags of a stage; each has its own
    torchrun --nproc-per-node 8 train.py --stage 1 ...   # many GPUs: the batch is shared out, the result is the same

Leaves in --out: config.json + model.safetensors (averaged weights, what sample.py reads), metrics.jsonl, summary.json,
curves.png, reconstructions.png or samples.png, and checkpoint/ (what --resume needs).
"""

import argparse
import copy
import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

import vqrae
from presets import FIXED_BY_QWEN3, FIXED_BY_STAGE_1, PRESETS, SAMPLING, CaptionConfig, GenerationConfig, TrainingConfig
from support.benchmark import benchmark
from support.codes import image_codes, tokens_and_patches
from support.files import InputError, digest
from support.images import TrainingOrder, resize_to
from support.metrics import caption_accuracy, evaluate, fit_reading, loss_on_captions, loss_on_codes, psnr, usage
from support.muon import Muon
from support.pictures import draw_written, save_side_by_side
from support.run import Run, Stage, one_sentence_errors, process_group
from support.settings import ShortHelp, add_run_flags, add_settings, flag, flags_of, refuse_dashes, value_in
from support.text import caption_of, misread, recolour, text_of, train_text_tokenizer
from unitok import (StageOneConfig, check_supervision, further_figures, load_language_model, load_tokenizer,
                    new_tokenizer, stage_one_config, with_depth, writes_codes_of)


def make_optimizers(module, config, learning_rate, bf16):
    """AdamW for what a module trains: a VQRAE's encoder at its own rate, no decay for vectors and embeddings.

    With --muon-learning-rate the matrices under a name with ".blocks." that did not come pretrained are Muon's.
    """
    groups, blocks = {}, []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # TiTok's rule exempts embeddings, and W stands for one.
            embeddings = ("quantizer.", "embed", "positions", "cls_token", "registers")
            matrix = parameter.dim() >= 2 and not any(part in name for part in embeddings)
            in_encoder = name.startswith("encoder.")
            pretrained = in_encoder or getattr(config, "qwen3", None)
            if parameter.dim() == 2 and ".blocks." in f".{name}" and not pretrained and config.muon_learning_rate:
                blocks.append(parameter)
                continue
            rate = config.encoder_learning_rate if in_encoder else learning_rate
            groups.setdefault((rate, config.weight_decay if matrix else 0.0), []).append(parameter)
    optimizers = {"optimizer": torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
         for (rate, decay), parameters in groups.items()], betas=config.betas, eps=config.adam_epsilon)}
    if blocks:
        rate = config.muon_learning_rate
        optimizers["muon"] = Muon([{"params": blocks, "lr": rate, "peak": rate, "weight_decay": config.weight_decay}],
                                  torch.bfloat16 if bf16 else torch.float32)
    return optimizers


def stage_1(run, config):
    """Stage 1, Eq. 4: the encoder is frozen; projections, quantizer and decoder learn to reconstruct images."""
    model = model_of_init(run, config) if run.args.init else None
    train_images, val_images = run.read_images(config.image_size)
    model = model or new_tokenizer(config, train_images)
    check_supervision(model, config)
    start = run.share_start if run.args.init else functools.partial(start_tokenizer, run, config)
    if config.encoder_learning_rate > 0 or config.adversarial_weight > 0:  # Table 6's one stage: all from step 0 on
        return train_everything(run, config, model, val_images, start)
    model.encoder.requires_grad_(False)
    model.to(run.device)
    perceptual = perceptual_loss(run, config, model.encoder)
    run.train(model, make_optimizers(model, config, config.learning_rate, run.bf16))  # takes both; `step` trains
    forward, extended = run.compiled(model), isinstance(config, StageOneConfig)  # losses that a plain VQRAE has not

    def losses(images, places, generator):
        with run.autocast():
            out = forward(images)  # X' (B, 3, H*q/p, W*q/p), Z_I (B, N, d), indices (B, N) and L_quant
            loss, terms = vqrae.stage1_loss(images, out, perceptual, config.perceptual_weight, config.quantizer_weight,
                                            generator)  # Eq. 4
            if extended:
                loss, terms = model.supervise(loss, terms, out, config, train_images, places)
        return loss, terms, out

    losses = run.shared(model, losses)

    def step(batch):
        batch, places = batch
        generator = run.generator()
        for part in run.parts(len(batch)):  # gradients start at zero; more than one part with --accumulate
            images = batch[part].to(run.device).float() / 255  # (B, 3, H, W) in [0, 1]
            loss, terms, out = losses(images, places[part], generator)
            run.backward(loss, terms)
            note_reconstruction(run, model, images, out)
        run.update()  # clips gradients, steps the optimizers, moves the average of the weights

    return tokenizer_stage(run, config, model.encoder, val_images, step, start)


def stage_2(run, config):
    """Stage 2: the model of stage 1 goes on, its encoder included."""
    model = model_of_init(run, config)
    _, val_images = run.read_images(config.image_size)
    return train_everything(run, config, model, val_images, run.share_start, before=run.args.init)


def train_everything(run, config, model, val_images, *further, **options):
    """Eq. 6: the encoder learns too, held to a frozen copy of itself; later a discriminator joins in."""
    distils = config.encoder_learning_rate > 0 and config.distillation_weight > 0
    # The teacher T is the encoder as it is now. As long as the encoder is frozen they are one.
    teacher = copy.deepcopy(model.encoder) if config.encoder_learning_rate > 0 else model.encoder
    teacher.eval().requires_grad_(False).to(run.device)
    model.encoder.requires_grad_(config.encoder_learning_rate > 0)
    model.to(run.device)
    perceptual = perceptual_loss(run, config, teacher)
    run.train(model, make_optimizers(model, config, config.learning_rate, run.bf16))  # takes both; `step` trains
    discriminator = train_discriminator(run, config) if config.adversarial_weight > 0 else None
    forward, extended = run.compiled(model), isinstance(config, StageOneConfig)  # losses that a plain VQRAE has not

    def losses(images, places, generator, judge):
        with run.autocast():
            out = forward(images)  # X' (B, 3, H*q/p, W*q/p), Z_I (B, N, d), indices (B, N) and L_quant
            with torch.no_grad():
                teacher_features = teacher(images) if distils else None  # T(X) (B, N, d)
            loss, terms = vqrae.stage2_loss(
                images, out, perceptual, config.perceptual_weight, config.quantizer_weight, generator, teacher_features,
                config.distillation_weight, judge, config.adversarial_weight)  # Eq. 6
            if extended:
                loss, terms = model.supervise(loss, terms, out, config, run.train_images, places)
        return loss, terms, out

    losses = run.shared(model, losses)
    if discriminator is not None:
        discriminator_losses = run.shared(discriminator, functools.partial(discriminator.loss,
                                                                           over_ranks=run.over_ranks))

    def step(batch):
        batch, places = batch
        generator = run.generator()
        judge = discriminator if discriminator is not None and run.done >= config.discriminator_start else None
        for part in run.parts(len(batch)):
            images = batch[part].to(run.device).float() / 255  # (B, 3, H, W) in [0, 1]
            loss, terms, out = losses(images, places[part], generator, judge)
            run.backward(loss, terms)
            if judge is not None:  # the discriminator's turn: it sees the same pictures, and moves nothing but itself
                fake = out.reconstruction.detach().float()
                loss, logits = discriminator_losses(resize_to(images, fake), fake)
                run.backward(loss, logits, name="discriminator_loss")
            note_reconstruction(run, model, images, out)
        run.update()
        if judge is not None:
            discriminator.remember(*run.whole_batch("real_logit", "fake_logit"))

    return tokenizer_stage(run, config, teacher, val_images, step, *further, **options)


def train_discriminator(run, config):
    """The discriminator of Eq. 2's L_G, given to the run."""
    if config.discriminator_width % 32:
        raise InputError(f"--discriminator-width {config.discriminator_width} is not a multiple of 32")
    discriminator = vqrae.Discriminator(config.discriminator_width).to(run.device)
    optimizers = make_optimizers(discriminator, config, config.discriminator_learning_rate, run.bf16)
    run.train_beside("discriminator", discriminator, optimizers, config.discriminator_start)
    return discriminator


def model_of_init(run, config, load=load_tokenizer):
    """The model in --init, to be trained on with new optimizers; the settings that it fixes are read off it."""
    model = load(run.args.init)
    for name in asdict(config).keys() & {*FIXED_BY_INIT[run.args.stage]}:
        setattr(config, name, getattr(getattr(model, "lm", model).config, name, getattr(model.config, name, None)))
    return model


def perceptual_loss(run, config, encoder):
    """The L_P of --perceptual, with the frozen encoder's eyes or those of others, or None."""
    if config.perceptual == "none":
        return None
    if config.perceptual == "lpips-convnext":
        return vqrae.PaperPerceptual().to(run.device)
    # Autocast would turn the same weights into bf16 at every step, and back and forth what passes between them.
    return vqrae.VFMPerceptual(copy.deepcopy(encoder).bfloat16() if run.bf16 else encoder)


def start_tokenizer(run, config):
    """Before step 0 of stage 1: show the model training tokens, to standardise features and to place its codes."""
    batches = run.train_images.batches(TrainingOrder(len(run.train_images), run.args.seed, start=0), config.batch_size,
                                       run.workers)
    images = (batch.to(run.device).float() / 255 for batch in batches)
    features, patches = tokens_and_patches(run.model.encoder, images, config.accumulate,
                                           most=max(config.start_tokens, 4 * config.codebook_size))
    run.model.start(features, patches, config.codebook_init, config.projection_init,
                    torch.Generator().manual_seed(run.args.seed))
    run.share_start()


@torch.no_grad()
def note_reconstruction(run, model, images, out):
    """Log how good the reconstructions are, how long features and codes, and which codes were chosen."""
    reconstruction = out.reconstruction.float()
    run.note({"train_psnr": psnr(resize_to(images, reconstruction), reconstruction.clamp(0, 1)).mean(),
              "z_norm": out.z.norm(dim=-1).mean(), "code_norm": out.z_q.norm(dim=-1).mean()})
    if out.indices is not None:
        run.note_codes(model.count(out.indices))


def tokenizer_stage(run, config, teacher, val_images, step, start, before=None):
    """A Stage whose figures are those of reconstruction; `before` is the folder of a model to draw beside the run's."""
    model, where = run.average, (64, run.device, run.workers)
    run.fixed["encoder"] = asdict(model.config.encoder)
    tokens = (config.image_size // model.config.encoder.patch_size) ** 2

    def figures():
        return {f"val_{name}": value for name, value in evaluate(model, val_images, *where).items()}

    def summarise():
        summary = figures()
        if config.quantizer != "none":
            summary |= {f"train_{name}": value for name, value in usage(model, run.train_images, *where).items()}
        return summary | further_figures(model, config, tokens, run.train_images, val_images, *where)

    @torch.no_grad()
    def draw():
        images = val_images.spread(24).to(run.device)
        models = [load_tokenizer(before).to(run.device), model] if before else [model]
        save_side_by_side([images] + [model(images).reconstruction for model in models],
                          run.args.out / "reconstructions.png")
        return "reconstructions.png (originals left, then reconstructions)"

    def export():
        fit_reading(model, run.train_images, *where)
        model.save_pretrained(run.args.out)

    return Stage(step, lambda: run.batches(with_places=True), figures, summarise, draw, export, tokens, start, teacher)


def stage_ar(run, config):
    """Stage ar, Section 3.5: a transformer learns to write an image's codes behind its caption."""
    tokenizer = load_tokenizer(config.tokenizer).to(run.device)
    codes, records = codes_and_records(run, config, tokenizer)
    captions = {split: [caption_of(record) for record in some] for split, some in records.items()}
    if not any(captions["train"]) and run.rank == 0:
        print("no captions: the images are not in folders of classes and have no .txt files beside them, so the model "
              "learns to write images unasked")
    torch.manual_seed(run.args.seed)  # again: reading images has drawn from it, reading cached codes has not
    tokens = codes["train"].shape[1]
    if run.args.init:
        model = model_of_init(run, config, load_language_model)
        if not writes_codes_of(model, tokenizer) or model.config.image_tokens != tokens:
            raise InputError(f"the model in {run.args.init} was trained with other codes than {config.tokenizer} has")
    else:
        model = with_depth(language_model(config, captions["train"], tokenizer.config.codebook_size, tokens), tokenizer)
    model.to(run.device)
    run.fixed["codes of the images (SHA-256)"] = digest(*codes.values())
    run.fixed["text tokenizer (SHA-256)"] = digest(model.text.to_str().encode())
    run.train(model, make_optimizers(model, config, config.learning_rate, run.bf16))  # takes both; `step` trains
    losses = run.shared(model, run.compiled(model.loss))

    def batches():  # every rank knows all of a batch, and takes its share when all is drawn
        keys = iter(TrainingOrder(len(codes["train"]), run.args.seed, run.done * config.batch_size))
        while True:
            yield [next(keys)[0] for _ in range(config.batch_size)]

    def step(places):
        generator = run.generator()
        without_caption, without_style = torch.rand(2, len(places), generator=generator).tolist()
        prompts = [model.prompt(caption_of(records["train"][place], style=b >= config.style_dropout)
                                if a >= config.caption_dropout else "")
                   for place, a, b in zip(places, without_caption, without_style)]
        written = codes["train"][places]  # (B, N), or (B, N, M) with M codebooks
        read = misread(written, config.code_noise, generator)  # the same, but for some codes of other places
        prompts, written, read = (whole[run.rank::run.ranks] for whole in (prompts, written, read))
        for part in run.parts(len(prompts)):
            tokens, first = model.pack(prompts[part], written[part])  # (B, n), (B,)
            seen, _ = model.pack(prompts[part], read[part])  # (B, n)
            with run.autocast():
                loss = losses(tokens, first, seen)  # cross-entropy of the codes alone
            run.backward(loss)
        run.update()

    def figures():
        draw_written(run.average, tokenizer, codes, captions, run.device, run.args.out / "samples.png", SAMPLING)
        return {"val_loss": loss_on_codes(run.average, captions["val"], codes["val"])}

    def export():  # with a copy of the tokenizer, for codes mean nothing without it
        run.average.save_pretrained(run.args.out)
        tokenizer.save_pretrained(run.args.out / "vqrae")

    picture = "samples.png (the tokenizer's left, written right; three rows of training, three of held-out captions)"
    return Stage(step, batches, figures, figures, lambda: picture, export, tokens)


def codes_and_records(run, config, tokenizer):
    """The codes of all images (n, N) by split, and the records that say what they show, recoloured ones among them."""
    if tokenizer.config.quantizer == "none":
        raise InputError(f"the model in {config.tokenizer} has no codes to predict (--quantizer none)")
    codes, records = {}, {}
    for split, images in zip(("train", "val"), run.read_images(tokenizer.config.image_size)):
        with run.first_rank_first():  # it makes them, the others read them
            codes[split], places = image_codes(tokenizer, images, run.args.out / "codes", 64, run.device, run.workers)
        records[split] = [images.records[place] for place in places.tolist()]
        if split == "train" and config.recolour == "yes":
            more_codes, more_records = recolour(tokenizer, images, places.tolist(), run.device)
            codes[split], records[split] = torch.cat([codes[split], *more_codes]), records[split] + more_records
    return codes, records


def stage_caption(run, config):
    """Stage caption, Section 3.4: a transformer learns to write captions of a frozen encoder's features."""
    before = model_of_init(run, config, vqrae.Captioner.from_pretrained) if run.args.init else None
    encoder = before.encoder if before else vqrae.load_encoder(config.encoder)
    if config.image_size % encoder.config.patch_size:
        raise InputError(f"--image-size {config.image_size} is not a multiple of the encoder's patches of "
                         f"{encoder.config.patch_size} pixels")
    train_images, val_images = run.read_images(config.image_size)
    texts = [text_of(record) for record in train_images.records]
    if not any(texts):
        raise InputError(f"the images in {config.data} have no captions: put them into one folder per class, or a "
                         "caption for 0.png into 0.txt beside it")
    lm = before.lm if before else language_model(config, texts)
    model = before or vqrae.Captioner(vqrae.CaptionerConfig(encoder.config, config.image_size, lm.config), lm.text)
    model.encoder, model.lm = encoder.requires_grad_(False), lm
    model.to(run.device)
    run.fixed["encoder (SHA-256)"] = digest(*encoder.state_dict().values())
    run.fixed["text tokenizer (SHA-256)"] = digest(lm.text.to_str().encode())
    run.train(model, make_optimizers(model, config, config.learning_rate, run.bf16))  # takes both; `step` trains
    losses = run.shared(model, run.compiled(model.loss))

    def step(batch):
        batch, places = batch
        captions = [text_of(train_images.records[place]) for place in places]
        tokens = [len(model.tokens(caption)) for caption in captions]
        usual = torch.tensor(sum(tokens) / len(tokens), dtype=torch.float64,
                             device=run.device if run.ranks > 1 else "cpu")
        run.over_ranks([usual])
        for part in run.parts(len(batch)):
            images = batch[part].to(run.device).float() / 255  # (B, 3, H, W) in [0, 1]
            with run.autocast():
                loss = losses(images, captions[part])  # cross-entropy of words and ends
            # Parts and ranks are weighed by their images, and this loss is a mean over tokens.
            run.backward(loss * (sum(tokens[part]) / len(tokens[part]) / usual.item()))
        run.update()

    def figures():
        return {"val_loss": loss_on_captions(run.average, val_images, 64, run.device, run.workers)}

    def summarise():
        right = caption_accuracy(run.average, val_images, 64, run.device, run.workers)
        return figures() | {f"val_{name}": share for name, share in right.items()}

    return Stage(step, lambda: run.batches(with_places=True), figures, summarise,
                 draw=lambda: None,  # `sample.py caption` shows what it writes
                 export=lambda: run.average.save_pretrained(run.args.out),
                 tokens_per_image=(config.image_size // encoder.config.patch_size) ** 2)


def language_model(config, texts, codebook_size=0, image_tokens=0):
    """A VisualLM of the configured sizes with a text tokenizer made from the texts; or Qwen3's, with its tokenizer."""
    if config.qwen3:
        model = vqrae.load_qwen3(config.qwen3, codebook_size, image_tokens)
        if model.text is None:
            raise InputError(f"{config.qwen3} has no tokenizer.json, so it cannot read captions")
        return model
    text = train_text_tokenizer(texts, config.text_vocabulary)
    return vqrae.VisualLM(vqrae.LMConfig(
        text.get_vocab_size(), codebook_size, config.width, config.depth, config.heads, config.kv_heads,
        config.head_width, config.mlp_width, image_tokens, max(vqrae.LMConfig.max_tokens, image_tokens + 512)), text)


STAGES = {"1": (stage_1, StageOneConfig), "2": (stage_2, TrainingConfig), "ar": (stage_ar, GenerationConfig),
          "caption": (stage_caption, CaptionConfig)}
FIXED_BY_INIT = {"1": (*FIXED_BY_STAGE_1, "codebooks", "projection", "latent_noise"), "2": FIXED_BY_STAGE_1,
                 "ar": ("qwen3", *FIXED_BY_QWEN3), "caption": ("qwen3", "encoder", "image_size", *FIXED_BY_QWEN3)}
SETTINGS = flags_of(TrainingConfig, CaptionConfig, GenerationConfig, StageOneConfig)  # of every stage, by name


def parse_args(argv=None):
    """The arguments; --help shows what the stage that is named has."""
    stage = value_in(argv, "--stage")
    own = flags_of(STAGES[stage][1]) if stage in STAGES else {}
    if stage == "2":
        own = {name: field for name, field in own.items() if name not in FIXED_BY_STAGE_1}
    parser = argparse.ArgumentParser(usage=f"python train.py --stage {stage if own else 'STAGE'} [options]",
                                     description=None if own else __doc__, formatter_class=ShortHelp)
    add = parser.add_argument
    add("--stage", choices=list(STAGES), required=True, help="1: frozen encoder, train codebook and decoder; 2: train "
        "the encoder too; ar: a transformer writes codes from text; caption: writes captions")
    add("--preset", choices=list(PRESETS), default="tiny", help="the settings that the flags below change")
    add("--init", type=Path, metavar="DIR", help="start from this folder's model, with new optimizers; stage 2: "
        "that of stage 1 (default: out/stage1)")
    add("--benchmark", action="store_true", help="time steady steps, print one JSON line, train nothing")
    add("--print-config", action="store_true", help="print all settings as JSON and stop")
    add_run_flags(parser)
    add_settings(parser, own | SETTINGS, hidden=SETTINGS.keys() - own.keys())
    refuse_dashes(parser, argv)
    args = parser.parse_args(argv)
    args.init = args.init or (Path("out/stage1") if args.stage == "2" else None)
    args.out = args.out or Path("out") / (f"stage{args.stage}" if args.stage in ("1", "2") else args.stage)
    return args


def settings_for(args, stage):
    """The preset's settings of a stage, changed by the flags given; InputError for flags that it does not have."""
    if stage not in PRESETS[args.preset]:
        raise InputError(f"--preset {args.preset} has no settings for --stage {stage}")
    config = PRESETS[args.preset][stage]
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    if stage == "1":
        config = stage_one_config(config, given)
    for name in given:
        if args.init and stage == args.stage and name in FIXED_BY_INIT[stage]:
            raise InputError(f"{flag(name)} is fixed by the model that stage {stage} starts from, --init")
        if name in FIXED_BY_QWEN3 and (args.qwen3 or getattr(config, "qwen3", None)):
            raise InputError(f"{flag(name)} is fixed by the checkpoint of --qwen3")
        if not hasattr(config, name):
            raise InputError(f"{flag(name)} is no setting of --stage {stage}")
    return replace(config, **given)


def train(args, config):
    """A whole run: the steps that are left, then the final figures and pictures."""
    run = Run(args, config)
    stage = STAGES[args.stage][0](run, config)
    for batch in run.steps(stage):
        stage.step(batch)
    run.finish(stage)
    return run, stage


def main(argv=None):
    args = parse_args(argv)
    with one_sentence_errors(), process_group(args.device):
        config = settings_for(args, args.stage)
        if args.print_config:
            settings = {"stage": args.stage, "preset": args.preset, "seed": args.seed, **asdict(config)}
            fixed = FIXED_BY_INIT[args.stage] if args.init else ()
            print(json.dumps({name: value for name, value in settings.items() if name not in fixed}, indent=2))
        elif args.benchmark:
            run = Run(args, config)
            benchmark(run, STAGES[args.stage][0](run, config))
        else:
            train(args, config)


if __name__ == "__main__":
    main()

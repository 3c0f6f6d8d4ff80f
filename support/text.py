"""Captions: what a record of an image says, the byte-pair tokenizer, and colours and misreading for small sets."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torchvision.transforms import functional as pixels

from support.files import InputError


# The first stands between a text and its image, the second behind a text; Qwen3's own tokenizer.json has both names.
START_OF_IMAGE, END_OF_TEXT = "<|vision_start|>", "<|endoftext|>"


def train_text_tokenizer(texts, size):
    """A byte-pair tokenizer of up to `size` tokens, for any text; it ignores case, and an article at the beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("’", "'"), normalizers.Strip(),
        normalizers.Replace(Regex("^(a|an|the) "), "")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT, START_OF_IMAGE], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer


def load_text_tokenizer(path, vocabulary):
    """The tokenizer in a tokenizer.json; InputError when it is missing or damaged, or lacks our two special tokens, or
    has more tokens than the text part of the vocabulary has rows.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise InputError(f"cannot read the text tokenizer {path}: {error}") from None
    for token in (START_OF_IMAGE, END_OF_TEXT):
        if tokenizer.token_to_id(token) is None:
            raise InputError(f"the text tokenizer {path} has no token {token}")
    if max(tokenizer.get_vocab().values()) >= vocabulary:
        raise InputError(f"the text tokenizer {path} has more tokens than the {vocabulary} of its model's config.json")
    tokenizer.no_truncation()  # which the file may ask for, but nobody who reads one caption wants
    tokenizer.no_padding()
    return tokenizer


def readable(text):
    """Text with what stands for no character (bytes that are not UTF-8, half of a pair) replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def id_of(tokenizer, control):
    """The id of START_OF_IMAGE or END_OF_TEXT; InputError for a model without a text tokenizer."""
    if tokenizer is None:
        raise InputError("this model has no text tokenizer, so it reads tokens and no captions")
    return tokenizer.token_to_id(control)


def tokens_of(tokenizer, text):
    """The tokens of a text, as a list of ids; what looks like a control token in it is text, like all else."""
    if tokenizer is None:
        raise InputError("this model has no text tokenizer, so it reads tokens and no captions")
    text, controls = readable(text), {tokenizer.token_to_id(control) for control in (START_OF_IMAGE, END_OF_TEXT)}
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if controls & set(ids):  # a file of someone else's may not call them special
        ids = tokenizer.encode(text.replace("<|", "< |"), add_special_tokens=False).ids
    return [token for token in ids if token not in controls]


def text_of(record):
    """What a Captioner is to say of an image: its category and its caption, or what there is of the two."""
    said = ": ".join(filter(None, [record.get("category", "").replace("_", " "), record.get("caption")]))
    return readable(said)


def caption_of(record, style=True):
    """The words that ask for an image: its style, if wanted, and its caption or else its class; "" if it has none."""
    words = record.get("caption") or record.get("category", "").replace("_", " ")
    return readable(f"{record['style']} {words}" if style and "style" in record else words)


def misread(codes, most, generator):
    """Codes (B, N), or (B, N, M), of which some places have another's: in each image its own share, up to `most`.

    An image of a small set is known by its first codes. A transformer that reads them as they are may learn to go on
    from there, by heart, and have no use for the caption; once it writes, its first slip leads it to another image or
    to none. One that may not trust what it reads learns what the caption says about every place.
    """
    share, places = most * torch.rand(len(codes), 1, generator=generator), codes.flatten(0, 1)  # (B, 1), (B * N[, M])
    others = places[torch.randperm(len(places), generator=generator)].view_as(codes)
    taken = torch.rand(codes.shape[:2], generator=generator) < share  # (B, N)
    return torch.where(taken.view(*taken.shape, *[1] * (codes.dim() - 2)), others, codes)


# Averages over the emoji called so: the hue, in turns of the colour wheel, and the largest less the smallest of red,
# green and blue, out of 255.
COLOURS = {"red": (0.99, 158), "orange": (0.08, 199), "yellow": (0.13, 169), "green": (0.27, 102),
           "blue": (0.57, 155), "purple": (0.76, 105)}


def turn_colour(image, old, new):
    """An image (1, 3, H, W) uint8, its hue turned from `old` to `new`, two of COLOURS, and as strong as `new` is."""
    turn = COLOURS[new][0] - COLOURS[old][0]
    image = pixels.adjust_hue(image, (turn + 0.5) % 1 - 0.5)
    spread = (image.amax(1) - image.amin(1)).float()  # (1, H, W)
    strength = spread[spread > 40].mean().item()  # nan where all is grey, of which the max below makes 1
    return pixels.adjust_saturation(image, max(1.0, COLOURS[new][1] / strength))


@torch.no_grad()
def recolour(model, images, places, device="cpu"):
    """Images of an ImageSet in colours other than their own: a list of codes (1, N) and their records.

    A green apple becomes a "red apple". Taken are the images at `places` whose caption begins with one of COLOURS, in
    each other colour unless an image there already has that caption. In a small set a colour is seen on a few things
    only, and its word comes to mean those things.
    """
    records = [images.records[place] for place in places]
    known, codes, found = {caption_of(record) for record in records}, [], []
    for place, record in zip(places, records):
        colour, _, thing = record.get("caption", "").partition(" ")
        if colour not in COLOURS or not thing:
            continue
        [image] = images.batches([place], 1)  # (1, 3, H, W)
        for other in COLOURS:
            new = {**record, "caption": f"{other} {thing}"}
            if caption_of(new) not in known:
                known.add(caption_of(new))
                found.append(new)
                turned = turn_colour(image, colour, other)
                codes.append(model.encode(turned.to(device).float() / 255)[1].cpu())
    return codes, found

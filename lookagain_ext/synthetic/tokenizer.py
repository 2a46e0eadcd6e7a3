"""A tokenizer made from a word list: one token per word of the task, bytes for everything else.

Built as a unigram model over the byte alphabet. A known word is far likelier than its bytes, so
the words of the task are single tokens, and any other text, in any script, is spelled in bytes
and decodes to exactly what went in.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from ..template import TAGS
from .answers import corpus
from .vocabulary import CELLS

SPECIALS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECE = re.compile(r" ?[A-Za-z0-9]+|[^\w\s]")


def words() -> list[str]:
    """Every word of the task with and without the space before it, and the punctuation, sorted."""
    found = {piece for text in corpus() for piece in _PIECE.findall(re.sub("<[^>]*>", "\n", text))}
    found |= {f"{space}{cell}" for cell in CELLS for space in ("", " ")}
    found |= {f"{space}{number}" for number in range(26) for space in ("", " ")}
    found |= {"user", "assistant", "system"}
    return sorted(piece for piece in found if len(piece) > 1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny model; the same every time.

    The ten tags are single, ordinary (not "special") tokens, so that decoding with
    ``skip_special_tokens=True`` keeps them.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = [in_bytes.pre_tokenize_str(word)[0][0] for word in words()]
    vocabulary = [(piece, -10.0) for piece in alphabet] + [(piece, -1.0) for piece in known]
    core = Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = in_bytes
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    core.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )

"""Trains the small byte-level BPE tokenizer of a tutorial model.

Byte-level, so that any text survives the round trip, and with the bos token put in front by the
tokenizer itself, as Helium's and most models' tokenizers do: a port that is fed through vLLM gets
the same ids as Transformers.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from portkit.errors import PortkitError

# A user turn is a title and the answer is its piece: the layout of the corpus.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(
    texts: tuple[str, ...],
    *,
    vocab_size: int,
    special_tokens: list[str],
    bos: str,
    eos: str,
    pad: str,
    max_length: int,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of exactly `vocab_size` tokens; ids of special tokens follow their order.

    Raises PortkitError if the texts are too few for that many tokens.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != vocab_size:
        raise PortkitError(
            f"the corpus gives {core.get_vocab_size()} tokens and not {vocab_size}",
            "[tokenizer] in model.toml",
            "add text to the corpus, or ask for a smaller vocab_size",
        )
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

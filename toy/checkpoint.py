"""A tiny Qwen3-VL as an ordinary checkpoint folder; the stages never know.

The real classes with a small config and random weights, a tokenizer with Qwen's special tokens and
chat format trained on the world's text, and the Pillow image processor.
"""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# one piece each, so that the responses of the world are short: a tag with its line breaks, a word
# with the line break or space before it, a line break, punctuation, any other white space
PIECES = r"\n?</?\w+>\n?|\n\w+| ?\w+|\n| ?[^\s\w]+|\s"
STD = 0.06  # of the weights; with the usual 0.02 so narrow a model hardly looks at the picture


def make_tokenizer(texts):
    """Byte-level BPE over `texts`."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=576, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
    )


def make_config(tokenizer, hidden, layers, vision_layers):
    ids = tokenizer.convert_tokens_to_ids(SPECIAL)
    text = {"vocab_size": len(tokenizer), "initializer_range": STD, "max_position_embeddings": 4096}
    text |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text["rope_parameters"] = {**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision = {"hidden_size": 64, "intermediate_size": 128, "depth": vision_layers, "num_heads": 2}
    vision |= {"out_hidden_size": hidden, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0], "initializer_range": STD}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    tokens = dict(zip(names, ids[3:]))
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


def make_checkpoint(path, texts, seed=0, hidden=128, layers=4, vision_layers=2):
    """Write the folder."""
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(make_config(tokenizer, hidden, layers, vision_layers))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)

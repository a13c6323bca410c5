"""Tiny tokenizers, trained on the spot, that treat spaces, bytes and special tokens as the model families do."""

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "Who is the king of Spain? Felipe. Who was the king of France? Louis.",
    "The river runs through the city, and the city is in the country.",
    "What sport does Dave play? They play baseball in the city.",
] * 4
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT_TEMPLATES = {
    "chatml": CHATML,
    "trimming": CHATML.replace("m['content']", "m['content'] | trim"),
    # Qwen 3 opens the last answer with an empty block of thoughts, which is not in the generation prompt
    "thinking": CHATML.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    ),
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}",
    "unmarked": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    # broken: a generation prompt that no answer begins with, as DeepSeek R1 has it, and an answer left out
    "opens_thoughts": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"),
    "drops_answer": CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}"),
}

# the template of special tokens, BOS and EOS of each family
SPECIAL_TOKENS = {
    "gpt2": ("$A", "<|endoftext|>", "<|endoftext|>"),
    "neox": ("$A", "<|endoftext|>", "<|endoftext|>"),
    "opt": ("</s> $A", "</s>", "</s>"),
    "llama3": ("<|begin_of_text|> $A", "<|begin_of_text|>", "<|eot_id|>"),
    "qwen": ("$A", "<|im_start|>", "<|im_end|>"),
    "llama2": ("<s> $A", "<s>", "</s>"),
    "mistral": ("<s> $A", "<s>", "</s>"),
    "gemma": ("<bos> $A", "<bos>", "<eos>"),
    "adds_eos": ("<s> $A </s>", "<s>", "</s>"),
}
FAMILIES = tuple(SPECIAL_TOKENS)
BYTE_LEVEL = ("gpt2", "neox", "opt", "llama3", "qwen")
TRIMMED_OFFSETS = ("neox", "llama3")


def make_tokenizer(family: str, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a family's tokenizer anew, with one of CHAT_TEMPLATES; its pad token is its EOS."""
    _, bos, eos = SPECIAL_TOKENS[family]
    backend = Tokenizer.from_str(_trained(family))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = chat_template and CHAT_TEMPLATES[chat_template]
    return tokenizer


@cache
def _trained(family: str) -> str:
    template, bos, eos = SPECIAL_TOKENS[family]
    tokenizer = _byte_level(family, [bos, eos]) if family in BYTE_LEVEL else _sentence_piece(family, [bos, eos])
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos))]
    add_special_tokens = processors.TemplateProcessing(single=template, special_tokens=ids)
    trim = processors.ByteLevel(trim_offsets=family in TRIMMED_OFFSETS)
    is_byte_level = family in BYTE_LEVEL
    tokenizer.post_processor = processors.Sequence([trim, add_special_tokens]) if is_byte_level else add_special_tokens
    return tokenizer.to_str()


def _byte_level(family: str, special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = LLAMA3_WORDS if family in ("llama3", "qwen") else GPT2_WORDS
    split = pre_tokenizers.Split(Regex(words), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, _trainer(special_tokens, initial_alphabet=alphabet))
    return tokenizer


def _sentence_piece(family: str, special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special_tokens = ["<unk>", *special_tokens]
    tokenizer.train_from_iterator(SENTENCES, _trainer(special_tokens + [f"<0x{byte:02X}>" for byte in range(256)]))
    content = json.loads(tokenizer.to_str())
    # the trainer can reserve the byte tokens as special ones only, and they are not
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if family != "mistral":
        prepend = [] if family == "gemma" else [normalizers.Prepend("▁")]
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    strip = [] if family == "gemma" else [decoders.Strip(" ", 1, 0)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _trainer(special_tokens: list[str], **options: Any) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=500, special_tokens=special_tokens, show_progress=False, **options)

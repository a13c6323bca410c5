"""Tokenizers and chat templates that do what most do not: encoded right, or refused with their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import EDITS, base_model, make_trainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers_for_tests import CHATML, FAMILIES, make_tokenizer
from transformers import PreTrainedTokenizerFast

from peft_locft.data.edits import Edit
from peft_locft.data.encoding import encode_edits, encode_prompts
from peft_locft.data.generated_text import generate_prefixes
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.questions import UNTIL_EOS, Answer, Question, StopCounter, end_token_ids
from peft_locft.evaluation.items import ItemEncoder, eval_items

EDIT = Edit(prompt="The king is", target="Louis", source="edits.json:7")


def halves(tokenizer: Any, prompt: str = "The king is", target: str = "Louis", **options: Any) -> tuple[Any, Any]:
    """Return the tokens that are not scored, and those that are."""
    edit = encode_edits([Edit(prompt=prompt, target=target, source="edits.json:7")], tokenizer, **options)[0]
    tokens = tokenizer.convert_ids_to_tokens(edit.input_ids.tolist())
    return tokens[: edit.target_start], tokens[edit.target_start :]


def word_level() -> PreTrainedTokenizerFast:
    """A tokenizer that does not know most text."""
    words = ["<unk>", "</s>", "The", "king", "is", "Louis", "the", "first"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's, without capitals: the text that it gives back is not the text that it was given."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "king", "is", "jean", "-", "luc", ",", "lou", "##is", "."]
    backend = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    around = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


def joining() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins a colon with the line break after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["</s>", *alphabet, ":Ċ"])}
    backend = Tokenizer(models.BPE(vocabulary, [(":", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def with_template(template: str, family: str = "qwen") -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(family)
    tokenizer.chat_template = template
    return tokenizer


# ---------------------------------------------------------------------- where the target begins


def test_a_space_that_the_tokenizer_puts_first() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    prompt, target = halves(tokenizer)
    assert prompt == ["ĠThe", "Ġking", "Ġis"] == tokenizer.tokenize("The king is")
    assert target == [*tokenizer.tokenize(" Louis"), "<|endoftext|>"]


def test_a_merge_over_the_boundary_is_scored_and_warned_of() -> None:
    tokenizer = joining()
    with pytest.warns(UserWarning, match=r"edits.json:7: found a token shared by 'Who:' and '\\nme'"):
        prompt, target = halves(tokenizer, "Who:", "\nme")
    assert (prompt, target) == (["W", "h", "o"], [":Ċ", "m", "e", "</s>"])
    assert prompt + target[:-1] == tokenizer.tokenize("Who:\nme")


def test_an_added_token_that_takes_in_the_space_behind_it_belongs_to_the_prompt() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_tokens([AddedToken("<king>", lstrip=True, rstrip=True)])
    prompt, target = halves(tokenizer, "The <king> is <king>")
    assert prompt == ["The", "<king>", "is", "<king>"]
    assert target == ["Lou", "is", "<|endoftext|>"]
    assert encode_prompts(["The <king> is <king>"], tokenizer) == [tokenizer.convert_tokens_to_ids(prompt)]


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_inside_of_the_prompt_and_as_the_target(family: str) -> None:
    tokenizer = make_tokenizer(family)
    tokenizer.add_tokens(["<king>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<queen>"]})
    text = "The <king> and <queen> is"
    prompt, _ = halves(tokenizer, text)
    assert "<queen>" in prompt
    assert prompt[-len(tokenizer.tokenize(text)) :] == tokenizer.tokenize(text)
    *target, eos = halves(tokenizer, target="<queen>")[1]
    assert (target[-1], eos) == ("<queen>", tokenizer.eos_token)


# ---------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_stands_in_front_once(family: str) -> None:
    """Also where the text begins with it: as a prompt that was rendered by hand, or by the chat template."""
    tokenizer = make_tokenizer(family)
    prompt, _ = halves(tokenizer, f"{tokenizer.bos_token}The king is")
    assert prompt.count(tokenizer.bos_token) == 1
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "").replace("<|im_end|>", "")
    rendered, _ = halves(tokenizer, chat_template=True)
    assert rendered.count(tokenizer.bos_token) == 1
    (ids,) = encode_prompts(["The king is"], tokenizer, chat_template=True)
    assert tokenizer.convert_ids_to_tokens(ids) == rendered


def test_eos_that_the_target_ends_with_is_not_doubled() -> None:
    tokenizer = make_tokenizer("gpt2")
    assert halves(tokenizer, target=f"Louis{tokenizer.eos_token}") == halves(tokenizer)


def test_training_needs_neither_bos_nor_a_padding_token(tmp_path: Path) -> None:
    whole, bare = make_tokenizer("gpt2"), make_tokenizer("gpt2")
    bare.pad_token = bare.bos_token = None
    assert bare.pad_token_id is None
    assert bare.bos_token_id is None
    losses = [
        make_trainer(tmp_path / name, tokenizer=tokenizer, num_train_epochs=1).train().training_loss
        for name, tokenizer in {"whole": whole, "bare": bare}.items()
    ]
    assert losses[0] == losses[1]
    assert len(generate_prefixes(base_model(), bare, 1, 0)) == 1, "begins at EOS"


# ---------------------------------------------------------------------- text that the tokenizer does not know


def test_a_target_of_which_the_tokenizer_knows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="json:7: the tokenizer knows nothing of the target 'Zork', only '<unk>'"):
        halves(word_level(), target="Zork")


def test_a_target_of_which_the_tokenizer_knows_a_part_is_warned_of() -> None:
    edits = [EDIT, Edit(prompt="The king is", target="Louis Zork", source="edits.json:8")]
    with pytest.warns(UserWarning, match=r"edits.json:8: .* not know a part of the target 'Louis Zork' \(in 1 of 2"):
        encode_edits(edits, word_level())
    # what the prompt holds is given to the model as it is, and an unknown token that is written out is meant
    assert halves(word_level(), "The Zork is")[0] == ["The", "<unk>", "is"]
    assert halves(word_level(), target="<unk>")[1] == ["<unk>", "</s>"]


def test_a_prompt_without_a_token_is_refused() -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(ValueError, match=r"^'aaa': found no token of the prompt"):
        encode_prompts(["The king is", "aaa"], tokenizer)


class OtherOffsets(PreTrainedTokenizerFast):
    """A tokenizer whose offsets are what `change` makes of them."""

    change: Callable[[int, int], tuple[int, int]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encodings = super().__call__(*args, **kwargs)
        rows = encodings["offset_mapping"]
        encodings["offset_mapping"] = [[self.change(*place) for place in row] for row in rows]
        return encodings


WRONG: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "none": lambda begin, end: (0, 0),
    "bytes for letters": lambda begin, end: (3 * begin, 3 * end),
    "from the end": lambda begin, end: (max(0, 30 - end), max(0, 30 - begin)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_offsets_are_refused(kind: str) -> None:
    plain = make_tokenizer("gpt2")
    tokenizer = OtherOffsets(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token)
    tokenizer.change = WRONG[kind]
    with pytest.raises(ValueError, match=r"edits.json:7: found wrong offsets of the tokens of 'The king is Louis'"):
        halves(tokenizer)


# ---------------------------------------------------------------------- chat templates

NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
SYSTEM = "<|im_start|>system\nAnswer shortly.<|im_end|>\n"
BAD_TEMPLATES = {
    "needs a system prompt": (NEEDS_SYSTEM + CHATML, "the chat template fails for a user's turn.*: no system prompt"),
    "a mistake": ("{{ messages[0].content.nothing.more }}" + CHATML, "the chat template fails .*has no attribute"),
    "broken": ("{% if %}", "the chat template fails"),
    # as models that read images have it: a list of texts and images
    "wants a list": (
        CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"),
        "the chat template gives '.*', which lacks the prompt",
    ),
    "changes the prompt": (
        CHATML.replace("m['content']", "m['content'] | upper"),
        "the chat template gives '.*', which lacks the prompt",
    ),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
def test_a_template_that_fails_or_leaves_out_the_prompt_is_refused(kind: str) -> None:
    template, message = BAD_TEMPLATES[kind]
    advice = "set tokenizer.chat_template, or pass chat_template='off'"
    for encode in (lambda: halves(with_template(template), chat_template=True),
                   lambda: encode_prompts(["The king is"], with_template(template), chat_template=True)):  # fmt: skip
        with pytest.raises(ValueError, match=f"(?s)^'The king is': {message}.*; {advice}$"):
            encode()


def test_a_template_that_brings_its_own_system_prompt_or_refuses_others() -> None:
    refuses = CHATML.replace(
        "<|im_start|>{{", "{% if m['role'] == 'system' %}{{ raise_exception('') }}{% endif %}<|im_start|>{{", 1
    )
    for template, system in ((SYSTEM + CHATML, SYSTEM), (refuses, "")):
        tokenizer = with_template(template)
        prompt, target = halves(tokenizer, chat_template=True)
        expected = f"{system}<|im_start|>user\nThe king is<|im_end|>\n<|im_start|>assistant\n"
        assert prompt == tokenizer.tokenize(expected)
        assert target == ["Lou", "is", "<|im_end|>"]


def test_a_template_that_trims_both_turns() -> None:
    tokenizer = make_tokenizer("qwen", chat_template="trimming")
    trimmed = halves(tokenizer, chat_template=True)
    assert halves(tokenizer, "  The king is \n", " Louis  ", chat_template=True) == trimmed


# ---------------------------------------------------------------------- where an answer ends


def generating(*ids: int) -> SimpleNamespace:
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=list(ids)))


def test_all_special_tokens_that_end_generation_end_an_answer() -> None:
    tokenizer = make_tokenizer("qwen")
    eos, start, letter = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>", "a"))
    assert end_token_ids(tokenizer) == {eos}
    assert end_token_ids(tokenizer, generating(eos, start)) == {eos, start}
    assert end_token_ids(tokenizer, generating(letter)) == {eos}, "a default of another vocabulary"
    assert end_token_ids(tokenizer, SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=start))) >= {start}
    assert end_token_ids(SimpleNamespace(eos_token_id=[3, 4])) == {3, 4}
    tokenizer.eos_token = None
    assert end_token_ids(tokenizer) == frozenset()

    ends, question = StopCounter(tokenizer, model=generating(start)), Question((1,), num_stops=UNTIL_EOS)
    assert not ends.is_finished(question, [letter, eos])
    assert ends.is_finished(question, [letter, start])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_ends_at_any_of_them(family: str) -> None:
    model, tokenizer = base_model(family), make_tokenizer("qwen")
    question = Question((10, 11), num_stops=UNTIL_EOS, max_new_tokens=20)
    (answer,) = generate_and_score(model, tokenizer, [question])
    assert len(answer.token_ids) == 20
    last = answer.token_ids[4]
    first = answer.token_ids.index(last)
    model.generation_config.eos_token_id = [2, last]
    assert generate_and_score(model, tokenizer, [question])[0].token_ids == answer.token_ids
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(last)]})
    assert generate_and_score(model, tokenizer, [question])[0].token_ids == answer.token_ids[: first + 1]


# ---------------------------------------------------------------------- text that is not given back


@pytest.mark.parametrize("target", ["Jean-Luc", "Jean, Luc", "LOUIS"])
def test_an_answer_in_the_targets_tokens_is_the_target(target: str) -> None:
    tokenizer = word_piece()
    items = eval_items([Edit(prompt="The king is", target=target)])
    encoder = ItemEncoder(items, tokenizer, score=False, compare=False)
    own = tokenizer(target, add_special_tokens=False).input_ids
    (end,) = tokenizer(".", add_special_tokens=False).input_ids
    (king,) = tokenizer("king", add_special_tokens=False).input_ids
    assert encoder.replies([Answer([*own, end, king])])[0].text == target
    assert encoder.replies([Answer([king, *own])])[0].text != target
    assert encoder.replies([Answer([king])])[0].text == "king"


def test_other_tokenizers_train_without_warning(tmp_path: Path) -> None:
    """A tokenizer that gives back other text, and one that puts special tokens around it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = encode_edits([EDIT], word_piece())
    assert word_piece().convert_ids_to_tokens(encoded[0].input_ids.tolist()) == [
        "[CLS]", "the", "king", "is", "lou", "##is", "[SEP]",
    ]  # fmt: skip
    trainer = make_trainer(tmp_path, edits=EDITS[:2], tokenizer=make_tokenizer("adds_eos"), num_train_epochs=1)
    assert torch.tensor(trainer.train().training_loss).isfinite()

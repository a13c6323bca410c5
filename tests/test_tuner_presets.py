"""Where `LocFTConfig()` puts the delta: the published locations, their siblings, and any other decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from location_families import FAMILIES as OTHERS
from location_families import SIZES, build_family, make, qwen2_5_vl
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, LLAMA_LIKE, base_state, build, changed, every_family, locations, randomize
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MllamaForCausalLM, Qwen2MoeConfig

from peft_locft import LocFTConfig, balanced_config, merge_checkpoint
from peft_locft.tuner import default_location, find_decoder_layers
from peft_locft.tuner.presets import PublishedLocation, entire_layers


def on_meta(family: str, num_layers: int) -> Any:
    """Return a model of real depth that has no weights."""
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    more = {"layer_types": ["full_attention"] * num_layers} if family == "gemma3" else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family](**{key: num_layers}, **more))


def qwen2_moe(num_layers: int) -> Any:
    config = Qwen2MoeConfig(
        **(LLAMA_LIKE | {"num_hidden_layers": num_layers}),
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


MISTRAL_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@pytest.mark.parametrize(
    ("family", "num_layers", "name"),
    [
        ("llama", 32, "model.layers.22.mlp.down_proj"),  # Meta-Llama-3-8B-Instruct, published
        ("llama", 80, "model.layers.57.mlp.down_proj"),  # 70B: the 57.5th of 80
        ("llama", 16, "model.layers.11.mlp.down_proj"),
        ("qwen2", 28, "model.layers.6.mlp.down_proj"),  # Qwen2.5-7B-Instruct, published
        ("qwen2", 80, "model.layers.19.mlp.down_proj"),
        ("qwen2", 1, "model.layers.0.mlp.down_proj"),
        # any other: two thirds of the depth
        ("gemma3", 26, "model.layers.18.mlp.down_proj"),
        ("gpt2", 12, "transformer.h.8.mlp.c_proj"),
        ("gpt_neox", 32, "gpt_neox.layers.22.mlp.dense_4h_to_h"),
        ("opt", 24, "model.decoder.layers.16.fc2"),
        ("qwen3", 36, "model.layers.25.mlp.down_proj"),
    ],
)
def test_the_default_location(family: str, num_layers: int, name: str) -> None:
    location = default_location(on_meta(family, num_layers))
    assert (location.target_modules, location.target_parameters) == ((name,), ())
    assert location.learning_rate is None


def test_mistral_is_edited_in_an_entire_layer() -> None:
    location = default_location(on_meta("mistral", 32))
    assert location.target_modules == tuple(f"model.layers.23.{name}" for name in MISTRAL_LAYER)
    assert location.learning_rate is None
    model = on_meta("mistral", 32)
    model.config.name_or_path = "mistralai/Mistral-7B-v0.1"
    assert default_location(model).learning_rate == 5e-5  # published for this very model


def test_qwen_moe_is_edited_in_the_shared_expert() -> None:
    location = default_location(qwen2_moe(24))
    assert location.target_modules == ("model.layers.20.mlp.shared_expert.down_proj",)


def test_fused_experts_are_a_parameter() -> None:
    location = default_location(on_meta("mixtral", 32))
    assert (location.target_modules, location.target_parameters) == (
        (),
        ("model.layers.22.mlp.experts.down_proj",),
    )


@pytest.mark.parametrize("num_layers", range(1, 130))
def test_a_sibling_of_any_depth_has_its_layer(num_layers: int) -> None:
    published = PublishedLocation(layer=22, num_layers=32, module="")
    layer = published.layer_of(num_layers)
    assert 0 <= layer < num_layers
    # the same relative depth, to half a layer
    assert abs((layer + 1) / num_layers - 23 / 32) <= 0.5 / num_layers or layer == 0


@every_family
def test_the_layer_can_be_chosen(family: str) -> None:
    model = get_peft_model(build(family), LocFTConfig(layers_to_transform=0))
    stack, _ = find_decoder_layers(build(family))
    assert {name.startswith(f"{stack}.0.") for name in locations(model)} == {True}


def test_several_layers_can_be_chosen() -> None:
    model = get_peft_model(build("mixtral"), LocFTConfig(layers_to_transform=[0, 2]))
    assert set(locations(model)) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 2)}


@every_family
def test_the_decoder_layers_are_found_by_structure(family: str) -> None:
    model = build(family)
    name, stack = find_decoder_layers(model)
    assert len(stack) == 3
    assert model.get_submodule(name) is stack
    # also in the model without its head, and in a wrapped one
    without_head = AutoModel.from_config(FAMILIES[family]())
    assert name.endswith(find_decoder_layers(without_head)[0])
    wrapped = get_peft_model(model, LocFTConfig())
    assert find_decoder_layers(wrapped.base_model.model)[0] == name


@every_family
def test_an_entire_layer_is_all_of_its_parameters(family: str) -> None:
    """Once with its biases, in a model that has them; nothing outside of it."""
    config = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1], train_bias=True)
    base = build(family)
    stack, _ = find_decoder_layers(base)
    expected = {name for name, _ in base.named_parameters() if name.startswith(f"{stack}.1.")}
    model = get_peft_model(base, config)
    assert set(locations(model)) == expected


def test_an_entire_layer_is_found_again_beneath_an_adapter() -> None:
    base = build("mixtral")
    first = entire_layers(base, [1])
    model = get_peft_model(base, LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    assert entire_layers(model.base_model.model, [1]) == first
    model.add_adapter("more", LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    assert locations(model, "more").keys() == locations(model).keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("target_modules", [None, "entire-layer", "all-linear"])
def test_a_layer_that_is_not_there_is_refused(family: str, target_modules: str | None) -> None:
    config = LocFTConfig(target_modules=target_modules, layers_to_transform=[1, 3])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[3\]: the model has 3 decoder layers .* up to 2"):
        get_peft_model(build(family), config)


def test_a_model_without_decoder_layers_needs_a_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Sequential has no list of decoder layers.*target_modules=\["):
        get_peft_model(model, LocFTConfig())


def test_layers_without_a_down_projection_need_a_name() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(4))])

    with pytest.raises(ValueError, match=r"No down-projection was found in layers\.0\. Name the location"):
        default_location(Toy())


# ---------------------------------------------------------------------- the down-projection, by structure

every_other_family = pytest.mark.parametrize("family", sorted(OTHERS))
IDS = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))


def names_in(model: nn.Module, layer: int) -> tuple[str, str]:
    """Return the list of decoder layers, and the name of the default location in one of them."""
    stack, _ = find_decoder_layers(model)
    location = default_location(model, [layer])
    (name,) = (*location.target_modules, *location.target_parameters)
    return stack, name.removeprefix(f"{stack}.{layer}.")


@every_other_family
def test_the_down_projection_is_found_by_structure(family: str) -> None:
    model = build_family(family)
    expected = OTHERS[family]
    assert [names_in(model, layer) for layer in range(3)] == [(expected.stack, down) for down in expected.downs]


@every_other_family
def test_a_fresh_adapter_changes_nothing_and_learns_from_text(family: str) -> None:
    base = build_family(family)
    stack, name = names_in(base, 1)
    expected = base(input_ids=IDS, use_cache=False).logits
    model = get_peft_model(base, LocFTConfig(layers_to_transform=[1]))
    (found,) = locations(model)
    assert found.removesuffix(".weight") == f"{stack}.1.{name}"
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    ((delta, _),) = locations(model).values()
    assert delta.grad is not None
    assert delta.grad.abs().sum() > 0


EQUAL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"intermediate_size": 32}),
    ("gpt2", {"n_inner": 32}),
    ("gpt_neox", {"intermediate_size": 32}),
    ("opt", {"ffn_dim": 32}),
    ("mixtral", {"intermediate_size": 32}),
    ("mixtral", {"intermediate_size": 16}),
    ("mixtral", {"intermediate_size": 32, "num_local_experts": 32}),
]


@pytest.mark.parametrize(("family", "sizes"), EQUAL)
def test_an_inner_size_may_be_the_hidden_size(family: str, sizes: dict[str, Any]) -> None:
    assert names_in(build(family, **sizes), 1)[1] == names_in(build(family), 1)[1]


@pytest.mark.parametrize("inner", [16, 32, 64])
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "gemma3n_text", "dbrx", "bert"]
)
def test_an_inner_size_may_be_ambiguous(family: str, inner: int) -> None:
    config = OTHERS[family].config()
    for sizes in (config, getattr(config, "ffn_config", config)):
        for key in ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size"):
            if type(getattr(sizes, key, None)) is int:
                setattr(sizes, key, inner)
    assert names_in(build_family(family, config), 1)[1] == OTHERS[family].downs[1]


def test_a_list_of_experts_is_all_of_their_down_projections() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    class Mixture(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 12)
            self.experts = nn.ModuleList([Expert() for _ in range(12)])
            if shared:
                self.shared_expert = Expert()

    class Layer(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.mlp = Mixture(shared)

    model = nn.Sequential(nn.ModuleList([Layer(False), Layer(True)]))
    expected = tuple(f"0.0.mlp.experts.{expert}.down_proj" for expert in range(12))
    assert default_location(model, [0]).target_modules == expected
    assert default_location(model, [1]).target_modules == ("0.1.mlp.shared_expert.down_proj",)


# ---------------------------------------------------------------------- layers without an MLP


def nemotron_h(types: list[str]) -> Any:
    fields = {key: value for key, value in SIZES.items() if key != "num_hidden_layers"}
    config = make(
        "NemotronH", fields, layers_block_type=types, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8,
        n_groups=1, chunk_size=8, head_dim=8, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24,
        n_routed_experts=4,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config())


def test_a_hybrid_without_an_mlp_in_the_layer_takes_the_nearest() -> None:
    # two thirds of six layers is layer 3
    model = nemotron_h(["mamba", "mlp", "mamba", "attention", "mamba", "mlp"])
    assert default_location(model).target_modules == ("model.layers.5.mixer.down_proj",)
    # a layer that is given is not exchanged for another
    for layer, name in ((3, "o_proj"), (2, "out_proj"), (1, "down_proj")):
        assert default_location(model, [layer]).target_modules == (f"model.layers.{layer}.mixer.{name}",)
    found = balanced_config(model).target_modules
    assert sorted(found or ()) == ["model.layers.1.mixer.down_proj", "model.layers.5.mixer.down_proj"]


def test_an_mlp_that_layers_share_is_nobodys_own() -> None:
    layers = nn.ModuleList([build("llama").model.layers[0] for _ in range(3)])
    for layer in layers[1:]:
        layer.mlp = layers[0].mlp
    assert default_location(nn.Sequential(layers)).target_modules == ("0.1.self_attn.o_proj",)


def test_a_layer_that_text_skips_is_not_the_default() -> None:
    config = make(
        "MllamaText", SIZES, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    model = MllamaForCausalLM(config())
    assert default_location(model).target_modules == ("model.layers.2.mlp.down_proj",)
    assert default_location(model, [1]).target_modules == ("model.layers.1.mlp.down_proj",)


# ---------------------------------------------------------------------- the text model's layers


def test_other_lists_of_the_same_length_are_not_the_decoder_layers() -> None:
    def blocks(inner: int) -> nn.ModuleList:
        return nn.ModuleList([nn.Sequential(nn.Linear(4, inner), nn.ReLU(), nn.Linear(inner, 4)) for _ in range(3)])

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn, self.mlp = nn.Linear(4, 4), blocks(64)[0]

    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(4, 5000) for _ in range(3)])
    model.prediction = nn.Module()
    model.prediction.layers = blocks(64)
    model.to_pictures = nn.ModuleList([Cross() for _ in range(3)])
    model.layers = blocks(6)
    assert find_decoder_layers(model)[0] == "layers"
    assert default_location(model).target_modules == ("layers.1.2",)


def vision_language(**fields: Any) -> Any:
    return build_family("qwen2_5_vl", qwen2_5_vl(**fields))


@pytest.mark.parametrize("fields", [{}, {"inner": 512}, {"depth": 6}, {"depth": 2}])
def test_layers_are_those_of_the_text_model(fields: dict[str, int]) -> None:
    for config in (
        LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1]),
        LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], layers_pattern="layers"),
        LocFTConfig(target_parameters=["down_proj.weight"], layers_to_transform=[1]),
        LocFTConfig(layers_to_transform=[1]),
    ):
        model = get_peft_model(vision_language(**fields), config)
        assert set(locations(model)) == {"model.language_model.layers.1.mlp.down_proj.weight"}
    for word in ("entire-layer", "all-linear"):
        model = get_peft_model(vision_language(**fields), LocFTConfig(target_modules=word, layers_to_transform=[1]))
        assert {name.startswith("model.language_model.layers.1.") for name in locations(model)} == {True}


def test_names_alone_match_everywhere_as_in_peft() -> None:
    model = get_peft_model(vision_language(), LocFTConfig(target_modules=["down_proj"]))
    assert {name.split(".")[1] for name in locations(model)} == {"visual", "language_model"}
    # a pattern that names another list is the caller's own choice
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], layers_pattern="blocks")
    assert set(locations(get_peft_model(vision_language(), config))) == {"model.visual.blocks.1.mlp.down_proj.weight"}


def test_names_that_only_the_tower_has_are_refused() -> None:
    config = LocFTConfig(target_modules=["attn.proj"], layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"found only model\.visual\.blocks\.1\.attn\.proj, but .* the text model: "):
        get_peft_model(vision_language(), config)


def test_a_model_of_text_alone_keeps_the_configuration() -> None:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], exclude_modules=["up_proj"])
    model = get_peft_model(build("llama"), config)
    assert set(locations(model)) == {"model.layers.1.mlp.down_proj.weight"}
    assert (model.peft_config["default"].target_modules, config.layers_to_transform) == ({"down_proj"}, [1])


# ---------------------------------------------------------------------- a module that its owner reads


def test_experts_that_their_owner_slices(tmp_path: Any) -> None:
    """DBRX: merged, unmerged, reloaded and merged on disk give the same bits."""
    base = build_family("dbrx")
    base.save_pretrained(tmp_path / "base")
    plain, before = base(input_ids=IDS).logits, base_state(base)
    model = get_peft_model(base, LocFTConfig(layers_to_transform=[1], task_type="CAUSAL_LM"))
    randomize(model)
    edited = model(input_ids=IDS).logits
    assert not torch.equal(edited, plain)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(build_family("dbrx"), tmp_path / "adapter")
    assert torch.equal(reloaded(input_ids=IDS).logits, edited)
    with model.get_submodule("base_model").composed_once():
        assert torch.equal(model(input_ids=IDS).logits, edited)
    model.merge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, edited)
    with model.disable_adapter():  # unmerges, before the owner reads the first expert
        assert torch.equal(model(input_ids=IDS).logits, plain)
    assert changed(base_state(model), before) == set()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    on_disk = load_file(tmp_path / "merged" / "model.safetensors")
    name = "transformer.blocks.1.ffn.experts.mlp.w2"
    assert torch.equal(on_disk[name], base_state(model.merge_and_unload())[name])


@pytest.mark.parametrize("family", ["dbrx", "deepseek_v3", "jetmoe", "qwen3_next", "bamba"])
def test_every_part_of_an_entire_layer_may_be_read_by_its_owner(family: str) -> None:
    """A router with a buffer for its owner, attention experts with two methods, convolutions."""
    base = build_family(family)
    plain = base(input_ids=IDS).logits
    model = get_peft_model(base, LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    assert torch.equal(model(input_ids=IDS).logits, plain)
    randomize(model, std=0.02)
    edited = model(input_ids=IDS).logits
    edited.square().mean().backward()
    assert [name for name, (delta, _) in locations(model).items() if delta.grad is None] == []
    assert not torch.equal(edited, plain)
    model.merge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, edited)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 3))
        self.factor = 2.0

    def double_it(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table * self.factor


def test_another_method_than_forward_is_edited_too() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part.double_it(x) / self.part.factor

    model = get_peft_model(Calls(), LocFTConfig(target_parameters=["part.table"]))
    x = torch.randn(2, 3)
    assert torch.equal(model(x), x @ torch.ones(3, 3))
    randomize(model)
    edited = model(x)
    edited.sum().backward()
    ((delta, _),) = locations(model).values()
    assert torch.equal(edited, x @ (1 + delta))
    assert delta.grad is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model.get_submodule("base_model.model.part").nothing  # noqa: B018

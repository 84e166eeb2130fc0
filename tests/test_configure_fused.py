"""configure: how weights are stored and fused, in transformers and under parametrizations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from orthonorm import optim
from orthonorm.optim.configure import by_name
from routes import matrices_of
from torch import nn


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss"])
def test_stacks_of_experts_in_transformers(kind: str) -> None:
    """Gate and up are matrices of their own, but where their columns take turns (GptOss)."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_group=1, topk_group=1, first_k_dense_replace=1, num_experts=4, num_local_experts=4,
        n_routed_experts=4, num_experts_per_tok=2, layer_types=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = matrices_of(model)
    assert not any("bias" in n for n in found)
    stacks = {n: s for n, s in found.items() if n.endswith("gate_up_proj")}
    assert stacks and set(stacks.values()) == {None if kind == "GptOss" else (24, 24)}
    assert not any("embed" in n or "lm_head" in n for n in found)


def test_weights_of_inputs_by_outputs_in_transformers() -> None:
    """GPT-2's Conv1D and stacks of experts, with gate and up beside each other (Aria)."""
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    )
    aria = transformers.AutoModel.from_config(transformers.AriaTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, moe_num_experts=3, moe_topk=2,
    ))  # fmt: skip
    stored: dict[str, Any] = {}
    for model in (gpt2, aria):
        heads = {"*.c_attn.weight": 2} if model is gpt2 else None
        for opt in (optim.configure(model, "muon", lr=0.1, weight_decay=0.0, report=None),
                    optim.Muon(optim.split_params(model, heads=heads))):  # fmt: skip
            for g in opt.param_groups:
                for name in g["param_names"] if g.get("transpose") else ():
                    stored.setdefault(name, []).append((g["split"], g["heads"]))
    assert stored == {
        "transformer.h.0.attn.c_attn.weight": [((16, 16, 16), None), (None, 2)],
        "transformer.h.0.attn.c_proj.weight": [(None, None)] * 2,
        "transformer.h.0.mlp.c_fc.weight": [(None, None)] * 2,
        "transformer.h.0.mlp.c_proj.weight": [(None, None)] * 2,
        "layers.0.mlp.experts.gate_up_proj": [((12, 12), None), (None, None)],
        "layers.0.mlp.experts.down_proj": [(None, None)] * 2,
    }


def test_stacks_that_do_not_say_how_they_are_stored() -> None:
    """Those of Llama 4 are inputs x outputs, which their shapes tell; GptOss' gates take turns."""

    def experts(name: str, up: tuple[int, int, int], down: tuple[int, int, int]) -> nn.Module:
        made: nn.Module = type(name, (nn.Module,), {})()
        made.gate_up_proj, made.down_proj = (nn.Parameter(torch.randn(x)) for x in (up, down))
        return made

    for name, up, down, keys in (
        ("Llama4TextExperts", (3, 8, 12), (3, 6, 8), (True, (6, 6))),
        ("Llama4TextExperts", (3, 4, 4), (3, 2, 4), (True, (2, 2))),
        ("GptOssExperts", (3, 8, 12), (3, 6, 8), (True, None)),
        ("Experts", (3, 12, 8), (3, 8, 6), (False, (6, 6))),
        ("Experts", (3, 4, 4), (3, 4, 2), (False, (2, 2))),
        ("Experts", (3, 7, 5), (3, 8, 6), (False, None)),
    ):
        opt = optim.configure(experts(name, up, down), "muon", report=None)
        found = {n: (g["transpose"], g["split"]) for g in opt.param_groups
                 for n in g["param_names"]}  # fmt: skip
        assert found == {"gate_up_proj": keys, "down_proj": (keys[0], None)}


def test_rows_in_another_order_are_not_split() -> None:
    transformers = pytest.importorskip("transformers")
    small = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=4, n_positions=8)
    config = transformers.CodeGenConfig(**small, n_ctx=8, rotary_dim=4)
    found = matrices_of(transformers.CodeGenModel(config))
    assert found["h.0.attn.qkv_proj.weight"] is None
    config = transformers.GPTBigCodeConfig(**small, multi_query=False)
    found = matrices_of(transformers.GPTBigCodeModel(config))
    assert found["h.0.attn.c_attn.weight"] is None


def test_low_rank_factors_of_fused_weights() -> None:
    """The rows of B A are those of B; those of A are its rank."""
    lora = {"lora_A": nn.Linear(8, 4, bias=False), "lora_B": nn.Linear(4, 12, bias=False)}
    model = nn.ModuleDict({"gate_up_proj": nn.ModuleDict(lora), "head": nn.Linear(6, 9)})
    assert matrices_of(model) == {
        "gate_up_proj.lora_A.weight": None, "gate_up_proj.lora_B.weight": (6, 6),
    }  # fmt: skip


def test_queries_of_conv1d_step_alone() -> None:
    """A step of GPT-2's c_attn is that of q, k and v, each outputs x inputs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double()
    fused = model.transformer.h[0].attn.c_attn.weight
    alone = [nn.Parameter(w.mT.clone()) for w in fused.detach().split(16, 1)]
    opt = optim.configure(model, "muon", lr=0.1, report=None)
    tokens = torch.arange(8)[None]
    model(tokens, labels=tokens).loss.backward()
    for p, g in zip(alone, fused.grad.split(16, 1), strict=True):
        p.grad = g.mT.clone()
    opt.step()
    optim.Muon(alone, lr=0.1).step()
    for w, p in zip(fused.detach().split(16, 1), alone, strict=True):
        torch.testing.assert_close(w.mT, p.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["muon", "normuon", "SOAP", "Conda"])
def test_a_split_stack_steps_as_its_matrices(name: str) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 12, 5, dtype=torch.float64))
    alone = [nn.Parameter(w.clone()) for e in stack.detach() for w in e.split((8, 4))]
    whole = by_name(name)([{"params": [stack], "split": (8, 4)}])
    each = type(whole)(alone)
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for p, g in zip(alone, (g for e in stack.grad for g in e.split((8, 4))), strict=True):
            p.grad = g.clone()
        whole.step()
        each.step()
    got = [w for e in stack.detach() for w in e.split((8, 4))]
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-12)


def test_parametrized_weights_are_their_layers() -> None:
    """As in HiFi-GAN and EnCodec: convolutions of direction and length are no stacks."""
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.ModuleDict({
        "conv": weight_norm(nn.Conv1d(4, 6, 3)), "up": weight_norm(nn.ConvTranspose1d(6, 4, 3)),
        "rnn": weight_norm(nn.LSTM(4, 5), "weight_hh_l0"),
        "attention": weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
        "linear": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
        "out": weight_norm(nn.Conv1d(4, 1, 3)),
    })  # fmt: skip
    opt = optim.configure(model, "muon", report=None)
    found = {n.removesuffix(".original1"): (g["flatten"], g["split"]) for g in opt.param_groups
             if g["rule"] == "matrix" for n in g["param_names"]}  # fmt: skip
    assert found == {
        "conv.parametrizations.weight": (True, None), "rnn.weight_ih_l0": (None, (5,) * 4),
        "rnn.parametrizations.weight_hh_l0": (None, (5,) * 4),
        "attention.parametrizations.in_proj_weight": (None, (4,) * 3),
        "attention.out_proj.weight": (None, None),
        "linear.parametrizations.weight.original": (None, None),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["Blip2QFormer", "Sam", "XLNet", "Mamba"])
def test_models_of_transformers_with_tables(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = {"XLNet": {"n_layer": 1}}.get(kind, {})
        sub = "Blip2QFormerConfig" if kind == "Blip2QFormer" else f"{kind}Config"
        made = getattr(transformers, f"{kind}Model")(getattr(transformers, sub)(**config))
    groups = optim.split_params(made)
    names = {n for g in groups if g["rule"] == "matrix" for n, _ in g["params"]}
    assert names and not {n for n in names if any(w in n for w in ("bias", "rel_pos", "A_log"))}


def test_a_pattern_leaves_fused_weights_whole() -> None:
    """By name, by torch's own modules, and the group is that of all other matrices."""
    model = nn.ModuleDict({
        "qkv": nn.Linear(4, 12), "w12": nn.Linear(4, 6), "attention": nn.MultiheadAttention(4, 2),
        "out": nn.Linear(4, 7),
    })  # fmt: skip
    assert matrices_of(model)["qkv.weight"] == matrices_of(model)["attention.in_proj_weight"]
    said: list[str] = []
    opt = optim.configure(
        model, "muon", split={"qkv*": None, "*in_proj_weight": None}, report=said.append
    )
    split = {g["split"]: g["param_names"] for g in opt.param_groups if g["rule"] == "matrix"}
    assert split == {
        None: ["qkv.weight", "attention.in_proj_weight", "attention.out_proj.weight"],
        (3, 3): ["w12.weight"],
    }
    assert said[0].count("split=None") == 2

"""configure: models of every kind, each weight where it belongs, and the report of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from orthonorm import optim
from routes import matrices_of
from torch import Tensor, nn
from torch.nn import functional as F


class Dense(nn.Module):
    """A decoder with fused q, k, v and gate, up, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 13, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)
        self.c_attn, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)
        self.gate_up_proj = nn.Linear(8, 32, bias=False)
        self.down_proj = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.norm1(x)).unflatten(-1, (6, 4)).transpose(-2, -3).chunk(3, -3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(-2, -3).flatten(-2))
        gate, up = self.gate_up_proj(self.norm2(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """A router and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(13, 8)
        self.router = nn.Linear(8, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 8, 16) / 4)
        self.output_layer = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        weights = self.router(x).softmax(-1)
        hidden = F.silu(torch.einsum("eod,btd->bteo", self.up, x))
        y = torch.einsum("edo,bteo,bte->btd", self.down, hidden, weights)
        return self.output_layer(x + y)


class Latent(nn.Module):
    """Multi-head latent attention: low-rank queries, one latent for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(13, 12)
        self.q_a_proj, self.q_b_proj = nn.Linear(12, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.kv_a_proj = nn.Linear(12, 3, bias=False)
        self.kv_b_proj = nn.Linear(3, 16, bias=False)
        self.o_proj = nn.Linear(8, 12, bias=False)
        self.head = nn.Linear(12, 13, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        q = self.q_b_proj(self.q_a_proj(x))
        k, v = self.kv_b_proj(self.kv_a_proj(x)).chunk(2, -1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.o_proj(attended))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 13),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 13)
    )


MODELS: dict[str, tuple[Any, dict[str, Any], Any]] = {  # model, its matrices with their keys, input
    "dense": (
        Dense,
        {f"layers.{i}.{name}.weight": keys for i in range(2) for name, keys in
         (("c_attn", {"split": (8, 8, 8)}), ("proj", {}), ("gate_up_proj", {"split": (16, 16)}),
          ("down_proj", {}))},
        lambda: torch.arange(13)[None],
    ),
    "experts": (
        Experts, {"router.weight": {}, "up": {}, "down": {}}, lambda: torch.arange(13)[None],
    ),
    "latent": (
        Latent,
        {f"{n}.weight": {} for n in ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj")},
        lambda: torch.arange(13)[None],
    ),
    "convnet": (convnet, {"0.weight": {}, "4.weight": {}}, lambda: torch.randn(13, 3, 8, 8)),
    "mlp": (mlp, {"0.weight": {}, "2.weight": {}}, lambda: torch.randn(13, 5)),
}  # fmt: skip
CLASSES = ("normuon", "SOAP", "Conda", "StiefelAdam", "SSO", "Dion2")


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_goes_where_it_belongs_and_trains(kind: str) -> None:
    torch.manual_seed(0)
    make, matrices, data = MODELS[kind]
    model, said = make(), []
    opt = optim.configure(model, "normuon", lr=0.02, adamw=dict(lr=3e-3), report=said.append)
    assert isinstance(opt, optim.NorMuon)
    found = {
        name: {k: g[k] for k in ("split", "heads") if g.get(k)}
        for g in opt.param_groups if g["rule"] == "matrix" for name in g["param_names"]
    }  # fmt: skip
    assert found == matrices
    names = [n for g in opt.param_groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    x, wanted, losses = data(), torch.arange(13), []
    for _ in range(12):
        opt.zero_grad()
        losses.append(F.cross_entropy(model(x).flatten(0, -2), wanted))
        losses[-1].backward()
        opt.step()
    assert losses[-1] < losses[0]
    total = sum(p.numel() for p in model.parameters())
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", said[0])]
    assert sum(counts) == total and said[0].startswith("NorMuon: ")


def test_convolutions_and_scalars_may_have_the_names_of_fused_weights() -> None:
    model = nn.ModuleDict({"kv_proj": nn.Conv2d(6, 8, 1), "qkv": nn.Conv1d(4, 12, 1)})
    model["out"] = nn.Linear(4, 9)
    model.register_parameter("w12", nn.Parameter(torch.ones(())))
    opt = optim.configure(model, "muon", names=["out"], report=None)
    assert opt.param_groups[0]["split"] is None


def test_tables_gates_and_depthwise_kernels() -> None:
    model = nn.ModuleDict({
        "rnn": nn.LSTM(6, 4), "gru": nn.GRU(6, 4), "tanh": nn.RNN(6, 4),
        "depthwise": nn.Conv1d(6, 12, 4, groups=6), "grouped": nn.Conv2d(6, 4, 3, groups=2),
        "kv_proj": nn.Conv2d(6, 8, 1), "out": nn.Linear(4, 9),
    })  # fmt: skip
    for table in ("A_log", "relative_position_bias_table", "register_tokens", "latents"):
        model.register_parameter(table, nn.Parameter(torch.randn(8, 4)))
    assert matrices_of(model) == {
        "rnn.weight_ih_l0": (4,) * 4, "rnn.weight_hh_l0": (4,) * 4,
        "gru.weight_ih_l0": (4,) * 3, "gru.weight_hh_l0": (4,) * 3,
        "tanh.weight_ih_l0": None, "tanh.weight_hh_l0": None,
        "grouped.weight": None, "kv_proj.weight": None,
    }  # fmt: skip


def test_layers_may_have_the_names_of_tables() -> None:
    """SAM's attention from image to token; lists of tokens and a stack of one expert are none."""
    model = nn.ModuleDict({"image_to_token": nn.ModuleDict({"q_proj": nn.Linear(4, 6)})})
    model["mask_tokens"] = nn.ParameterList(nn.Parameter(torch.randn(8, 4)) for _ in range(2))
    model["out"] = nn.Linear(4, 9)
    experts = nn.Module()
    experts.up_proj = nn.Parameter(torch.randn(1, 6, 4))
    model["experts"] = experts
    assert matrices_of(model) == {"image_to_token.q_proj.weight": None, "experts.up_proj": None}


def test_tables_beside_layers_are_no_weights() -> None:
    """Known by the module that holds them; weights beside layers are known by their names."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 9)})
    alone = nn.ParameterDict({"fn": nn.Parameter(torch.randn(8, 4))})
    model["alone"] = alone  # a router of its own make: no layers beside it
    shapes = {"query": (8, 4), "rel_pos_h": (8, 4), "pos_bias_u": (2, 4), "down_proj_bias": (3, 4),
              "prompt": (1, 8, 4), "experts": (3, 4, 4), "gate_weight": (4, 4), "w1": (4, 4),
              "q": (4, 4)}  # fmt: skip
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    groups = optim.split_params(model)
    found = {n for g in groups if g["rule"] == "matrix" for n, _ in g["params"]}
    assert found == {
        "experts", "gate_weight", "w1", "q", "alone.fn", "out.weight",
        "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip
    said: list[str] = []
    optim.configure(model, "muon", report=said.append)
    for why in ("8x4 table beside layers", "2x4 bias", "1x8x4 leading 1"):
        assert why in " ".join(said[0].split())


def test_a_group_for_each_device() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4).to("meta"))
    groups = optim.split_params(model)
    places = [{p.device.type for _, p in g["params"]} for g in groups]
    assert places == [{"cpu"}, {"meta"}] * 2
    assert [g["rule"] for g in groups] == ["matrix"] * 2 + ["adamw"] * 2


def test_unfreezing_adds_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    opt = optim.Muon(optim.split_params(model[1]), lr=0.02)
    opt.add_param_group({"params": [model[0].weight]})
    opt.add_param_group({"params": model[0].bias, "rule": "adamw"})
    assert [g["param_names"] for g in opt.param_groups[2:]] == [["added.2"], ["added.3"]]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert not any(map(torch.equal, before, model.parameters()))
    opt.load_state_dict(opt.state_dict())


def test_a_head_of_one_output_is_the_last_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1))
    assert matrices_of(model) == {"0.weight": None, "2.weight": None}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_by_name(name: str) -> None:
    opt = optim.configure(mlp(), name, report=None)
    assert type(opt).__name__.lower() == name.lower()


def test_a_wrapper_is_no_optimizer_of_ours() -> None:
    """Trainers wrap an optimizer in a class made of its own and theirs: isinstance holds."""
    before = dict(optim.REGISTRY)
    type("WrappedMuon", (type("Wrapper", (), {}), optim.Muon), {})
    assert before == optim.REGISTRY


def test_report_says_why() -> None:
    said: list[str] = []
    optim.configure(Dense(), "muon", report=said.append)
    text = "\n".join(" ".join(line.split()) for line in said[0].splitlines())
    assert "layers.*.c_attn.weight 2 of 24x8 split=(8, 8, 8)" in text
    assert "wte.weight 1 of 13x8 embedding" in text and "norm.weight 1 of 8 vector" in text
    optim.configure(mlp(), "muon", report=said.append)
    assert "last layer" in said[1]
    optim.configure(mlp(), "muon", names=["4"], report=said.append)
    assert "named 4" in said[2]
    optim.configure(mlp(), "adamw", report=said.append)
    assert said[3].startswith("AdamW: 589 parameters") and "\n" in said[3]


def test_an_untied_head_is_known_by_its_shape() -> None:
    """Meta's LLaMA calls it `output`, which is a hidden layer of BERT."""
    named = {"tok_embeddings": nn.Embedding(20, 8), "wq": nn.Linear(8, 8, bias=False)}
    llama = nn.ModuleDict({**named, "output": nn.Linear(8, 20, bias=False)})
    hidden = nn.ModuleDict({**named, "output": nn.Linear(8, 12), "w2": nn.Linear(12, 8)})
    square = nn.ModuleDict({"pos": nn.Embedding(8, 8), "wq": nn.Linear(8, 8, bias=False)})

    def matrices(model: nn.Module) -> list[str]:
        groups = optim.split_params(model)
        return [name for g in groups if g["rule"] == "matrix" for name, _ in g["params"]]

    assert matrices(llama) == ["wq.weight"]
    assert matrices(hidden) == ["wq.weight", "output.weight", "w2.weight"]
    assert matrices(square) == ["wq.weight"]
    opt = optim.configure(llama, "muon", report=None)
    assert opt.param_groups[0]["param_names"] == ["wq.weight"]


def test_what_comes_first_and_what_is_refused() -> None:
    model = Dense()
    opt = optim.configure(
        model, "muon", split={"*.c_attn.weight": (16, 8)}, heads={"*.proj.weight": 2}, report=None
    )
    keys = {n: (g.get("split"), g.get("heads")) for g in opt.param_groups
            for n in g["param_names"]}  # fmt: skip
    assert keys["layers.1.c_attn.weight"] == ((16, 8), None)
    assert keys["layers.0.proj.weight"] == (None, 2)
    with pytest.raises(ValueError, match="'muonn'"):
        optim.configure(model, "muonn")
    with pytest.raises(TypeError, match="must be an nn"):
        optim.configure(model.parameters(), "muon")
    with pytest.raises(TypeError, match="beta2"):
        optim.configure(model, "muon", beta2=0.9)

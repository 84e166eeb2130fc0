"""The trainers people use, as installed: `make frameworks`. Tiny models, made from configs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from orthonorm import optim
from orthonorm.compat.factory import create_optimizer
from orthonorm.optim.configure import by_name
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


APART = Path(sys.prefix, "torchvision")  # a folder of its own, see Makefile


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [m for m in modules if find_spec(m) is None and not Path(APART, m).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: make frameworks")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "embedding": nn.Embedding(30, 12), "up": nn.Linear(12, 16), "norm": nn.LayerNorm(16),
        "down": nn.Linear(16, 30),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def batches(count: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 30, (size, 5), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def parameters(optimizer: Any) -> list[Tensor]:
    """In the order of the groups, in which Lightning adds up their norms."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def plainly_trained(steps: list[list[Tensor]], clip: float | None = None) -> nn.Module:
    """The loop that a trainer writes: accumulation of a step's batches, clipping, step."""
    model = network()
    optimizer = optim.Muon(optim.split_params(model), lr=0.02)
    for accumulated in steps:
        for x in accumulated:
            (loss_of(model, x) / len(accumulated)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters(optimizer), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# ---- by name -------------------------------------------------------------------------------------
def test_optimizers_by_name() -> None:
    assert by_name("normuon") is by_name(optim.NorMuon) is optim.NorMuon
    for wrong in ("Adam", 3, nn.Linear):
        with pytest.raises(ValueError, match=r"optimizer must be one of .*'Muon'"):
            by_name(wrong)
    for name in optim.REGISTRY:
        model = network()
        optimizer = create_optimizer(model, name)
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
            list(model.parameters())
        )


# ---- Hugging Face Trainer and accelerate ---------------------------------------------------------
class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = batches(24, 1)[i][0]
        return {"input_ids": x, "labels": x}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@needs("transformers", "accelerate")
@pytest.mark.usefixtures("offline")
def test_trainer_resumes(tmp_path: Path) -> None:
    """Stopped after three of six steps and continued from its checkpoint: the same bits."""
    import transformers as hf
    from orthonorm.compat.transformers import optimizer_cls_and_kwargs

    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        config = hf.GPT2Config(vocab_size=30, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        arguments = hf.TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=6, save_steps=3, logging_steps=1, report_to=[], use_cpu=True, seed=3,
            max_grad_norm=1.0, lr_scheduler_type="cosine", disable_tqdm=True,
        )  # fmt: skip
        pair = optimizer_cls_and_kwargs("normuon", lr=0.02, adamw=dict(lr=1e-3))
        return hf.Trainer(
            hf.GPT2LMHeadModel(config), arguments, train_dataset=Tokens(),
            optimizer_cls_and_kwargs=pair,
        )  # fmt: skip

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    equal(whole.model, resumed.model)
    inner = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert isinstance(inner, optim.NorMuon)
    assert {g["rule"] for g in inner.param_groups} == {"matrix", "adamw"}
    rates = [x["learning_rate"] for x in whole.state.log_history if "learning_rate" in x]
    assert rates[0] > rates[-1] and rates[0] <= 0.02


@needs("accelerate")
def test_accelerate_prepares_and_resumes(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def prepared() -> tuple[Any, Any, Any]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        optimizer = optim.Muon(optim.split_params(model), lr=0.02)
        return accelerator, *accelerator.prepare(model, optimizer)

    def run(accelerator: Any, model: Any, optimizer: Any, data: list[Tensor]) -> None:
        for x in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters(optimizer), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    data = batches(8)
    whole = prepared()
    run(*whole, data[:4])
    whole[0].save_state(str(tmp_path / "state"))
    run(*whole, data[4:])
    steps = [data[i : i + 2] for i in range(0, 8, 2)]
    equal(whole[0].unwrap_model(whole[1]), plainly_trained(steps, clip=0.5))
    resumed = prepared()
    resumed[0].load_state(str(tmp_path / "state"))
    run(*resumed, data[4:])
    equal(whole[1], resumed[1])


# ---- Lightning -----------------------------------------------------------------------------------
@needs("lightning")
def test_lightning_accumulates_clips_and_resumes(tmp_path: Path) -> None:
    import lightning as L

    data = batches(4)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, x: Tensor) -> Tensor:
            return loss_of(self.network, x)

        def configure_optimizers(self) -> Any:
            return optim.Muon(optim.split_params(self), lr=0.02)

    def trained(checkpoint: Path | None = None) -> Module:
        module = Module()
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=0.5,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[L.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, batch_size=None)  # two steps
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        return module

    whole = trained()
    equal(whole, trained(tmp_path / "epoch=0.ckpt"))
    equal(whole.network, plainly_trained([data[:2], data[2:]] * 2, clip=0.5))


# ---- timm ----------------------------------------------------------------------------------------
@needs("timm", "torchvision")
def test_timm() -> None:
    """In a process of its own, that finds torchvision, which timm imports."""
    script = Path(__file__).with_name("timm_models.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "PYTHONPATH": str(APART)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_timm_groups() -> None:
    """What decays and what AdamW takes, by timm's rules; the registry's other optimizers too."""
    from orthonorm.compat.timm import create_optimizer_v2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.scale_weight = nn.Parameter(torch.ones(3, 2))

        def no_weight_decay(self) -> set[str]:
            return {"scale_weight"}

    def groups(model: Any = None, **settings: Any) -> dict[str, tuple[str, float]]:
        optimizer = create_optimizer_v2(model or Net(), weight_decay=0.1, **settings)
        return {
            n: (g["rule"], g["weight_decay"])
            for g in optimizer.param_groups for n in g["param_names"]
        }  # fmt: skip

    found = groups()
    assert found["first.weight"] == ("matrix", 0.1) and found["first.bias"] == ("adamw", 0.0)
    assert found["scale_weight"] == ("matrix", 0.0)
    found = groups(fallback_no_weight_decay=True, fallback_list=["sec*"], filter_bias_and_bn=False)
    assert found["scale_weight"] == ("adamw", 0.0) and found["second.weight"] == ("adamw", 0.1)
    assert found["first.bias"] == ("adamw", 0.1)
    assert set(groups(opt="AdamW").values()) == {("adamw", 0.1), ("adamw", 0.0)}
    conda = create_optimizer_v2(Net(), "conda", betas=(0.8, 0.9))
    assert conda.param_groups[0]["betas"] == (0.8, 0.9)
    for name in ("scion", "scionlight", "stiefeladam"):  # their rules take no weight decay
        assert "weight_decay" not in create_optimizer_v2(Net(), name, weight_decay=0.1).defaults
        made = create_optimizer_v2(Net(), name, weight_decay=0.1, filter_bias_and_bn=False)
        decays = {g["rule"]: g.get("weight_decay") for g in made.param_groups}
        assert decays == {"matrix": None, "adamw": 0.1}
    for name in ("muon", "conda", "scion", "adamw"):
        for more, decay in ({}, 0.1), (dict(adamw=dict(weight_decay=0.3)), 0.3):
            if name != "adamw" or not more:
                rest = {"params": [nn.Parameter(torch.ones(2))], "rule": "adamw"}
                made = create_optimizer_v2([rest], name, weight_decay=0.1, **more)
                assert made.param_groups[0]["weight_decay"] == decay
    params = [nn.Parameter(torch.ones(3, 2))]
    assert create_optimizer_v2(params, lr=0.5).param_groups[0]["lr"] == 0.5
    head = Net()
    head.get_classifier = lambda: head.second  # type: ignore[assignment]
    assert groups(head)["second.weight"] == ("adamw", 0.1)
    made = create_optimizer_v2(
        Net(), param_group_fn=lambda m: [dict(params=[m.scale_weight], lr=0.25)]
    )
    assert made.param_groups[0]["lr"] == 0.25
    with pytest.raises(ValueError, match="layer_decay must be None"):
        create_optimizer_v2(Net(), layer_decay=0.7)


# ---- torchtitan ----------------------------------------------------------------------------------
@needs("torchtitan", "tyro", "spmd_types", "torchdata", "torch_checkpointing", "einops")
def test_torchtitan_container() -> None:
    """Built from its config, trained, and carried over by its flat state dict."""
    from orthonorm.compat.torchtitan import OptimizersContainer, ParamGroupConfig, muon_config

    data = batches(4)

    def run(model: nn.Module, container: Any, data: list[Tensor]) -> None:
        for x in data:
            loss_of(model, x).backward()
            container.step()
            container.zero_grad()

    model = network()
    container = muon_config(lr=0.02).build(model_parts=[model])
    assert [type(o) for o in container] == [optim.Muon]
    run(model, container, data[:2])
    weights, state = copy.deepcopy((model.state_dict(), container.state_dict()))
    assert state["state.up.weight.momentum_buffer"].shape == (16, 12)
    twin = network()
    twin.load_state_dict(weights)
    other = muon_config(lr=0.5).build(model_parts=[twin])
    other.load_state_dict(state)
    run(model, container, data[2:])
    run(twin, other, data[2:])
    equal(model, twin)
    equal(model, plainly_trained([[x] for x in data]))

    mixed = OptimizersContainer.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(
                pattern="embedding", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1}
            ),
            ParamGroupConfig(
                pattern=".*", optimizer_name="orthonorm.conda",
                optimizer_kwargs={"lr": 0.01, "adamw": {"lr": 0.003}},
            ),
        ],
    ).build(model_parts=[network()])  # fmt: skip
    assert [type(o) for o in mixed] == [torch.optim.AdamW, optim.Conda]
    assert [g["lr"] for g in list(mixed)[1].param_groups] == [0.01, 0.003]
    fused = nn.ModuleDict({"qkv": nn.Linear(4, 12), "rnn": nn.GRU(4, 4), "out": nn.Linear(4, 8)})
    (made,) = muon_config(lr=0.02).build(model_parts=[fused])
    split = {n: g.get("split") for g in made.param_groups for n in g["param_names"]}
    assert split["qkv.weight"] == split["rnn.weight_ih_l0"] == (4, 4, 4)
    assert split["out.weight"] is None and split.keys() == dict(fused.named_parameters()).keys()
    (made,) = muon_config("AdamW", lr=0.01).build(model_parts=[fused])
    assert [g["lr"] for g in made.param_groups] == [0.01]
    own: list[tuple[str, dict[str, Any]]] = [("qkv.weight", {"split": (8, 2, 2)}),
           ("rnn.weight", {"rule": "adamw"}), (".*", {"weight_decay": 0.0})]  # fmt: skip
    (made,) = OptimizersContainer.Config(param_groups=[
        ParamGroupConfig(
            pattern=pattern, optimizer_name="orthonorm.Muon", optimizer_kwargs={"lr": 0.1, **more}
        ) for pattern, more in own
    ]).build(model_parts=[fused])  # fmt: skip
    found = {n: (g["rule"], g.get("split"), g["lr"]) for g in made.param_groups
             for n in g["param_names"]}  # fmt: skip
    assert found["qkv.weight"] == ("matrix", (8, 2, 2), 0.1)
    assert found["rnn.weight_ih_l0"] == ("adamw", None, 0.1)
    with pytest.raises(ValueError, match="optimizer must be one of"):
        muon_config("Moun")


def test_importing_orthonorm_imports_no_framework() -> None:
    import subprocess

    code = (
        "import sys, orthonorm.optim, orthonorm.compat, orthonorm.compat.timm\n"
        "import orthonorm.compat.transformers as t; t.optimizer_cls_and_kwargs()\n"
        "names = {'transformers', 'accelerate', 'lightning', 'timm', 'torchtitan'}\n"
        "sys.exit(str(names & set(sys.modules)) if names & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

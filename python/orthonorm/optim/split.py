"""Split a model's parameters into param groups: hidden matrices, and all else for AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks as check
from .views import check_counts

# Names (a component of the dotted path) of weights that map to or from tokens and classes.
NOT_HIDDEN = (
    "*embed*", "wte", "wpe", "tok_emb*", "pos_emb*", "lm_head", "head", "output_layer",
    "classifier", "unembed*", "score", "logits",
)  # fmt: skip
# The same of tables that are no layers' weights: learned tokens, decay rates of state-space models.
TABLES = ("*_token", "*_tokens", "latents", "A_log")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase,
    nn.MultiheadAttention, *EMBEDDINGS,
)  # fmt: skip
# Names of weights that a module holds beside its layers.
WEIGHTS = (
    "*weight*", "*proj*", "*gate*", "*kernel*", "*lora*", "up", "down", "[qkvow]", "w_*",
    "w*[0-9]", "W*",
)  # fmt: skip
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GATED = {(nn.LSTM, nn.LSTMCell): 4, (nn.GRU, nn.GRUCell): 3}
# Reasons for AdamW by which `configure` decides.
SIDE, NAMED, EMBEDDING, LIKE_EMBEDDING = "side of 1", "named", "embedding", "shape of an embedding"


def split_params(
    model: nn.Module,
    *,
    adamw: Sequence[str] = NOT_HIDDEN,
    heads: Mapping[str, int | Sequence[int]] | None = None,
    split: Mapping[str, Sequence[int] | None] | None = None,
) -> list[dict[str, Any]]:
    """Return param groups of a model: hidden matrices with rule="matrix", all else "adamw".

    AdamW gets vectors and scalars (gains, biases), embeddings and weights tied to them, matrices
    with a side of 1, transposed and depthwise convolutions, and parameters with a path component
    that matches a pattern of `adamw` (embeddings, heads). Of what modules hold besides layers it
    gets biases of any shape, tensors with a leading 1 and tables (tokens, queries). It also gets
    the last Linear if its weight has the shape of an embedding: it then maps back to tokens.
    Convolution weights are flattened to out x rest, 3-D weights are batches (expert stacks), and
    the matrices of nn.MultiheadAttention's in_proj_weight and of the gates of nn.LSTM and nn.GRU
    are split. Weights that transformers stores as inputs x outputs are transposed (`transpose`).
    No group spans devices.

    Args:
        model: its parameters that require gradients are grouped, each once, with their names.
        adamw: shell patterns of path components; AdamW gets the parameters that match.
        heads: {pattern: number of heads}: matching weights are one matrix per head. The pattern is
            matched against the dotted name ("*.attn.q_proj.weight").
        split: {pattern: row counts}: matching fused weights are split along their rows; `heads` may
            then give one number per piece. None in place of counts leaves them whole.

    Returns: groups with `params` as (name, parameter) pairs; the optimizer adds other settings.
    """
    return grouped(assign(model, adamw=adamw, heads=heads, split=split))


class Assigned(NamedTuple):
    """A parameter, its module, and the keys of its matrix group or the reason for AdamW."""

    name: str
    p: nn.Parameter
    owner: nn.Module
    keys: dict[str, Any]
    reason: str


def assign(
    model: nn.Module,
    *,
    adamw: Sequence[str],
    heads: Mapping[str, int | Sequence[int]] | None,
    split: Mapping[str, Sequence[int] | None] | None,
) -> list[Assigned]:
    """Return the assignment of every trained parameter, in the order of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"split_params: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(adamw, (list, tuple)) or not all(isinstance(x, str) for x in adamw):
        raise TypeError(f"split_params: adamw must be a list of patterns, got {adamw!r}")
    _check_patterns(model, heads=heads, split=split)
    found = []
    tied = {id(p) for m in model.modules() if isinstance(m, EMBEDDINGS) for p in m.parameters()}
    owners = _owners(model)
    to_tokens = unembedding(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            owner = owners[id(p)]
            reason = EMBEDDING if id(p) in tied else _not_hidden(name, p, owner, adamw)
            if owner is to_tokens and p.dim() == 2:
                reason = reason or LIKE_EMBEDDING
            keys = {} if reason else _views(name, p, owner, heads or {}, split or {})
            found.append(Assigned(name, p, owner, keys, reason))
    return found


def _owners(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module of each parameter, by its id; of a parametrized weight its layer."""
    found = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    for m in filter(parametrize.is_parametrized, model.modules()):
        lists: Any = m.parametrizations
        for held in lists.values():
            found |= {id(p): m for p in held.parameters(recurse=False)}
    return found


def unembedding(model: nn.Module) -> nn.Module | None:
    """Return the last Linear if its weight has the shape of an embedding, which is not square."""
    shapes = {
        (m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, EMBEDDINGS)
    }
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    shape = (last[0].out_features, last[0].in_features) if last else (0, 0)
    return last[0] if shape in shapes and shape[0] != shape[1] else None


def grouped(found: list[Assigned]) -> list[dict[str, Any]]:
    """Return param groups, one per rule, keys and device, matrix groups first."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for a in found:
        keys = {"rule": "adamw" if a.reason else "matrix"}
        keys |= {k: v for k, v in a.keys.items() if v is not None}
        slot = (a.p.device, *sorted((k, str(v)) for k, v in keys.items()))
        groups.setdefault(slot, {"params": [], **keys})["params"].append((a.name, a.p))
    return sorted(groups.values(), key=lambda g: str(g["rule"]) == "adamw")


def _not_hidden(name: str, p: Tensor, owner: nn.Module | None, adamw: Sequence[str]) -> str:
    """Return the reason why a parameter is not a hidden matrix, or "" if it is one."""
    if p.dim() < 2:
        return "vector" if p.dim() else "scalar"
    if isinstance(owner, TRANSPOSED):
        return "transposed convolution"
    if isinstance(owner, CONVOLUTIONS) and 1 < owner.groups == owner.in_channels:
        return "depthwise convolution"
    rows, cols = (p.shape[0], p[0].numel()) if isinstance(owner, CONVOLUTIONS) else p.shape[-2:]
    if min(rows, cols) < 2:
        return SIDE
    for part in name.split("."):
        for pattern in adamw:
            if fnmatchcase(part, pattern):
                return f"{NAMED} {pattern}"
    return _no_weight(name, p, owner)


def _no_weight(path: str, p: Tensor, owner: nn.Module | None) -> str:
    """Return why a parameter held by a module that is no layer of torch is no weight, or "".

    Biases of experts and of attention have two dimensions. If it is not named as weights are, what
    has a leading 1 is shared by a batch, and a matrix of a module that has layers in it is a table
    (queries, prompts). Stacks of three dimensions are weights: of experts, or of heads.
    """
    name = path.rpartition(".")[2]
    if isinstance(owner, LAYERS):
        return ""
    if "bias" in name:
        return "bias"
    for part in path.split("."):
        for pattern in TABLES:
            if fnmatchcase(part, pattern):
                return f"table {pattern}"
    if any(fnmatchcase(name, x) for x in WEIGHTS):
        return ""
    if p.dim() > 2 and p.shape[0] == 1:
        return "leading 1"
    beside = owner is not None and any(isinstance(m, LAYERS) for m in owner.modules())
    return "table beside layers" if p.dim() == 2 and beside else ""


def _views(
    name: str,
    p: Tensor,
    owner: nn.Module,
    heads: Mapping[str, int | Sequence[int]],
    split: Mapping[str, Sequence[int] | None],
) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if isinstance(owner, CONVOLUTIONS) and p.dim() == 3:
        keys["flatten"] = True
    if stores_inputs_first(owner):
        keys["transpose"] = True
    for label, patterns in (("split", split), ("heads", heads)):
        for pattern, value in patterns.items():
            if fnmatchcase(name, pattern):
                counts = tuple(value) if isinstance(value, (tuple, list)) else value
                keys[label] = check.plain(counts)
    count = gates(name, owner)
    if "split" not in keys and count and p.shape[0] % count == 0:
        keys["split"] = (p.shape[0] // count,) * count
    return keys


def stores_inputs_first(owner: nn.Module) -> bool:
    """True for modules of transformers whose weights, or stacks of them, are inputs x outputs."""
    kind = type(owner)
    conv1d = kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"
    if conv1d or getattr(owner, "is_transposed", None) is True:  # the latter: experts
        return True
    up, down = (getattr(owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    stacks = up.dim() == down.dim() == 3
    return stacks and up.shape[1:] == (down.shape[2], 2 * down.shape[1])  # Llama 4's do not say so


def gates(name: str, owner: nn.Module) -> int:
    """Return the number of matrices that torch's own modules fuse in a weight; 0 if it is one."""
    *path, own = name.split(".")
    if own.startswith("original") and "parametrizations" in path[-2:-1]:
        own = path[-1]
    if own == "in_proj_weight":
        return 3
    if own.startswith(("weight_ih", "weight_hh")):
        return next((n for kinds, n in GATED.items() if isinstance(owner, kinds)), 0)
    return 0


def _check_patterns(model: nn.Module, **patterns: Mapping[str, Any] | None) -> None:
    names = [name for name, _ in model.named_parameters()]
    for label, mapping in patterns.items():
        if not isinstance(mapping, (Mapping, type(None))):
            raise TypeError(
                f"split_params: {label} must be a dict from patterns to counts, got {mapping!r}"
            )
        for pattern, counts in (mapping or {}).items():
            if not any(fnmatchcase(name, str(pattern)) for name in names):
                raise ValueError(
                    f"split_params: {label} pattern must match a parameter name, got {pattern!r}"
                )
            if label == "split" and counts is None:
                continue
            single = label == "heads" and isinstance(check.plain(counts), int)
            check_counts("split_params", label, [counts] if single else counts)

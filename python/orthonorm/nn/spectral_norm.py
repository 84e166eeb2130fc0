"""Spectral normalization as parametrizations: of one layer, or of all layers of a module at once.

Stands in for `torch.nn.utils.parametrizations.spectral_norm` and for the older hook
`torch.nn.utils.spectral_norm` (arXiv:1802.05957): same vectors, same order, same state-dict names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _checks as check
from ..ops.spectral import ORDERS
from .convolution import CONVOLUTIONS, TRANSPOSED, ConvOperator
from .normalized import WARM_UP, Place, Results, SpectralNorm, normalized
from .state_names import StateNames
from .store import Store

M = TypeVar("M", bound=nn.Module)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
NONE = nn.Module()  # in place of a part that is not there
Make = Callable[[nn.Module, Tensor], SpectralNorm]


def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    order: str = "u_first",
    size: Sequence[int] | None = None,
) -> M:
    """weight = W / sigma_1(W): `torch.nn.utils.parametrizations.spectral_norm`, one pass over W.

    Each access in training takes power steps from the buffers u and v, and sigma = u^T W v; in
    evaluation they stay. Gradient: (G - <G, W> / sigma u v^T) / sigma, G that of the result. A 1-D
    weight is divided by its norm. A zero weight stays zero, with sigma taken as 1; one that is not
    finite gives NaN and leaves u and v alone. Loads the state dicts of both torch versions.

    Args:
        module: any module with a weight; changed in place and returned.
        name: the weight's name.
        n_power_iterations: power steps an access, 4 m n operations each.
        eps: lower clamp of the norms.
        dim: axis of the outputs; None is 1 for transposed convolutions, else 0. The others are
            flattened: the matrix is (outputs, rest).
        order: "u_first", as torch's parametrization, with 15 steps at registration; or "v_first",
            as torch's older hook, with none, and that hook's names in the state dict.
        size: spatial size of a convolution's input: sigma is then the norm of the convolution as a
            map of feature maps of that size, not of the flattened weight (at most sqrt(taps) off).

    Shapes: the weight is (outputs, ...), any number of dimensions. Cost: 15 power steps at
    registration; an access reads W once a step and once to divide it, each from memory or cache.

    Raises: ValueError where `name` is no weight or has a spectral norm already; TypeError for
    weights that are not dense and floating-point.

    Source: arXiv:1802.05957; torch/nn/utils/parametrizations.py.
    """
    make = maker(SpectralNorm, n_power_iterations, eps, dim, order, size)
    check_free(module, name)
    register(module, name, make(module, getattr(module, name)))
    return module


def spectral_norm_(
    model: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    order: str = "u_first",
    layers: Iterable[nn.Module] | None = None,
) -> M:
    """weight = W / sigma_1(W), `spectral_norm`, of all layers, together before each forward.

    One batched power iteration for all of them instead of one an access, so a layer called twice in
    a forward takes one step. A layer that is called without `model` takes its own steps, as after
    `spectral_norm`. Small layers share a node of the graph, so their gradients come together.

    Args:
        model: changed in place and returned.
        name, n_power_iterations, eps, order: as in `spectral_norm`.
        layers: which; None is every Linear, ConvNd and ConvTransposeNd that `model` has.

    Shapes: weights are (outputs, ...), each its own. Cost: as `spectral_norm`, but one call for all
    layers, and on CPUs memory for their results, which stays with the model.

    Raises: as `spectral_norm`, before any layer is changed; ValueError where there is no layer.

    Source: arXiv:1802.05957.
    """
    make = maker(SpectralNorm, n_power_iterations, eps, None, order, None)
    return register_together(model, name, make, layers)


def maker(
    kind: type[SpectralNorm], steps: int, eps: float, dim: int | None, order: str, size: Any,
    **more: Any,
) -> Make:  # fmt: skip
    """The checked arguments as what makes one layer's parametrization."""
    op = "spectral_norm"
    check.integer(op, "n_power_iterations", steps, 1)
    check.number(op, "eps", eps, 0.0)
    check.choice(op, "order", order, ORDERS)

    def make(module: nn.Module, W: Tensor) -> SpectralNorm:
        axis = int(isinstance(module, TRANSPOSED)) if dim is None else dim
        if not -W.dim() <= axis < W.dim():
            raise ValueError(f"{op}: dim must be in [{-W.dim()}, {W.dim() - 1}], got {axis}")
        operator = None if size is None else ConvOperator(module, size)
        return kind(W, steps, axis % W.dim(), eps, order, operator, **more)

    return make


def register(module: nn.Module, name: str, layer: SpectralNorm) -> None:
    steps = layer.steps
    layer.steps = steps if layer.order == "u_first" else 0  # registering accesses the weight once
    parametrize.register_parametrization(module, name, layer)
    layer.steps = steps
    StateNames(name, layer.dim, layer.order == "v_first").install(module)


def register_together(model: M, name: str, make: Make, layers: Iterable[nn.Module] | None) -> M:
    """Parametrizations of layers of a model, and the hooks that compute them together."""
    if layers is None:
        chosen = [m for m in model.modules() if isinstance(m, LAYERS)]
    else:
        chosen = list(dict.fromkeys(layers))
        inside = {id(m) for m in model.modules()}
        for m in chosen:
            if id(m) not in inside:
                raise ValueError(f"spectral_norm_: layers must be in the model, got {m}")
    if not chosen:
        raise ValueError(f"spectral_norm_: {type(model).__name__} has no layers to normalize")
    for m in chosen:
        check_free(m, name)
        if parametrize.is_parametrized(m, name):
            raise ValueError(f"spectral_norm_: {name!r} of {m} is parametrized already")
    made = [make(m, getattr(m, name)) for m in chosen]
    for m, layer in zip(chosen, made, strict=True):
        register(m, name, layer)
    group = _Group(name, chosen)
    model.register_forward_pre_hook(group.before)
    model.register_forward_hook(group.after, always_call=True)
    return model


def check_free(module: nn.Module, name: str, min_dim: int = 1) -> None:
    """ValueError or TypeError unless `name` is a weight without a spectral norm."""
    op, kind = "spectral_norm", type(module).__name__
    taken = [*_parametrizations(module, name), *module._forward_pre_hooks.values()]
    for other in taken:
        theirs = type(other).__name__ in ("_SpectralNorm", "SpectralNorm")  # torch's two
        if isinstance(other, SpectralNorm) or (theirs and getattr(other, "name", name) == name):
            raise ValueError(f"{op}: {name!r} of {kind} has a spectral norm already: {other}")
    weight = getattr(module, name, None)
    if isinstance(weight, nn.UninitializedParameter):
        raise ValueError(f"{op}: {name!r} of {kind} must be initialized: call the module once")
    if not isinstance(weight, Tensor):
        raise ValueError(f"{op}: {kind} has no parameter or buffer {name!r}")
    check.tensor(op, name, weight, min_dim)


def _parametrizations(module: nn.Module, name: str) -> list[nn.Module]:
    found: Any = module._modules.get("parametrizations", {})
    return list(found[name]) if name in found else []


def remove_spectral_norm(module: M, name: str = "weight") -> M:
    """W <- W / sigma_1: the normalized weight as a plain parameter, of a layer or all of a module.

    For what `spectral_norm`, `spectral_norm_` and their relatives registered. No further power
    step; the value is the one that evaluation uses.

    Shapes: weights keep theirs. Cost: one pass over each weight.

    Raises: ValueError where there is none.

    Source: torch/nn/utils/spectral_norm.py, remove_spectral_norm.
    """
    found = [m for m in module.modules() if _of(m, name)]
    if not found:
        raise ValueError(
            f"remove_spectral_norm: {name!r} of {type(module).__name__} has no spectral norm"
        )
    for m in found:
        _of(m, name)[0].eval()
        parts: Any = m.parametrizations[name]  # type: ignore[index]
        kind = type(m)  # deep copies share it, and torch takes the weight's property off it
        m.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
        parametrize.remove_parametrizations(m, name)
        StateNames.remove(m, name)
        for original in (parts._parameters, parts._buffers):  # no work is left for its group
            original.pop("original", None)
    for m in module.modules():
        for hooks in (m._forward_pre_hooks, m._forward_hooks):
            for key, hook in list(hooks.items()):
                group = getattr(hook, "__self__", None)
                if isinstance(group, _Group) and not group.find():
                    del hooks[key]
                    getattr(m, "_forward_hooks_always_called", {}).pop(key, None)
    return module


def _of(module: nn.Module, name: str) -> list[SpectralNorm]:
    return [p for p in _parametrizations(module, name) if isinstance(p, SpectralNorm)]


def spectral_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, SpectralNorm]]:
    """Every spectral norm of a model: (path of the layer, the layer, weight's name, it)."""
    for path, m in model.named_modules():
        for name in getattr(m, "parametrizations", ()):
            for p in _of(m, name):
                yield path, m, name, p


def refresh_vectors_(model: M, steps: int = WARM_UP) -> M:
    """u <- W v / |W v|, v <- W^T u / |W^T u|, `steps` times, in every spectral norm of `model`.

    For copies whose weights are averages (EMA): averages of u and v are no singular vectors, and
    too short, so leave them out or call this before the copy is used.

    Shapes: u and v keep theirs, (outputs,) and the product of the others. Cost: a pass over every
    weight a step. Source: arXiv:1802.05957; averages leave u and v out in
    github.com/NCAR/miles-credit too.
    """
    check.integer("refresh_vectors_", "steps", steps, 1)
    for _, m, name, p in spectral_norms(model):
        original: Any = m.parametrizations[name]  # type: ignore[index]
        p.step(original.original, steps)
    return model


def _shortcut(module: nn.Module, name: str, place: Place) -> None:
    """Lets `module.name` hand out what is at `place`, if anything, without further calls.

    Torch gives a parametrized module a class of its own with a property that calls the list of
    parametrizations, which calls the first of them: 3 us a layer (2026-11).
    """
    kind, ready = type(module), f"_{name}_ready"
    usual: Any = vars(kind)[name]

    def get(self: Any) -> Any:
        result = getattr(self, ready).current()
        return usual.fget(self) if result is None else result

    setattr(module, ready, place)
    setattr(kind, name, property(get, usual.fset))


class _Group:
    """Layers of one module whose weights are computed together before each of its forwards."""

    def __init__(self, name: str, layers: list[nn.Module]) -> None:
        self.name, self.layers = name, layers
        self.parts: list[tuple[int, Any, SpectralNorm]]
        # what a layer's own parametrization makes, and what all of its parametrizations make
        self.own, self.whole = Results(), Results()
        self.store = Store()
        for i, _, p in self.find():
            p.ready = Place(self.own, i)
            _shortcut(layers[i], name, Place(self.whole, i))

    def find(self) -> list[tuple[int, Any, SpectralNorm]]:
        """(which layer, its list of parametrizations, ours), less those that were removed."""
        self.parts = []
        for i, layer in enumerate(self.layers):
            lists: Any = layer._modules.get("parametrizations", NONE)
            x: Any = lists._modules.get(self.name, NONE)
            p = x._modules.get("0")
            if isinstance(p, SpectralNorm):
                self.parts.append((i, x, p))
        return self.parts

    def before(self, *_: Any) -> None:
        self.own.last = self.whole.last = None  # the next results may have the memory of the last
        found, layers, weights = [], [], []
        for i, x, p in self.parts:
            weight = x._parameters.get("original")
            weight = x._buffers.get("original") if weight is None else weight
            # what is sharded still (FSDP of a part of the model) is whole when its layer asks
            if type(weight) in (nn.Parameter, Tensor):
                found.append(i)
                layers.append(p)
                weights.append(weight)
        made: list[Tensor | None] = [*normalized(layers, weights, self.store)]
        if len(made) < len(self.layers):
            results = dict(zip(found, made, strict=True))
            made = [results.get(i) for i in range(len(self.layers))]
        self.own.push(made)
        further = {i for i, x, _ in self.parts if len(x._modules) > 1}  # which act on the result
        self.whole.push(
            [None if i in further else y for i, y in enumerate(made)] if further else made
        )

    def after(self, *_: Any) -> None:
        self.own.pop()
        self.whole.pop()

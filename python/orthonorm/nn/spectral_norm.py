"""Spectral normalization as parametrizations: of one layer, or of all layers of a module at once.

Takes the place of `torch.nn.utils.parametrizations.spectral_norm` and of the older hook
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
NONE = nn.Module()  # an empty stand-in for a missing submodule
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

    In training each access takes power steps on the buffers u and v, then sigma = u^T W v; in
    evaluation u and v stay. The gradient is (G - <G, W> / sigma u v^T) / sigma, where G is that of
    the result. A 1-D weight is divided by its norm. A zero weight stays zero: sigma is taken as 1.
    A weight that is not finite gives NaN and leaves u and v unchanged. State dicts of both torch
    versions load.

    Args:
        module: any module with a weight; changed in place and returned.
        name: the weight's name.
        n_power_iterations: power steps per access, 4 m n operations each.
        eps: lower clamp of the norms.
        dim: axis of the outputs; None takes 1 for transposed convolutions, else 0. The other axes
            are flattened: the matrix is (outputs, rest).
        order: "u_first" is torch's parametrization, with 15 steps at registration. "v_first" is
            torch's older hook, without these steps and with its names in the state dict.
        size: spatial size of a convolution's input. sigma is then the norm of the convolution as a
            map of feature maps of that size, not of the flattened weight. With zero padding it is
            at most sqrt(taps) times as large.

    Shapes: the weight is (outputs, ...), any number of dimensions. Cost: 15 power steps at
    registration; each access reads W once per power step and once to divide it.

    Raises: ValueError if `name` is not a weight or has a spectral norm already; TypeError for
    weights that are not dense and floating-point.

    Source: arXiv:1802.05957; torch/nn/utils/parametrizations.py.
    """
    op = "spectral_norm"
    make = maker(op, SpectralNorm, n_power_iterations, eps, dim, order, size)
    return register_alone(op, module, name, make)


def spectral_norm_(
    model: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    order: str = "u_first",
    layers: Iterable[nn.Module] | None = None,
) -> M:
    """weight = W / sigma_1(W): `spectral_norm` of all layers, computed before each forward.

    One batched power iteration serves all layers once per forward of `model`. A layer that is
    called twice in a forward therefore takes its steps once. A layer called without `model` takes
    its own steps, as after `spectral_norm`. Small layers share an autograd node, so their gradients
    are computed together.

    Args:
        model: changed in place and returned.
        name, n_power_iterations, eps, order: as in `spectral_norm`.
        layers: the layers; None takes every Linear, ConvNd and ConvTransposeNd of `model`.

    Shapes: weights are (outputs, ...), of any sizes. Cost: as `spectral_norm`, in one call for all
    layers. On CPUs the model keeps the memory of the results.

    Raises: as `spectral_norm`, before any layer is changed; ValueError if there is no layer.

    Source: arXiv:1802.05957.
    """
    op = "spectral_norm_"
    make = maker(op, SpectralNorm, n_power_iterations, eps, order=order)
    return register_together(op, model, name, make, layers)


def maker(
    op: str, kind: type[SpectralNorm], steps: int, eps: float, dim: int | None = None,
    order: str = "u_first", size: Any = None, **more: Any,
) -> Make:  # fmt: skip
    """Check the arguments of `op`; return a function that makes one layer's parametrization."""
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
    """Register the parametrization `layer` and its state-dict names on a module."""
    steps = layer.steps
    # registering accesses the weight once; torch's older hook takes no step at that time
    layer.steps = steps if layer.order == "u_first" else 0
    parametrize.register_parametrization(module, name, layer)
    layer.steps = steps
    StateNames(name, layer.dim, layer.order == "v_first").install(module)


def register_alone(op: str, module: M, name: str, make: Make, min_dim: int = 1) -> M:
    """Register the parametrization of one weight, of at least `min_dim` dimensions."""
    check_free(op, module, name, min_dim)
    register(module, name, make(module, getattr(module, name)))
    return module


def register_together(
    op: str, model: M, name: str, make: Make, layers: Iterable[nn.Module] | None, min_dim: int = 1
) -> M:
    """Register parametrizations of a model's layers, and hooks that compute them together."""
    if layers is None:
        chosen = [m for m in model.modules() if isinstance(m, LAYERS)]
    else:
        chosen = list(dict.fromkeys(layers))
        inside = {id(m) for m in model.modules()}
        for m in chosen:
            if id(m) not in inside:
                raise ValueError(f"{op}: layers must be in the model, got {m}")
    if not chosen:
        raise ValueError(f"{op}: {type(model).__name__} has no layers to normalize")
    for m in chosen:
        check_free(op, m, name, min_dim)
        if parametrize.is_parametrized(m, name):
            raise ValueError(f"{op}: {name!r} of {m} is parametrized already")
    made = [make(m, getattr(m, name)) for m in chosen]
    for m, layer in zip(chosen, made, strict=True):
        register(m, name, layer)
    group = _Group(name, chosen)
    model.register_forward_pre_hook(group.before)
    model.register_forward_hook(group.after, always_call=True)
    return model


def check_free(op: str, module: nn.Module, name: str, min_dim: int) -> None:
    """Raise ValueError or TypeError unless `name` is a weight without a spectral norm."""
    kind = type(module).__name__
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
    """Return the parametrizations of the weight `name`, in order; none: an empty list."""
    lists: Any = module._modules.get("parametrizations", {})
    return list(lists[name]) if name in lists else []


def remove_spectral_norm(module: M, name: str = "weight") -> M:
    """W <- W / sigma_1 as a plain parameter, for a layer or for all layers of a module.

    Undoes `spectral_norm`, `spectral_norm_` and their relatives. No further power step is taken;
    the value is the one that evaluation uses.

    Shapes: weights keep theirs. Cost: one pass over each weight.

    Raises: ValueError if no weight `name` has a spectral norm.

    Source: torch/nn/utils/spectral_norm.py, remove_spectral_norm.
    """
    owners = [m for m in module.modules() if _of(m, name)]
    if not owners:
        raise ValueError(
            f"remove_spectral_norm: {name!r} of {type(module).__name__} has no spectral norm"
        )
    for m in owners:
        _of(m, name)[0].eval()
        lists: Any = m.parametrizations[name]  # type: ignore[index]
        # deep copies share the class, and torch deletes the weight's property from it: use a copy
        kind = type(m)
        m.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
        parametrize.remove_parametrizations(m, name)
        StateNames.remove(m, name)
        for tensors in (lists._parameters, lists._buffers):  # its group then skips this weight
            tensors.pop("original", None)
    for m in module.modules():
        for hooks in (m._forward_pre_hooks, m._forward_hooks):
            for key, hook in list(hooks.items()):
                group = getattr(hook, "__self__", None)
                if isinstance(group, _Group) and not group.find():
                    del hooks[key]
                    getattr(m, "_forward_hooks_always_called", {}).pop(key, None)
    return module


def _of(module: nn.Module, name: str) -> list[SpectralNorm]:
    """Return the spectral norms among the parametrizations of the weight `name`."""
    return [p for p in _parametrizations(module, name) if isinstance(p, SpectralNorm)]


def spectral_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, SpectralNorm]]:
    """Yield (path of the layer, layer, name of the weight, spectral norm) for all of a model."""
    for path, m in model.named_modules():
        for name in getattr(m, "parametrizations", ()):
            for p in _of(m, name):
                yield path, m, name, p


def refresh_vectors_(model: M, steps: int = WARM_UP) -> M:
    """u <- W v / |W v|, v <- W^T u / |W^T u|, `steps` times, in every spectral norm of `model`.

    For copies of a model whose weights are averages (EMA). Averages of u and v are not singular
    vectors, and are too short. Leave u and v out of the average, or call this before using the
    copy.

    Shapes: u and v keep theirs, (outputs,) and (product of the other sizes,). Cost: a pass over
    every weight per step. Source: arXiv:1802.05957; github.com/NCAR/miles-credit also leaves u and
    v out of its averages.
    """
    check.integer("refresh_vectors_", "steps", steps, 1)
    for _, m, name, p in spectral_norms(model):
        original: Any = m.parametrizations[name]  # type: ignore[index]
        p.step(original.original, steps)
    return model


def _shortcut(module: nn.Module, name: str, place: Place) -> None:
    """Make `module.name` return the ready value at `place` directly, if there is one.

    Torch gives a parametrized module its own class, whose property calls the list of
    parametrizations, which calls the first of them. Going around this saves 3 us per layer
    (2026-11).
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
        # results of our parametrization of each layer, and of all parametrizations of each weight
        self.own, self.whole = Results(), Results()
        self.store = Store()
        for i, _, p in self.find():
            p.ready = Place(self.own, i)
            _shortcut(layers[i], name, Place(self.whole, i))

    def find(self) -> list[tuple[int, Any, SpectralNorm]]:
        """Return (index of the layer, its list of parametrizations, ours) for each still there."""
        self.parts = []
        for i, layer in enumerate(self.layers):
            lists: Any = layer._modules.get("parametrizations", NONE)
            x: Any = lists._modules.get(self.name, NONE)
            p = x._modules.get("0")
            if isinstance(p, SpectralNorm):
                self.parts.append((i, x, p))
        return self.parts

    def before(self, *_: Any) -> None:
        """Compute the layers' weights before a forward of the model."""
        self.own.last = self.whole.last = None  # frees their memory, which the next may reuse
        indices, layers, weights = [], [], []
        for i, x, p in self.parts:
            weight = x._parameters.get("original")
            weight = x._buffers.get("original") if weight is None else weight
            # a weight that FSDP still holds in shards is whole only when its layer runs: skip it
            if type(weight) in (nn.Parameter, Tensor):
                indices.append(i)
                layers.append(p)
                weights.append(weight)
        made: list[Tensor | None] = [*normalized(layers, weights, self.store)]
        if len(made) < len(self.layers):
            results = dict(zip(indices, made, strict=True))
            made = [results.get(i) for i in range(len(self.layers))]
        self.own.push(made)
        # further parametrizations act on our result: these weights have no ready final value
        further = {i for i, x, _ in self.parts if len(x._modules) > 1}
        self.whole.push(
            [None if i in further else y for i, y in enumerate(made)] if further else made
        )

    def after(self, *_: Any) -> None:
        """Drop the results of the forward that has ended."""
        self.own.pop()
        self.whole.pop()

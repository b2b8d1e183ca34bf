"""A graphics card that is not there: tensors that say they are on `GPU`, compute on the CPU, and refuse what CUDA does.

As a plug-in of pytest (`-p tests.simulated_gpu`) it makes runs of its process go to the device. Numbers are real.
Tensors of two devices in one operation, CPU generators for draws on the device and `.numpy()` raise what CUDA raises;
kernels, synchronisations and copies are counted, the last two by the line of this project that asked for them.

What it does not show: speed, CUDA's own rounding and its order of sums, 4-bit weights (bitsandbytes' kernels would see
wrapped tensors) and memory. Real tensors lie inside the wrapped ones; a device's name is free, but for "cuda" itself,
which torch without CUDA keeps to itself.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bitsandbytes  # noqa: F401  registers operators of its own while torch is still what it was
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from align.models import varlen

NAME = "simgpu"
OURS = ("/align/", "/reward/", "/data_prep/")
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "squeeze", "unsqueeze"),
    *("alias", "detach", "split", "split_with_sizes", "unbind", "as_strided", "reshape", "_reshape_alias", "narrow"),
    *("chunk", "diagonal", "lift_fresh", "unfold", "empty", "empty_like", "new_empty", "empty_strided"),
    *("new_empty_strided", "_to_copy", "copy_", "_local_scalar_dense"),
}
"""Operations that start no kernel of their own: views, allocations, and what is counted as a copy."""
LOOKS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
"""Operations that wait for the device, since the host must know what they find."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NARROW = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm")
WIDE = (
    *("softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "layer_norm", "rsqrt", "exp", "log"),
    *("pow.Tensor_Scalar", "sum", "sum.dim_IntList", "cumsum", "norm.Scalar"),
)
"""What autocast takes in bfloat16 and in float32 on CUDA, of what is used here."""
DRAWS = ("rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal")
RealGenerator = torch.Generator


@dataclass
class Counts:
    """What has been asked of the device."""

    kernels: Counter[str] = field(default_factory=Counter)
    """By operation."""
    waits: Counter[str] = field(default_factory=Counter)
    """Synchronisations, by operation and line."""
    copies: Counter[str] = field(default_factory=Counter)
    """Of host memory to the device, by line."""
    dtypes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(operation, type of its result), while `census` is on."""

    def taken(self) -> dict[str, int]:
        """The three sums."""
        return {"kernels": self.kernels.total(), "waits": self.waits.total(), "copies": self.copies.total()}


COUNTS = Counts()


@contextmanager
def counted() -> Iterator[Counts]:
    """What is asked of the device inside."""
    global COUNTS
    outer, COUNTS = COUNTS, Counts()
    try:
        yield COUNTS
    finally:
        COUNTS = outer


class Module(_DummyBackendModule):
    """`torch.simgpu`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Generator(RealGenerator):
    """A generator of random numbers that knows which device it is for; below Python it is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class OnDevice(torch.Tensor):
    """A tensor of the device; its numbers are in `host`."""

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=GPU,
        )
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if not isinstance(new, OnDevice):
            raise RuntimeError("incompatible tensor type: data of the device is given a tensor of the host")
        torch.Tensor.data.__set__(self, new)
        self.host = new.host

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                made = self.detach().clone()
            made.requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                made._is_param = True
            memo[id(self)] = made
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"OnDevice({self.host!r})"

    def untyped_storage(self) -> Any:
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        COUNTS.waits[f"tolist {place()}"] += 1
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() to copy it to host memory")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor of the device is pickled")


class Watching(TorchDispatchMode):
    """Sees what makes tensors of the device from none, and what mixes them with others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def place() -> str:
    """The innermost line of this project on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        found = next((name.rindex(each) for each in OURS if each in name and "site-packages" not in name), None)
        if found is not None:
            return f"{name[found + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, on whichever device it belongs to."""
    leaves = tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, OnDevice)]
    name = func._schema.name.rpartition("::")[2]
    asked = kwargs.get("device")
    lands = bool(ours) if asked is None else torch.device(asked).type == NAME
    if not ours and not lands:
        return func(*args, **kwargs)
    others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
    if name not in ("_to_copy", "copy_") and asked is None:  # `empty_like(x, device=...)` takes any x
        refuse_mixed(name, args, others)
    note(func, name, args, ours, lands)
    with _disable_current_modes():
        found = func(*tree_map(to_host, args), **{k: tree_map(to_host, v) for k, v in kwargs.items()})
    return handed_back(func, args, kwargs, found, lands)


def drawing(function: Any) -> Any:
    """A function of torch that draws random numbers: generator and numbers belong to one device, as on CUDA."""

    def drawn(*args: Any, **more: Any) -> Any:
        generator = more.get("generator")
        if generator is not None:
            wanted = next(
                (x.device for x in args if isinstance(x, torch.Tensor)), torch.device(more.get("device", "cpu"))
            )
            if generator.device.type != wanted.type:
                found = f"Expected a '{wanted.type}' device type for generator but found '{generator.device.type}'"
                raise RuntimeError(f"{found} [{function.__name__}] at {place()}")
        return function(*args, **more)

    return drawn


def to_host(x: Any) -> Any:
    """What the CPU computes with in the place of an argument."""
    if isinstance(x, OnDevice):
        return x.host
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == NAME else x
    return x


def refuse_mixed(name: str, args: Any, others: list[torch.Tensor]) -> None:
    """CUDA takes numbers without dimensions from the host, and indices into its tensors; nothing else."""
    wrong = [x for x in others if x.dim() > 0]
    if name in INDEXED and isinstance(args[0], OnDevice):
        given = tree_leaves(args[1])
        for x in wrong:
            COUNTS.copies[f"index {place()}"] += any(x is one for one in given)
        wrong = [x for x in wrong if not any(x is one for one in given)]
    if wrong:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! "
            f"[{name}] at {place()}"
        )


def note(func: Any, name: str, args: Any, ours: list[OnDevice], lands: bool) -> None:
    """Count what an operation costs."""
    if name not in FREE:
        COUNTS.kernels[name] += 1
    masks = name in INDEXED and any(
        isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
    )
    if name in LOOKS or masks or (name == "repeat_interleave" and func._overloadname == "Tensor" and len(args) == 1):
        COUNTS.waits[f"{name} {place()}"] += 1
    elif name == "_to_copy":
        if not ours:
            COUNTS.copies[f"to {place()}"] += 1
        elif not lands:
            COUNTS.waits[f"cpu {place()}"] += 1
        else:
            COUNTS.kernels[name] += 1
    elif name == "copy_":
        kinds = [isinstance(x, OnDevice) for x in args[:2]]
        if kinds == [True, True]:
            COUNTS.kernels[name] += 1
        elif kinds[0] and args[1].dim() > 0:
            COUNTS.copies[f"copy_ {place()}"] += 1
        elif not kinds[0]:
            COUNTS.waits[f"copy_ {place()}"] += 1


def handed_back(func: Any, args: Any, kwargs: dict[str, Any], found: Any, lands: bool) -> Any:
    """Results as tensors of the device; what was written in place as the very argument."""
    wrapped = tree_map(lambda x: OnDevice(x) if lands and type(x) is torch.Tensor else x, found)
    returns = func._schema.returns
    if not any(each.alias_info is not None and each.alias_info.is_write for each in returns):
        if isinstance(found, torch.Tensor):
            COUNTS.dtypes[func._schema.name.rpartition("::")[2], str(found.dtype)] += 1
        return wrapped
    given = {each.name: kwargs.get(each.name) for each in func._schema.arguments}
    given |= {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)}
    written = [
        next(
            (
                given[each.name]
                for each in func._schema.arguments
                if each.alias_info is not None
                and each.alias_info.is_write
                and set(each.alias_info.before_set) & set(out.alias_info.before_set)
                and given[each.name] is not None
            ),
            None,
        )
        if out.alias_info is not None and out.alias_info.is_write
        else value
        for out, value in zip(returns, wrapped if isinstance(wrapped, tuple) else (wrapped,), strict=True)
    ]
    return tuple(written) if isinstance(found, tuple) else written[0]


class Attention(torch.autograd.Function):
    """One kernel forward and two backward, exact on the host."""

    @staticmethod
    def forward(ctx: Any, compute: Any, query: Any, key: Any, value: Any, *more: Any) -> torch.Tensor:
        ctx.given = [x.host.detach().requires_grad_(True) for x in (query, key, value)]
        with torch.enable_grad(), _disable_current_modes():
            ctx.found = compute(*ctx.given, *map(to_host, more))
        COUNTS.kernels["attention"] += 1
        return OnDevice(ctx.found.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        with torch.enable_grad(), _disable_current_modes():
            found = torch.autograd.grad(ctx.found, ctx.given, gradient.host)
        COUNTS.kernels["attention backward"] += 2
        return (None, *(OnDevice(each) for each in found), *[None] * (len(ctx.needs_input_grad) - 4))


_attention = F.scaled_dot_product_attention


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **settings: Any) -> torch.Tensor:
    """`scaled_dot_product_attention`, on either device."""
    settings |= dict(zip(("dropout_p", "is_causal"), args, strict=False))
    tensors = [x for x in (query, key, value, attn_mask) if x is not None]
    if not any(isinstance(x, OnDevice) for x in tensors):
        return _attention(query, key, value, attn_mask, **settings)
    refuse_mixed("scaled_dot_product_attention", tensors, [x for x in tensors if not isinstance(x, OnDevice)])
    if torch.is_autocast_enabled(NAME):
        with torch.autocast(NAME, enabled=False):
            query, key, value = narrowed((query, key, value))
    compute = partial(_attention, **settings)
    return Attention.apply(compute, query, key, value, attn_mask)  # type: ignore[no-untyped-call,no-any-return]


def rows_of_any_length(query: Any, key: Any, value: Any, *more: Any, **settings: Any) -> torch.Tensor:
    """`varlen_attn` of tensors of the device."""
    given = [x for x in (query, key, value, *more) if isinstance(x, torch.Tensor)]
    refuse_mixed("varlen_attn", given, [x for x in given if not isinstance(x, OnDevice)])
    kinds = {x.dtype for x in given}
    if kinds != {torch.bfloat16, torch.int32}:
        raise RuntimeError(f"varlen_attn is given {sorted(map(str, kinds))} (expected bfloat16 and int32)")
    compute = partial(varlen.plain, **settings)
    return Attention.apply(compute, query, key, value, *more)  # type: ignore[no-untyped-call,no-any-return]


def narrowed(tree: Any, to: torch.dtype = torch.bfloat16) -> Any:
    """Floating tensors of the device in another type, float64 aside; what autocast makes of arguments."""
    kinds = (torch.float32, torch.bfloat16)
    return tree_map(lambda x: x.to(to) if isinstance(x, OnDevice) and x.dtype in kinds else x, tree)


def with_autocast() -> list[torch.library.Library]:
    """Give the device autocast: products and sums in the types that CUDA's takes them in."""
    rest, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, kind in ((NARROW, torch.bfloat16), (WIDE, torch.float32)):
        for name in names:
            own.impl(name, _cast(name, kind), "AutocastPrivateUse1")
    return [rest, own]


def _cast(name: str, kind: torch.dtype) -> Any:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def called(*args: Any, **more: Any) -> Any:
        with torch.autocast(NAME, enabled=False):
            return operation(*narrowed(args, kind), **narrowed(more, kind))

    return called


def install() -> None:
    """Make the device, and let runs of this process go to it."""
    global GPU, _KEPT
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
    GPU = torch.device(NAME, 0)
    torch.Generator = Generator  # type: ignore[misc]
    for name in DRAWS:
        setattr(torch, name, drawing(getattr(torch, name)))
    F.scaled_dot_product_attention = attention
    varlen.kernel_for = lambda device, dtype, *_: (  # type: ignore[assignment]
        rows_of_any_length if device.type == NAME and dtype is torch.bfloat16 else None
    )
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    moved = torch.nn.Module.to

    def to(self: Any, *args: Any, **more: Any) -> Any:
        found = moved(self, *args, **more)
        if hasattr(found, "tie_weights"):
            found.tie_weights()
        return found

    torch.nn.Module.to = to  # type: ignore[method-assign]
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # other threads would not see the device
    from accelerate.state import PartialState

    PartialState.default_device = property(lambda self: GPU)
    _KEPT = with_autocast()
    Watching().__enter__()


GPU = torch.device("cpu")
_KEPT: Any = None


def pytest_configure(config: Any) -> None:
    """As a plug-in of pytest."""
    install()

"""A projection that a draft holds by itself, in the format of `formats.py`."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..kernels import cpu, operators
from ..model.projections import is_opaque
from ..model.shared import SharedContext


_MAX_TOKENS = 4  # up to which cats reads rows by themselves: of more most are kept by one or another
_MIN_PRODUCTS = 2**18  # of a token and a weight, below which the call of a kernel takes longer than they do


def run(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Returns module(inputs), the product by a kernel where that is faster.

    Args:
        module: what a draft runs: a projection of the model, or what is held in its place.
        inputs: [..., in_features].
    """
    if is_bare_linear(module):
        outputs = kernel_product(module, inputs)
        if outputs is not None:
            return outputs
    return module(inputs)


def is_bare_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear` with no hook and no other forward over it, which are not passed by."""
    if type(module) is not nn.Linear:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or has_own_forward(module))


def reads_needed(module: nn.Module, num_tokens: int) -> bool:
    """Whether a kernel reads what is needed of a module alone, for so many tokens."""
    if isinstance(module, DraftLinear | PlainLinear):
        return module.reads_needed(num_tokens)
    return is_bare_linear(module) and num_tokens <= _MAX_TOKENS and has_kernel(module)


def read_needed(module: nn.Module, inputs: torch.Tensor, is_needed: torch.Tensor) -> torch.Tensor | None:
    """Returns module(inputs), of which the needed rows are read alone, in place; `None` where no kernel does so.

    Args:
        module, inputs: as for [`run`].
        is_needed: bool [out_features], which outputs are. The others are of no use.
    """
    if not reads_needed(module, inputs.numel() // inputs.shape[-1]):
        return None
    if isinstance(module, DraftLinear | PlainLinear):
        return module(inputs, is_needed)
    return _product(inputs, module.weight, module.bias, is_needed.nonzero().flatten())


def some_outputs(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor
) -> torch.Tensor:
    """Returns outputs [num_tokens, num_rows] of a product, by a kernel that reads these rows in place if there is one.

    Args:
        inputs: [num_tokens, in_features].
        rows: long [num_rows].
    """
    if _is_readable(weight) and (outputs := _product(inputs, weight, bias, rows)) is not None:
        return outputs[:, rows]
    return nn.functional.linear(inputs, weight[rows], None if bias is None else bias[rows])


def kernel_product(linear: nn.Linear, inputs: torch.Tensor) -> torch.Tensor | None:
    """Returns linear(inputs), hooks aside, by a kernel; `None` where there is none, or where torch is faster."""
    # Not by getattr, which takes as long as a small product.
    weight = linear._parameters.get("weight")
    num_tokens = inputs.numel() // inputs.shape[-1]
    is_traced = torch.compiler.is_dynamo_compiling()  # for any number of tokens, of which a graph is not to ask
    if type(weight) is not nn.Parameter or (1 if is_traced else num_tokens) * weight.numel() < _MIN_PRODUCTS:
        return None
    if is_traced:
        is_read = weight.is_cpu and weight.dtype in cpu.DTYPES and _has_kernels()
        return operators.linear(inputs, weight, linear._parameters["bias"]) if is_read else None
    if has_own_forward(linear) or not cpu.is_faster(weight.dtype, num_tokens):
        return None
    return _product(inputs, weight, linear._parameters["bias"]) if has_kernel(linear) else None


@torch.compiler.assume_constant_result  # a graph cannot ask
def _has_kernels() -> bool:
    return cpu.is_available()


def has_kernel(module: nn.Module) -> bool:
    """Whether a kernel reads the weight of a layer as it is."""
    if not isinstance(module, nn.Linear) or is_opaque(module):
        return False
    return _is_readable(module.weight)


def _is_readable(weight: torch.Tensor) -> bool:
    return weight.dtype in cpu.DTYPES and weight.is_cpu and weight.is_contiguous() and cpu.is_available()


def _product(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor | None = None
) -> torch.Tensor | None:
    is_plain = inputs.dtype == weight.dtype and inputs.is_cpu and inputs.numel() > 0
    if not is_plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    outputs = cpu.product(inputs.contiguous(), weight, rows)
    if bias is not None:
        outputs += bias
    return outputs


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has laid a forward over a module, other than [`kernel_products`]."""
    return not isinstance(vars(module).get("forward"), _KernelForward | None)


class _KernelForward:
    """The forward of a layer for the time of a verification."""

    def __init__(self, linear: nn.Linear):
        self.linear, self.num_blocks = linear, 0

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = kernel_product(self.linear, inputs)
        return nn.functional.linear(inputs, self.linear.weight, self.linear.bias) if outputs is None else outputs


_lock = threading.Lock()


def is_kernel_faster(linears: Sequence[nn.Linear], num_tokens: int) -> bool:
    """Whether a kernel takes the products of so many tokens and any of these weights in less time than torch does."""
    weights = [linear._parameters["weight"] for linear in linears]
    dtypes = {weight.dtype for weight in weights if num_tokens * weight.numel() >= _MIN_PRODUCTS}
    return any(cpu.is_faster(dtype, num_tokens) for dtype in dtypes)


@contextlib.contextmanager
def kernel_products(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Within the block, these layers of the dense model take products by a kernel, where that is faster; in other
    threads too. The last block to end leaves nothing on them.
    """
    with _lock:
        mine = [linear for linear in linears if not has_own_forward(linear)]
        for linear in mine:
            vars(linear).setdefault("forward", _KernelForward(linear)).num_blocks += 1
    try:
        yield
    finally:
        with _lock:
            for linear in mine:
                forward = vars(linear).get("forward")
                if isinstance(forward, _KernelForward):
                    forward.num_blocks -= 1
                    if not forward.num_blocks:
                        del vars(linear)["forward"]


class PlainLinear(nn.Linear):
    """A weight that is not packed."""

    def reads_needed(self, num_tokens: int) -> bool:
        return num_tokens <= _MAX_TOKENS and has_kernel(self)

    def forward(self, inputs: torch.Tensor, is_needed: torch.Tensor | None = None) -> torch.Tensor:
        if is_needed is None:
            outputs = kernel_product(self, inputs)
        elif torch.compiler.is_dynamo_compiling():
            outputs = operators.linear(inputs, self.weight, self.bias, is_needed)
        else:
            outputs = _product(inputs, self.weight, self.bias, is_needed.nonzero().flatten())
        return super().forward(inputs) if outputs is None else outputs


class DraftLinear(nn.Module):
    """A projection that the draft holds by itself: takes and returns hidden states of the model's dtype.

    Args:
        linear: may be padded with zeros.
        input_dtypes: those that `linear` takes; others are cast to the first.
        out_features: how many of its outputs are real.
    """

    def __init__(self, linear: nn.Module, input_dtypes: Sequence[torch.dtype], out_features: int):
        super().__init__()
        self.linear, self.device = linear, linear.weight.device
        self.input_dtypes = tuple(input_dtypes)
        self.in_features, self.out_features = linear.in_features, out_features

    def reads_needed(self, num_tokens: int) -> bool:
        """Whether a kernel reads the needed rows of the weight alone, for so many tokens."""
        return hasattr(self.linear, "reads_needed") and self.linear.reads_needed(num_tokens)

    def forward(self, hidden_states: torch.Tensor, is_needed: torch.Tensor | None = None) -> torch.Tensor:
        # What need not be done is not, as small products take no longer than it.
        inputs, linear = hidden_states, self._modules["linear"]
        if inputs.device != self.device:  # as accelerate's hook does; outputs stay, as they do behind it
            inputs = inputs.to(self.device)
        if inputs.dtype not in self.input_dtypes:
            inputs = inputs.to(self.input_dtypes[0])
        if padding := self.in_features - inputs.shape[-1]:
            inputs = nn.functional.pad(inputs, (0, padding))
        # Not called as a module, as it has no hooks, and a small product takes no longer than that.
        outputs = linear.forward(inputs) if is_needed is None else linear.forward(inputs, is_needed)
        if outputs.shape[-1] != self.out_features:
            outputs = outputs[..., : self.out_features]
        return outputs if outputs.dtype == hidden_states.dtype else outputs.to(hidden_states.dtype)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Takes oneDNN out of the way of bfloat16 drafts on a CPU.

    torch hands such a product to oneDNN where the processor has bfloat16 instructions, which for a single token took
    1.7 times as long as torch's own kernel does.
    """
    was_enabled = torch.backends.mkldnn.enabled
    # Not by `set_flags`, which sets the precision of float32 products as well.
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def is_native_faster(module: nn.Module) -> bool:
    """Whether what a draft holds is a weight in bfloat16, on a CPU, as it is, which no kernel reads."""
    if cpu.is_available():  # asked of all that a draft holds, which `has_kernel` takes too long for
        return False
    linear = getattr(module, "linear", module)
    weight = getattr(linear, "weight", None)
    return isinstance(linear, nn.Linear) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


native_products = SharedContext(_without_onednn)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def plain_over(linear: nn.Linear) -> PlainLinear:
    """Returns a layer over the same parameters that takes its products by a kernel, where that is faster."""
    plain = PlainLinear(linear.in_features, linear.out_features, device="meta")
    plain._parameters = linear._parameters
    return plain


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> PlainLinear:
    out_features, in_features = weight.shape
    linear = PlainLinear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = frozen(weight)
    if bias is not None:
        linear.bias = frozen(bias)
    return linear

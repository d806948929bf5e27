"""What a projection is, torch's own or quantized by whatever library, and how a weight that does not lie open is read:
out of the layer's own product.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers.pytorch_utils import Conv1D

from .accelerate_hooks import bare_copy, streaming_hook
from .adapters import base_layer


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_projection(module: Any) -> bool:
    """Whether a module multiplies with a weight: torch's and transformers' own, and the layers of libraries that
    quantize, which have the sizes of an `nn.Linear`. Adapters have these too, but hold the layer that they adapt.
    """
    if is_router(module):
        return False
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return (
        isinstance(module, nn.Module)
        and all(type(getattr(module, name, None)) is int for name in ("in_features", "out_features"))
        and not any(True for _ in module.children())
    )


def is_router(module: Any) -> bool:
    """Whether a module chooses the experts of each token, which drafts leave as it is, with all that it has."""
    return type(module).__name__.endswith("Router")


def projection_shape(projection: nn.Module) -> tuple[int, int]:
    """Returns (out_features, in_features), which the weight of a 4-bit layer does not tell; of an adapted layer too."""
    projection = base_layer(projection)
    if isinstance(projection, Conv1D):
        return projection.nf, projection.nx
    return projection.out_features, projection.in_features


def is_opaque(projection: nn.Module) -> bool:
    """Whether the weight of a projection lies neither open, as plain numbers, nor as bitsandbytes has it."""
    if type(projection).__module__.startswith("bitsandbytes."):
        return False
    weight = getattr(projection, "weight", None)
    if type(weight) not in (nn.Parameter, torch.Tensor):
        return True
    out_features, in_features = projection_shape(projection)
    shape = (in_features, out_features) if isinstance(projection, Conv1D) else (out_features, in_features)
    return weight.dtype not in _FLOATS or tuple(weight.shape) != shape


def is_quantized(projection: nn.Module) -> bool:
    """Whether some library, bitsandbytes or another one, has quantized a projection."""
    return is_opaque(projection) or type(projection).__module__.startswith("bitsandbytes.")


def projection_bias(projection: nn.Module) -> torch.Tensor | None:
    """Returns the bias of a projection, which may be a buffer, or `None`."""
    return getattr(projection, "bias", None)


def plain_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the parameters and buffers of a module. Those that a library has packed into a tensor of its own class
    come as the tensors that they are made of.
    """
    if module._modules:
        waiting = [*module.parameters(), *module.buffers()]
    else:  # asked of every layer in every call, which the generators take too long for
        own = (*module._parameters.values(), *module._buffers.values())
        waiting = [tensor for tensor in own if tensor is not None]
    while waiting:
        tensor = waiting.pop(0)
        if hasattr(tensor, "__tensor_flatten__"):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            waiting = [part for part in parts if part is not None] + waiting
        else:
            yield tensor


def device_of(projection: nn.Module) -> torch.device:
    """Returns where a projection computes."""
    hook = streaming_hook(projection)
    return next(plain_tensors(projection)).device if hook is None else torch.device(hook.execution_device)


def compute_dtype(projection: nn.Module) -> torch.dtype | None:
    """Returns the dtype that a projection computes in: that of its weight, or else of its bias or scales; `None` for
    bitsandbytes' layers without a bias.
    """
    tensors = (getattr(projection, "weight", None), *projection.parameters(), *projection.buffers())
    dtypes = [tensor.dtype for tensor in tensors if getattr(tensor, "dtype", None) in _FLOATS]
    if not dtypes and is_opaque(projection):
        return getattr(projection, "compute_dtype", None) or torch.get_default_dtype()
    return next(iter(dtypes), None)


@torch.no_grad()
def products_of_columns(projection: nn.Module, start: int, stop: int) -> torch.Tensor:
    """Returns columns `start` to `stop` of the weight of a quantized layer, transposed: [stop - start, out_features].
    They are the layer's outputs for rows of the identity.
    """
    _, in_features = projection_shape(projection)
    inputs = torch.zeros(stop - start, in_features)
    inputs.diagonal(start).fill_(1)
    return product_without_bias(projection, inputs)


@torch.no_grad()
def product_without_bias(projection: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the outputs of a quantized layer for inputs [num_rows, in_features], past hooks and without its bias.

    Raises:
        `ValueError` if the layer cannot compute them.
    """
    copy = bare_copy(projection)
    if (bias := projection_bias(projection)) is not None:
        # Not taken off the outputs, where the sum of both has been rounded.
        places = (copy._parameters, copy._buffers, copy.__dict__)
        next((place for place in places if "bias" in place), copy.__dict__)["bias"] = torch.zeros_like(bias)
    try:
        outputs = copy.forward(inputs.to(device_of(projection), compute_dtype(projection)))
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if should_reduce_batch_size(error):  # the device is full, which says nothing about the layer
            raise
        raise ValueError(f"{unreadable(projection)} ({type(error).__name__}: {error})") from error
    if outputs.shape != (len(inputs), projection_shape(projection)[0]):
        raise ValueError(f"{unreadable(projection)} (its outputs are of shape {list(outputs.shape)})")
    return outputs


def unreadable(projection: nn.Module) -> str:
    """Says that the weight of a layer cannot be read, and what to do."""
    return (
        f"hf_sirius cannot read the weight of a {type(projection).__module__}.{type(projection).__name__}: draft by "
        "method='cats', or method='teal' with weighting='magnitude', with a density below 1 and without a draft_dtype, "
        "which read none, or load the model unquantized or quantized by another library, such as with "
        "BitsAndBytesConfig"
    )

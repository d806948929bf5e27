"""A head for drafts: a sketch of few columns scores all tokens, and the model's own rows score the likeliest again."""

import weakref
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels import operators
from ..model.accelerate_hooks import execution_device
from ..model.encoder_decoder import encoder_states
from ..model.observation import evaluating, uncompiled
from ..model.projections import is_opaque, is_projection, is_quantized
from .gather import Selection, padded
from .linear import DraftLinear, frozen, plain_linear, some_outputs
from .packed import int8_bytes, int8_linear


SHORTLIST = "shortlist"
_NUM_INPUTS = 512  # hidden states from which a sketch learns which of their directions matter
_LENGTH = 8  # tokens of the texts that have them
_RIDGE = 0.01
_NUM_ROWS = 2**14  # of the head, from which a sketch learns what tells tokens apart
_NUM_ITERATIONS = 4


class ShortlistHead(nn.Module):
    """Stands in for a head W [vocab_size, hidden_size] in drafts.

    The sketch is the matrix of its rank that is nearest to W on average over the head's inputs h, by E||(W - S)h||^2:
    with E[h h^T] = L L^T and P the leading eigenvectors of L^T W^T W L it is W L P (P^T L^-1) (SVD-LLM, arXiv
    2403.07378, section 3.2). The tokens that it finds likeliest have the logits of the head itself, which is read in
    place; the others keep those of the sketch.

    Args:
        head: of the dense model, in memory.
        inputs: [num_inputs, hidden_size], hidden states such as the head reads.
    """

    def __init__(self, head: nn.Linear, inputs: torch.Tensor):
        super().__init__()
        self._head = weakref.ref(head)  # whose weight is to go when the model is cast or moved
        self.device, self.input_dtypes = head.weight.device, (head.weight.dtype,)
        inputs = inputs.to(self.device, torch.float32)
        inputs = inputs[inputs.isfinite().all(dim=-1)]  # in float16 some may not be
        with torch.autocast(self.device.type, enabled=False):  # which has no decompositions
            left, right = _factors(head.weight.detach(), inputs, _rank(head.in_features))
            self.sketch = _sketch(head, left)
        self.right = frozen(right)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = hidden_states.flatten(0, -2)
        if inputs.device != self.device:  # as for a `DraftLinear`
            inputs = inputs.to(self.device)
        logits = self.sketch(inputs.float() @ self.right)
        head = self._head()
        rescored = torch.ops.hf_sirius.rescored if torch.compiler.is_dynamo_compiling() else _rescored
        bias = None if head.bias is None else head.bias.detach()
        logits = rescored(logits, inputs, head.weight.detach(), bias)
        return logits.view(*hidden_states.shape[:-1], -1).to(hidden_states.dtype)


def _rescored(
    logits: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns logits, [num_tokens, vocab_size], after those of the likeliest tokens are made a head's own, in place."""
    for i, token_ids in enumerate(likeliest(logits)):
        logits[i, token_ids] = some_outputs(inputs[i : i + 1], weight, bias, token_ids)[0].to(logits.dtype)
    return logits


operators.define(
    "rescored(Tensor logits, Tensor inputs, Tensor weight, Tensor? bias) -> Tensor",
    lambda logits, *head: _rescored(logits.clone(), *head),
    lambda logits, *_: torch.empty_like(logits),
)


def likeliest(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields for each row of logits [num_tokens, vocab_size] the ids of about a fiftieth, those with the largest."""
    num_exact = _num_exact(logits.shape[1])
    # The largest of some tokens tell how large those of all are, in a fifth of the time.
    stride = max(1, num_exact // 64)
    cutoffs = logits[:, ::stride].topk(num_exact // stride, dim=-1).values[:, -1:]
    for is_likely in logits >= cutoffs:
        yield is_likely.nonzero().flatten()


def _num_exact(vocab_size: int) -> int:
    return min(max(vocab_size // 48, 64), vocab_size)


def _rank(hidden_size: int) -> int:
    return min(padded(hidden_size // 4, 64), hidden_size)


def _factors(weight: torch.Tensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns L P and (P^T L^-1)^T, float32 [hidden_size, rank] each."""
    moments = inputs.T @ inputs / max(len(inputs), 1)
    # A ridge, as there may be more directions than inputs.
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean().clamp_min(1e-6))
    root = torch.linalg.cholesky(moments)
    some_rows = weight[:: max(1, len(weight) // _NUM_ROWS)].float() @ root
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)
    for _ in range(_NUM_ITERATIONS):
        basis = torch.linalg.qr(some_rows.T @ (some_rows @ basis)).Q
    return root @ basis, torch.linalg.solve_triangular(root.T, basis, upper=True)


def _sketch(head: nn.Linear, left: torch.Tensor) -> DraftLinear:
    bias = None if head.bias is None else head.bias.detach()
    weight = torch.cat([piece.float() @ left for piece in head.weight.detach().split(_NUM_ROWS)])
    if weight.device.type == "cpu":
        return int8_linear(Selection(weight), bias)
    dtype = torch.bfloat16
    return DraftLinear(plain_linear(weight.to(dtype), bias if bias is None else bias.to(dtype)), [dtype], len(weight))


def num_bytes(head: nn.Linear) -> int:
    """Returns the bytes of a [`ShortlistHead`], in which the head's own rows do not count."""
    vocab_size, hidden_size = head.weight.shape
    rank = _rank(hidden_size)
    on_cpu, has_bias = head.weight.device.type == "cpu", head.bias is not None
    sketch = int8_bytes(vocab_size, rank, has_bias) if on_cpu else 2 * vocab_size * (rank + has_bias)
    return sketch + 4 * hidden_size * rank


def num_exact_bytes(head: nn.Linear) -> int:
    """Returns the bytes of the head's own rows that a draft step of a [`ShortlistHead`] reads."""
    return _num_exact(head.out_features) * head.weight.shape[1] * head.weight.itemsize


def num_read(head: nn.Linear) -> int:
    """Returns how many numbers a draft step reads of a [`ShortlistHead`], the head's own rows included."""
    vocab_size, hidden_size = head.weight.shape
    return (vocab_size + hidden_size) * _rank(hidden_size) + _num_exact(vocab_size) * hidden_size


def has_shortlist(head: nn.Module | None) -> bool:
    """Whether rows of a model's head can be read, in memory."""
    return type(head) is nn.Linear and not is_opaque(head) and not head.weight.is_meta


def check_head(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model without a head of which a [`ShortlistHead`] can be made."""
    head = model.get_output_embeddings()
    if has_shortlist(head):
        return
    if head is None:
        what = "no head"
    elif is_projection(head) and is_quantized(head):
        what = f"one that a library has quantized (a {type(head).__module__}.{type(head).__name__})"
    elif type(head) is not nn.Linear:
        what = f"one of type {type(head).__module__}.{type(head).__name__}, which is no torch.nn.Linear"
    else:
        what = "one that is offloaded"
    raise ValueError(
        f"draft_head='shortlist' reads rows of the head's weight in memory, but {type(model).__name__} has {what}: use "
        "draft_head='full'"
    )


@torch.no_grad()
def head_inputs(model: PreTrainedModel) -> torch.Tensor:
    """Returns hidden states such as the model's head reads, of short texts of random tokens, [512, hidden_size]."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocab_size, (_NUM_INPUTS // _LENGTH, _LENGTH), generator=generator)
    device, decoder, beside = execution_device(model), model.get_decoder(), {}
    if model.config.is_encoder_decoder:
        decoder, beside = (
            decoder.base_model,
            {"encoder_hidden_states": encoder_states(model, len(token_ids)).to(device)},
        )
    with evaluating(model), uncompiled(model):
        outputs = decoder(input_ids=token_ids.to(device), use_cache=False, **beside)
    return outputs.last_hidden_state.flatten(0, 1)

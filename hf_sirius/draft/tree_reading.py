"""How a forward reads the nodes of a tree.

They are read as one sequence over the shared KV-cache. A mask lets each see the context and its own ancestors alone,
and positions go by depth, so each has the logits that it would have at the end of its own path.
"""

import inspect
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..model.accelerate_hooks import execution_device
from ..model.compat import DummyLayer
from ..model.encoder_decoder import text_input, text_inputs
from ..model.observation import evaluating
from ..model.stock import stock_class
from .cache import RoomyLayer, text_cache
from .tree import Tree


ATTENTIONS = ("sdpa", "eager")  # the implementations that take such a mask
# model -> the one with which it was seen to read a tree
_readers: "WeakKeyDictionary[PreTrainedModel, str]" = WeakKeyDictionary()


class TreeReader:
    """Makes the inputs of forwards over a tree's nodes, which come behind the context that a KV-cache holds now.

    Args:
        model: the dense model or its twin.
        cache: holds all verified tokens but the last.
        root_position: long [..., 1, 1], the position id of the last verified token.
        attention_mask: long [1, length] of all verified tokens, or `None` without padding.

    Raises:
        `ValueError` for a KV-cache whose layers cannot hold a tree.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, root_position: torch.Tensor, attention_mask: torch.Tensor | None
    ):
        self.model, self.dtype = model, model.dtype
        self.root_position = root_position
        self.attention_mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        self.contexts: dict[str, tuple[int, float]] = {}
        # Windows are the model's, also where the cache was made without its config and keeps everything.
        stock_layers = DynamicCache(config=model.config).layers
        for layer, stock in zip(cache.layers, stock_layers, strict=False):
            if isinstance(layer, DummyLayer):  # which shares the states of another one
                continue
            if type(layer) not in (DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer):
                raise ValueError(
                    f"a tree cannot be drafted into a KV-cache with a {type(layer).__name__}: use tree_width=1, or the "
                    "default DynamicCache"
                )
            name = "sliding_attention" if stock.is_sliding else "full_attention"
            self.contexts[name] = (layer.keys.shape[-2], stock.sliding_window if stock.is_sliding else math.inf)

    def inputs(self, tree: Tree, first: int, given: dict) -> dict:
        """Returns the inputs of a forward that reads the nodes from `first` on; those before are in the cache.

        Args:
            given: the inputs that the model's own `prepare_inputs_for_generation` made for verified tokens.
        """
        device = self.root_position.device
        token_ids = torch.tensor([tree.token_ids[first:]], device=device)
        depths = torch.tensor(tree.depths, device=device)
        inputs = {
            **given,
            text_input(self.model, "input_ids"): token_ids,
            text_input(self.model, "position_ids"): self.root_position + depths[first:],
            text_input(self.model, "attention_mask"): self._masks(tree.lineage(first), depths, first),
        }
        num_nodes = token_ids.shape[1]
        if inputs.get("logits_to_keep") is not None:
            inputs["logits_to_keep"] = num_nodes
        if (token_types := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = token_types[:, -1:].expand(-1, num_nodes)
        if inputs.get("cache_position") is not None:  # transformers 5.17
            inputs["cache_position"] = inputs["cache_position"][:1] + torch.arange(num_nodes, device=device)
        return inputs

    def chain_masks(self, num_read: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Returns the masks of tokens that follow one another, as those of a tree without branches."""
        lineage = torch.ones(num_read, num_read, dtype=torch.bool).tril()
        return self._masks(lineage, torch.arange(num_read, device=self.root_position.device), 0)

    def _masks(self, lineage: torch.Tensor, depths: torch.Tensor, first: int) -> torch.Tensor | dict[str, torch.Tensor]:
        masks = {name: self._mask(lineage, depths, first, *context) for name, context in self.contexts.items()}
        # Several kinds of layers take a mask each, by name.
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(
        self, lineage: torch.Tensor, depths: torch.Tensor, first: int, num_context: int, window: float
    ) -> torch.Tensor:
        """Returns the additive mask, [1, 1, num_read, num_context + num_nodes], of the nodes from `first` on.

        Args:
            lineage: bool [num_read, num_nodes], what each sees of the nodes.
            depths: long [num_nodes].
        """
        device = depths.device
        distances = depths[first:, None] + torch.arange(num_context, 0, -1, device=device)
        context = distances < window
        if self.attention_mask is not None:
            # The last verified token is the root, and a window holds the last ones of the rest.
            end = self.attention_mask.shape[1] - 1
            context = context & self.attention_mask[:, end - num_context : end].to(device)
        nodes = lineage.to(device) & (depths[first:, None] - depths < window)
        allowed = torch.cat([context, nodes], dim=-1)[None, None]
        return torch.zeros(allowed.shape, dtype=self.dtype, device=device).masked_fill_(
            ~allowed, torch.finfo(self.dtype).min
        )


def keep_rows(outputs, num_read: int, kept: torch.Tensor) -> None:
    """Leaves of what a forward returned for a tree's nodes the rows of some, as if it had read these alone."""

    def rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.index_select(dim, kept.to(tensor.device))

    outputs.logits = rows(outputs.logits, 1)
    for name in ("hidden_states", "decoder_hidden_states"):
        if outputs.get(name) is not None:
            setattr(outputs, name, tuple(rows(states, 1) for states in outputs[name]))
    if outputs.get("cross_attentions") is not None:
        outputs.cross_attentions = tuple(rows(weights, 2) for weights in outputs.cross_attentions)
    for name in ("attentions", "decoder_attentions"):
        if outputs.get(name) is not None:
            own = (
                None if weights is None
                else torch.cat([rows(weights, 2)[..., :-num_read], rows(rows(weights, 2)[..., -num_read:], 3)], dim=-1)
                for weights in outputs[name]
            )  # fmt: skip
            setattr(outputs, name, tuple(own))


@torch.no_grad()
def check_tree(model: PreTrainedModel) -> None:
    """Raises `ValueError` if a model cannot read a tree: its attention takes no mask, or its positions are fixed.

    A branch that is read beside another one, behind what a KV-cache holds, must have the logits that it has alone.
    """
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTIONS:
        raise ValueError(
            f"tree drafting needs an attention that takes a mask, one of {list(ATTENTIONS)}, and this model has "
            f"{attention!r}: load it with attn_implementation='sdpa', or use tree_width=1"
        )
    if "local" in getattr(model.config, "attention_layers", ()):
        raise ValueError(
            f"{type(model).__name__} counts the windows of its local attention by itself, which a tree's nodes would "
            "fill: use tree_width=1"
        )
    if _readers.get(model) == attention:
        return
    if (
        model.config.is_encoder_decoder
        and "decoder_position_ids" not in inspect.signature(stock_class(model).forward).parameters
    ):
        raise ValueError(
            f"{type(model).__name__} counts the positions of its text by itself, while branches of a tree share them: "
            "use tree_width=1"
        )
    context, root, branches = [1, 2, 3], 4, [[5, 6], [7, 8]]
    try:
        with evaluating(model):  # without dropout
            right = _read(model, [root, *branches[1]], _cache_of(model, context))[-1]
            wrong = _read(model, [root, *branches[0], *branches[1]], _cache_of(model, context))[-1]
            tree = Tree(_token_id(model, root))
            for first, second in branches:
                tree.add(tree.add(0, _token_id(model, first), 0.0), _token_id(model, second), 0.0)
            cache = _cache_of(model, context)
            given = _given(model, [*context, root], cache)
            reader = TreeReader(model, text_cache(cache), given[text_input(model, "position_ids")], None)
            inputs = reader.inputs(tree, 0, given)
            outputs = model(**inputs, return_dict=True)
            found = outputs.logits[0, -1].double()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
        if should_reduce_batch_size(error):  # the device is full, which says nothing about trees
            raise
        raise ValueError(
            f"{type(model).__name__} cannot read a tree of drafts ({type(error).__name__}: {error}): use tree_width=1"
        ) from error
    if (found - right).norm() > 0.1 * (wrong - right).norm():
        raise ValueError(
            f"{type(model).__name__} cannot read a tree of drafts, as it takes no mask or no positions of the caller's "
            "(ALiBi, for one, fixes them): use tree_width=1"
        )
    _readers[model] = attention


def _token_id(model: PreTrainedModel, number: int) -> int:
    size = model.config.get_text_config().vocab_size
    return (size // 2 + number) % size


def _token_ids(model: PreTrainedModel, numbers: Sequence[int]) -> torch.LongTensor:
    return torch.tensor([[_token_id(model, number) for number in numbers]], device=execution_device(model))


def _cache_of(model: PreTrainedModel, numbers: Sequence[int]) -> Cache:
    """Returns a KV-cache that holds made-up tokens: prompts may be read otherwise than what follows."""
    cache = DynamicCache(config=model.config)
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
    cache.activate_past_recording()
    _read(model, numbers, cache)
    return cache


def _given(model: PreTrainedModel, numbers: Sequence[int], cache: Cache) -> dict:
    """Returns the inputs of the last of some made-up tokens, as the model itself prepares them: PaliGemma, for one,
    counts positions from 1.
    """
    positions = torch.arange(len(numbers), device=execution_device(model))[None]
    inputs = text_inputs(model, _token_ids(model, numbers))
    input_ids = inputs.pop(text_input(model, "input_ids"))
    name = text_input(model, "position_ids")
    given = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=1, is_first_iteration=False, past_key_values=cache, use_cache=True,
        **inputs, **{name: positions},
    )  # fmt: skip
    return {name: positions[:, -1:], **given, "past_key_values": cache}


def _read(model: PreTrainedModel, numbers: Sequence[int], cache: Cache) -> torch.Tensor:
    """Returns the logits of a sequence of made-up tokens, [length, vocab_size]."""
    inputs = {**text_inputs(model, _token_ids(model, numbers)), "past_key_values": cache, "use_cache": True}
    return model(**inputs, return_dict=True).logits[0].double()

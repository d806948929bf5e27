"""Where a model's positions end, or are encoded anew, which no draft may go past."""

import math
from typing import Any

from transformers import Cache, PreTrainedConfig


_NUMBERS = ("max_position_embeddings", "max_target_positions", "max_decoder_position_embeddings")


class Positions:
    """The limits of a model's positions. In one forward all tokens are encoded by the length that it ends at, so that a
    draft and its verification are to stay on one side of each.

    Args:
        config: of the text model.
    """

    def __init__(self, config: PreTrainedConfig):
        # Numbers of positions, and whether drafts may go on behind them.
        self.limits: list[tuple[int, bool]] = []
        rope = getattr(config, "rope_parameters", None) or {}
        # Encoder-decoders may have a number for each side, or none of this name.
        numbers = [getattr(config, name, None) for name in _NUMBERS]
        num_positions = min((number for number in numbers if number), default=None)
        if not rope and num_positions:  # a table, or a bias that knows no end and takes no harm
            self.limits.append((num_positions, False))
        for parameters in [rope] if "rope_type" in rope else rope.values():  # or those of each kind of layer
            rope_type = (parameters or {}).get("rope_type", "default")
            if "dynamic" in rope_type:  # whose frequencies follow every length
                self.limits.append((num_positions, False))
            elif rope_type == "longrope":
                self.limits.append((parameters["original_max_position_embeddings"], True))
        # Where Phi-3 reads all of it again, and the token behind it.
        if num_original := getattr(config, "original_max_position_embeddings", None):
            self.limits.append((num_original, True))

    def most_drafted(self, model_kwargs: dict[str, Any], cache: Cache) -> float:
        """Returns how many tokens may be drafted behind the last verified one, which the cache does not hold yet."""
        if not self.limits:
            return math.inf
        places = [cache.get_seq_length()]
        if (position_ids := model_kwargs.get("position_ids")) is not None:
            places.append(int(position_ids[..., -1].max()))
        most = math.inf
        for limit, goes_on in self.limits:
            for place in places:
                if place <= limit or not goes_on:
                    most = min(most, max(0, limit - 1 - place))
        return most

"""What became of each token of a call, for the demo, the report and apps."""

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from textwrap import shorten
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..decode.sparse_twin import SparseTwin
from ..decode.stats import Cycle, GenerationStats
from ..decode.summary import as_html, as_text, summarize
from ..model.accelerate_hooks import execution_device
from ..reasoner import reasoner_path


# What may become of a token, and the words for it.
FATES = {
    "kept": "drafted and kept",
    "own": "the full model's own",
    "rolled_back": "drafted and rolled back",
    "branch": "of a branch that lost",
}


@dataclasses.dataclass(frozen=True)
class TracedToken:
    """One token of a call.

    Attributes:
        token_id: its id.
        text: what it adds to the text before it; "" for a special token, and for the first tokens of a character that
            takes several.
        name: of a special token in the vocabulary, else "".
        fate: what became of it. `"kept"`: drafted and kept; `"own"`: the full model's own; `"rolled_back"`: drafted and
            rolled back; `"branch"`: of a continuation of a tree that lost.
        likelihood: the full model's likelihood of it, as in [`Cycle`]; `None` where the model was not asked.
        cycle: the number of its cycle, from 1 on; 0 for the token after the prefill.
        position: how many tokens of the output, or of its continuation, come before it.
        branch: for `"branch"` the number of its continuation, in the order of [`Branches`]; else `None`.
        after: for the first token of a branch the text of its continuation up to there; else "".
    """

    token_id: int
    text: str
    name: str
    fate: str
    likelihood: float | None
    cycle: int
    position: int
    branch: int | None = None
    after: str = ""

    @property
    def is_output(self) -> bool:
        """Whether it is part of the output."""
        return self.fate in ("kept", "own")


@dataclasses.dataclass(frozen=True)
class Trace:
    """A call, token by token; made by [`trace`].

    Attributes:
        model_name: of the full model, as it was loaded.
        prompt: the text of the prompt.
        tokens: all tokens that were written, cycle by cycle; see [`TokenTracer`] for their order.
        measures: of the call, `GenerationStats.as_dict()`.
        config: the settings, `SiriusConfig.to_dict()`.
        seconds: `GenerationStats.seconds()`.
    """

    model_name: str
    prompt: str
    tokens: tuple[TracedToken, ...]
    measures: dict[str, Any]
    config: dict[str, Any]
    seconds: dict[str, float | None] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        """The output, without special tokens."""
        return "".join(token.text for token in self.tokens if token.is_output)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return {"text": self.text, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return as_text(self._summary())

    def _repr_html_(self) -> str:
        return as_html(self._summary())

    def _summary(self) -> tuple[str, list[tuple[str, str]]]:
        head, rows = summarize(self.measures, self.seconds)
        settings = f"{self.model_name}, {self.config['method']} {self.config['density']}"
        return head, [("model", settings), ("output", repr(shorten(self.text, 120))), *rows]


def trace(
    sparse: SparseTwin, tokenizer: PreTrainedTokenizerBase, prompt: str | Mapping[str, torch.Tensor], **generate_options
) -> Trace:
    """Generates with a sparse twin and its full model, and tells what became of each token.

        sparse = make_sparse(model, method="griffin")
        trace(sparse, tokenizer, "Question: ...", max_new_tokens=100).to_dict()

    Use the twin for no other call meanwhile: `sparse.stats` is that of the latest one.

    Args:
        sparse: made by [`make_sparse`].
        prompt: a text, or what the tokenizer makes of one: `input_ids`, long [1, length], with or without an
            `attention_mask`.
        generate_options: further options of stock `generate`.

    Raises:
        TypeError: if `sparse` is no sparse twin or the prompt is of neither kind.
        ValueError: for a prompt without `input_ids`, or if an assistant is given; and what `generate` raises.
    """
    if not isinstance(sparse, SparseTwin):
        raise TypeError(f"trace takes a sparse twin, which make_sparse(model) returns, got {type(sparse).__name__}")
    if "assistant_model" in generate_options:
        raise ValueError("assistant_model was given to trace, whose assistant is the sparse twin: leave it out")
    model = sparse.dense_model
    if isinstance(prompt, str):
        inputs, text = tokenizer(prompt, return_tensors="pt"), prompt
    elif isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise ValueError(f"a prompt of tensors must have input_ids, got {sorted(prompt)}")
        inputs, text = prompt, _prompt_text(tokenizer, prompt)
    else:
        raise TypeError(f"prompt must be a text or what a tokenizer returns, got {type(prompt).__name__}")
    inputs = {name: value.to(execution_device(model)) for name, value in inputs.items()}
    model.generate(**inputs, assistant_model=sparse, **generate_options)
    return Trace(
        model_name=_name(model),
        prompt=text,
        tokens=tuple(TokenTracer(tokenizer).tokens(sparse.stats)),
        measures=sparse.stats.as_dict(),
        config=sparse.sirius_config.to_dict(),
        seconds=sparse.stats.seconds(),
    )


def _prompt_text(tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, torch.Tensor]) -> str:
    """Returns the text of a prompt with its special tokens (those of a chat template), without its padding."""
    ids = inputs["input_ids"][0]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == inputs["input_ids"].shape:
        ids = ids[mask[0].bool()]
    return tokenizer.decode(ids)


def _name(model) -> str:
    name = model.config._name_or_path
    if name == reasoner_path():
        return "reasoner"
    if os.path.isdir(name):
        return os.path.basename(os.path.normpath(name))
    return name or type(model).__name__


class TokenTracer:
    """Yields the tokens of one call in the order in which to show them, when it has ended or while it runs.

    In each cycle come those of its draft that were kept, those that were rolled back, the losing continuations of a
    tree (only where they part from what was shown), and the full model's own. The texts of `"kept"` and `"own"` tokens
    put together are the text of the output, without special tokens. Where sentencepiece's bytes make no character,
    those around them that do have their text nevertheless.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._output = _Decoder(tokenizer)
        self._num_told = 0  # the prefill's token and the cycles
        self._length = 0  # tokens of the output so far

    def tokens(self, stats: GenerationStats, is_running: bool = False) -> Iterator[TracedToken]:
        """Yields the tokens that the call has written since the last time.

        Args:
            stats: the call's.
            is_running: whether more may come. If not, the last token has what there is of an unfinished character.
        """
        cycles = list(stats.cycles)
        if stats.first_id is None:
            return
        for number in range(self._num_told, len(cycles) + 1):
            is_last = number == len(cycles) and not is_running
            if number:
                yield from self._cycle(number, cycles[number - 1], is_last)
            else:
                yield self._token(self._output, stats.first_id, is_last, "own", stats.first_likelihood, 0)
            self._num_told = number + 1

    def _cycle(self, number: int, cycle: Cycle, is_last: bool) -> Iterator[TracedToken]:
        ids, likelihoods, num_kept = cycle.drafted_ids, cycle.likelihoods, cycle.num_accepted
        # A draft may end with EOS or at a criterion. Stock code counts that drafted token as the bonus token.
        ends_drafted = num_kept < len(ids) and ids[num_kept] == cycle.bonus_id
        num_kept += ends_drafted
        before, start = copy.copy(self._output), self._length
        for i in range(num_kept):
            ends = is_last and ends_drafted and i == num_kept - 1
            yield self._token(self._output, ids[i], ends, "kept", likelihoods[i], number)
        lost = copy.copy(self._output)
        for i in range(num_kept, len(ids)):
            yield self._token(lost, ids[i], i == len(ids) - 1, "rolled_back", likelihoods[i], number, start + i)
        if cycle.branches is not None:
            yield from self._branches(number, cycle, before, start)
        if not ends_drafted:
            yield self._token(self._output, cycle.bonus_id, is_last, "own", cycle.bonus_likelihood, number)

    def _branches(self, number: int, cycle: Cycle, before: "_Decoder", start: int) -> Iterator[TracedToken]:
        leaves = cycle.branches.leaf_ids
        shown = {cycle.drafted_ids[: i + 1] for i in range(len(cycle.drafted_ids))}
        for branch, (ids, likelihoods) in enumerate(zip(leaves, cycle.branches.leaf_likelihoods, strict=True)):
            decoder, after = copy.copy(before), ""
            for i, (token_id, likelihood) in enumerate(zip(ids, likelihoods, strict=True)):
                is_end = i == len(ids) - 1
                if ids[: i + 1] in shown:
                    after += decoder.add(token_id, is_end)
                    continue
                shown.add(ids[: i + 1])
                yield self._token(
                    decoder, token_id, is_end, "branch", likelihood, number, start + i, branch=branch, after=after
                )
                after = ""

    def _token(
        self, decoder: "_Decoder", token_id: int, is_end: bool, fate: str, likelihood: float | None, cycle: int,
        position: int | None = None, **fields,
    ) -> TracedToken:  # fmt: skip
        """Returns a token that follows what `decoder` has read; without a position, it comes next in the output."""
        if position is None:
            position, self._length = self._length, self._length + 1
        text = decoder.add(token_id, is_end)
        is_special = not text and not decoder.decode((token_id,))
        name = decoder.tokenizer.decode([token_id]) if is_special else ""
        return TracedToken(token_id, text, name, fate, likelihood, cycle, position, **fields)


class _Decoder:
    """Finds what each further token adds to a text, its leading space included.

    A token must be decoded together with those before it: it may be part of a character, and sentencepiece strips the
    first space. As few of them are taken as have a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: tuple[int, ...] = ()  # the context, and then tokens of an unfinished character
        self.num_context = 0
        self.context = ""

    def add(self, token_id: int, is_end: bool) -> str:
        """Returns what a token adds: "" while a character is unfinished, unless the text ends here."""
        self.ids += (token_id,)
        text = self.decode(self.ids)
        if text.endswith("\ufffd") and not is_end:
            return ""
        new_ids = self.ids[self.num_context :]
        new_text = self.decode(new_ids)
        # Else bytes that make no character have spoilt those before them: sentencepiece reads all of them or none.
        piece = text[len(self.context) :] if text.startswith(self.context) else new_text
        if new_text:
            self.ids, text = new_ids, new_text
        self.num_context, self.context = len(self.ids), text
        return piece

    def decode(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

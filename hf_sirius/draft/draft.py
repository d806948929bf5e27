"""A draft: the twin of one call, with the neurons that its method chose and the weights that it holds."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.accelerate_hooks import is_offloaded
from ..model.observation import is_compiled
from ..model.sites import MlpSite
from ..settings.methods import method_of
from ..sparsity.in_experts import experts_call, observing_experts
from ..weights.draft_modules import reading
from ..weights.formats import changes, draft_linear, gather_neurons
from ..weights.joint import JointProducts
from ..weights.linear import is_kernel_faster, is_native_faster, kernel_products, native_products
from ..weights.offload import capture_weights, check_offload, offload_session
from .compiled import CompiledChain
from .compiled_verification import CAPTURED, CompiledVerification
from .twin import Twin


class Draft:
    """Drafts for a dense model in one `generate` call. As a context manager it lets go of its weights at the end.

    Args:
        twin: the modules.
        model: the dense model.

    Attributes:
        method: chooses the neurons, from what it observes of the dense model.
        held: what is read in place of modules of the dense model: casts, gathered neurons, and copies of what is
            offloaded.
        is_compiled: whether the latest chain ran as one graph.
        not_compiled: why it did not, in words; `None` where nothing asks for it.
        is_verification_compiled: whether the latest verification ran as one graph.
        is_model_compiled: whether the model, or a part of it, is compiled code.
        has_drafted: whether a draft was begun.
    """

    def __init__(self, twin: Twin, model: PreTrainedModel):
        self.twin = twin
        self.model = model
        self.config = twin.config
        self.method = method_of(twin.config)(twin.config, twin.method_sites)
        self.method.experts = [experts_call(self.method, block, twin.is_offloaded) for block in twin.experts]
        self.held: dict[nn.Module, nn.Module] = {}
        self.is_compiled, self.not_compiled = False, None
        self._memory: dict[nn.Module, torch.Tensor] = {}
        self.is_verification_compiled = False
        self._verification: CompiledVerification | None = None
        self.is_model_compiled, self.has_drafted = is_compiled(model), False
        self._linears = [] if self.is_model_compiled else twin.linears
        self._has_casts = False
        self._has_kernel: dict[int, bool] = {}  # for so many tokens
        self._joint = JointProducts()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Draft":
        if offloaded := is_offloaded(self.model):
            if not self.twin.is_offloaded:
                raise ValueError(
                    f"{type(self.model).__name__} was offloaded after make_sparse, whose twin knows nothing of it: "
                    "detach this one, and call make_sparse again"
                )
            check_offload(self.model)
        self.twin.follow_attributes(self.model)
        with contextlib.ExitStack() as undo:
            self._memory = undo.enter_context(self.twin.kept.memory())
            if offloaded:
                self._take_casts()  # the others are taken as they are streamed past
                undo.enter_context(offload_session(self.model, self.twin.sites))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info) -> None:
        self._undo.close()
        self._verification = None
        self._has_casts = False
        self.held.clear()
        self._joint = JointProducts()
        self._memory.clear()

    @contextlib.contextmanager
    def observing(self, attention_mask: torch.Tensor | None, takes_weights: bool = True) -> Iterator[None]:
        """Within the block, the method watches the dense model's forwards in this context, and the weights that the
        draft needs are taken as they are streamed past.

        Args:
            attention_mask: long [batch_size, num_new_tokens] of the tokens that will be read, or `None` without
                padding.
            takes_weights: whether weights are taken, where the model is offloaded.
        """
        with contextlib.ExitStack() as watched:
            watched.enter_context(self.method.observing(self.model, attention_mask))
            hold = self.held.__setitem__ if takes_weights else None
            watched.enter_context(observing_experts(self.model, self.method.experts, attention_mask, hold))
            if self.twin.is_offloaded and takes_weights:
                resident = [module for module in self.twin.resident if module not in self.held]
                gathered = self.twin.sites if self.method.gathers else []
                watched.enter_context(
                    capture_weights(
                        gathered, resident, self.config.draft_dtype, self.method.choose, self._gather, self._hold
                    )
                )
            yield

    def _take_casts(self) -> None:
        """Takes what is kept of casts, once. To see that they are still of these weights takes its time, which a call
        without any draft is spared.
        """
        if not self._has_casts:
            self._has_casts = True
            for module, cast in self.twin.kept.casts().items():
                self.held.setdefault(module, cast)

    def select(self) -> None:
        """Ends the prefill: chooses what is chosen once per prompt, and gathers it."""
        self._joint = JointProducts()  # which knows of the weights of an earlier choice
        self._take_casts()
        for site in self.twin.method_sites:
            self.method.choose(site)
        for call in self.method.experts:
            module = call.site.module
            if not any(p.is_meta for p in module.parameters()) and (held := call.choose(module)) is not None:
                self.held[module] = held
        for site in self.twin.sites if self.method.gathers else ():
            for part in site.parts:
                if not any(p.is_meta for p in part.parameters()):  # else it was gathered while it was loaded
                    self._gather(site, part, part)

    @torch.no_grad()
    def _gather(self, site: MlpSite, part: nn.Module, loaded: nn.Module) -> None:
        neuron_indices = self.method.neuron_indices[site.idx]
        linear = gather_neurons(
            site, part, loaded, neuron_indices, self.config.draft_dtype, memory=self._memory.get(part)
        )
        if linear is not None:
            self.held[part] = linear

    @torch.no_grad()
    def _hold(self, module: nn.Module, loaded: nn.Module) -> None:
        """Takes an offloaded module outside the MLPs, cast if `draft_scope` says so; `loaded` has its weights."""
        if changes(module, draft_dtype := self.twin.resident[module]):
            loaded = draft_linear(loaded, draft_dtype, compute_dtype=module.weight.dtype)
        self.held[module] = loaded

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        """Within the block, forwards of the twin in this context are sparse."""
        self._take_casts()
        self.has_drafted = True
        # The leaves of a level are several tokens, which oneDNN is there for.
        is_native = self.config.tree_width == 1 and any(map(is_native_faster, self.held.values()))
        products = native_products() if is_native else contextlib.nullcontext()
        with self.method.drafting(), reading(self.held, self._joint), products:
            yield

    @property
    def compile_seconds(self) -> float:
        """Returns what compiling the twin's step, and the verification, has taken so far."""
        users = self.twin.compiled, self.twin.verification
        return sum(user.graph.compile_seconds for user in users if user is not None)

    def read(self, forward: Callable[..., Any], inputs: dict, num_tokens: int, is_watched: bool) -> Any:
        """Returns what the dense model's `forward` makes of its inputs; by a graph, where one is wanted and can be had,
        the logits and the KV-cache alone.

        Args:
            num_tokens: that it reads.
            is_watched: whether a method observes it, for which a graph has no place.
        """
        outputs = None
        if self.twin.verification is not None and not is_watched:
            if self._verification is None:
                self._verification = CompiledVerification(self.twin.verification, self.model)
            outputs = self._verification(inputs)
        self.is_verification_compiled = outputs is not None
        if outputs is not None:
            return outputs
        with self.verifying(num_tokens):
            return forward(**inputs)

    def verifying(self, num_tokens: int) -> contextlib.AbstractContextManager:
        """Within the block, the dense model's products of so many tokens are made as fast as they can be here."""
        if num_tokens not in self._has_kernel:
            self._has_kernel[num_tokens] = is_kernel_faster(self._linears, num_tokens)
        # What lies over a layer takes its time.
        return kernel_products(self._linears) if self._has_kernel[num_tokens] else contextlib.nullcontext()

    @contextlib.contextmanager
    def chain(
        self, input_ids: torch.LongTensor, model_kwargs: dict, num_tokens: int
    ) -> Iterator[Callable[[torch.LongTensor], torch.Tensor | None]]:
        """Within the block, forwards of the twin are sparse. Yields the step of a draft of up to `num_tokens` tokens
        behind `input_ids`, long [1, length]: given these and what was drafted so far, it returns the logits of the next
        token, [1, vocab_size], or `None` where there is none to be had.
        """
        compiled = self.twin.compiled if num_tokens else None
        with self.drafting(), contextlib.ExitStack() as undo:
            if compiled is not None:
                inputs = self.inputs(input_ids, model_kwargs)
                reason = self._not_compiled_as() or compiled.misfit(inputs)
                if reason is not None:
                    compiled.tell(reason)
                else:
                    device = inputs["input_ids"].device
                    reason = undo.enter_context(compiled.running(self.held, self.method, device))
                if reason is None:
                    self.is_compiled, self.not_compiled = True, None
                    chain = CompiledChain(compiled, inputs, num_tokens)
                    yield chain
                    self.not_compiled = compiled.broken
                    if chain.num_steps and not compiled.broken:
                        self.method.check_acted(self.model)
                    return
                self.not_compiled = reason
            self.is_compiled = False
            yield _Chain(self, model_kwargs)

    def _not_compiled_as(self) -> str | None:
        if self.is_model_compiled:
            return "the model itself is compiled, whose KV-cache has no room for drafts"
        return "the model is in training" if self.model.training else None

    def step(self, input_ids: torch.LongTensor, model_kwargs: dict) -> Any:
        """Returns the twin's outputs for the last of `input_ids`, long [num_rows, length]: `logits` are [num_rows, 1,
        vocab_size]. The KV-cache of `model_kwargs` holds all but the last.
        """
        return self.forward(self.inputs(input_ids, model_kwargs))

    def inputs(self, input_ids: torch.LongTensor, model_kwargs: dict) -> dict:
        """Returns the inputs of such a step, as the model itself prepares them."""
        return self.twin.module.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
        )

    def forward(self, inputs: dict) -> Any:
        """Returns the twin's outputs. What the call asks of the dense model beside logits is not asked of it."""
        left_out = {name: False for name in CAPTURED if inputs.get(name)}
        outputs = self.twin(self.model, **{**inputs, **left_out, "return_dict": True})
        self.method.check_acted(self.model)
        return outputs

    def next_kwargs(self, outputs: Any, model_kwargs: dict) -> dict:
        """Returns the `model_kwargs` of the step after the one that had these outputs."""
        return self.twin.module._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=self.model.config.is_encoder_decoder
        )


class _Chain:
    """The steps of one draft, by the twin's own forward, into the KV-cache of `model_kwargs`."""

    def __init__(self, draft: Draft, model_kwargs: dict):
        self.draft, self.model_kwargs = draft, dict(model_kwargs)
        self._outputs: Any = None

    def __call__(self, input_ids: torch.LongTensor) -> torch.Tensor:
        if self._outputs is not None:
            self.model_kwargs = self.draft.next_kwargs(self._outputs, self.model_kwargs)
        self._outputs = self.draft.step(input_ids, self.model_kwargs)
        return self._outputs.logits[:, -1]

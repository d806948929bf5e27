"""By how much memory grows within a cycle after a long prompt, for trees of several widths, on the embedded reasoner.

    python examples/tree_memory.py
    python examples/tree_memory.py --tree_widths 1 4 --context_length 1000

A cycle in which the KV-cache runs out of room copies a layer's states: it is the one that grows most.
"""

import argparse
import statistics
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

import hf_sirius
from hf_sirius.study.problems import problem_prompt


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, and the most that were alive at once since `restart`. What a
    kernel needs within itself does not show.
    """

    def __init__(self):
        super().__init__()
        self._alive: dict[int, int] = {}
        self.num_bytes = self.peak = self._start = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    self.num_bytes += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.num_bytes)
        return outputs

    def _forget(self, key: int) -> None:
        self.num_bytes -= self._alive.pop(key)

    def restart(self) -> int:
        """Returns the peak over what is alive at its beginning, and begins anew."""
        growth = self.peak - self._start
        self._start = self.peak = self.num_bytes
        return growth


class CycleMemory(BaseStreamer):
    """Notes by how much each cycle's live tensors grew."""

    def __init__(self, live: LiveBytes):
        self.live = live
        self.growths: list[int] = []

    def put(self, value):
        self.growths.append(self.live.restart())

    def end(self):
        pass


def measure(model, config: hf_sirius.SiriusConfig, prompt_ids: torch.Tensor, max_new_tokens: int):
    """Returns the bytes by which each cycle grew, the call's statistics, and the bytes of the prompt's states."""
    with hf_sirius.make_sparse(model, config) as sparse, LiveBytes() as live:
        memory, cache = CycleMemory(live), DynamicCache(config=model.config)
        model.generate(
            prompt_ids, assistant_model=sparse, max_new_tokens=max_new_tokens, do_sample=False, streamer=memory,
            past_key_values=cache, eos_token_id=None,
        )  # fmt: skip
    states = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    # The first growths are those of the prompt, the prefill, and the first cycle, which makes room in the KV-cache.
    return memory.growths[3:], sparse.stats, states * prompt_ids.shape[1] // cache.get_seq_length()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree_widths", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context_length", type=int, default=4000, help="tokens of the prompt")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--threshold", type=float, default=1.0)
    args = parser.parse_args()

    config = hf_sirius.SiriusConfig(method="griffin", density=args.density, threshold=args.threshold, kernel_size=16)
    configs = [config.replace(tree_width=tree_width) for tree_width in args.tree_widths]
    if args.max_new_tokens < 2 * config.kernel_size + 2:
        parser.error(f"max_new_tokens={args.max_new_tokens} is too short for two cycles: ask for more tokens")
    tokenizer = AutoTokenizer.from_pretrained(hf_sirius.reasoner_path())
    text = "\n".join(f"{problem_prompt(p['question'])} {p['answer']}" for p in hf_sirius.reasoner_problems())
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < args.context_length:
        parser.error(f"the embedded problems have {ids.shape[1]} tokens: ask for a context_length of at most that")
    model = AutoModelForCausalLM.from_pretrained(hf_sirius.reasoner_path())
    prompt_ids = ids[:, : args.context_length]
    runs = [measure(model, config, prompt_ids, args.max_new_tokens) for config in configs]
    print(f"The states of {args.context_length} tokens take {runs[0][2] / 2**20:.1f} MiB; a cycle grows by:")
    for tree_width, (growths, stats, _) in zip(args.tree_widths, runs, strict=True):
        median, most = (growth / 2**20 for growth in (statistics.median(growths), max(growths)))
        drafted, verified = (n / stats.num_cycles for n in (stats.num_nodes_drafted, stats.num_nodes_verified))
        nodes = f"{drafted:.0f} nodes drafted, {verified:.0f} verified"
        print(f"width {tree_width}: {median:.2f} MiB (median; at most {most:.2f}), {nodes}")


if __name__ == "__main__":
    main()

"""A model larger than the memory it may use: dense under accelerate's offload, and with a draft that stays resident.

    python examples/offload.py
    python examples/offload.py --draft_dtype nf4 --draft_memory 200MiB
    python examples/offload.py --model meta-llama/Llama-3.3-70B-Instruct --resident 1GiB --cpu_memory 160GiB \
        --draft_dtype nf4 --density 0.3 --draft_memory 20GiB --folder /disk/with/room

Without `--model` it is the embedded reasoner, widened to 379 M float32 parameters (1.4 GiB), with all weights on disk.
`--model` is loaded with a device_map: `--resident` is what accelerate may keep on the GPU (or, without one, in memory),
`--cpu_memory` what it may keep in CPU memory and streams from there; the rest is streamed from `--folder`.

What is resident and what is streamed, worked out (not measured) for the 70 B model above on one GPU of 24 GB. It has 80
layers of 151 M parameters in the attention and 705 M in the MLP, and 1.05 B each in embedding and head:

    streamed for each verification                      70.6 B parameters in bfloat16            141 GB
    gathered neurons, density 0.3                       80 * 705 M * 0.3 in nf4 (0.5625 bytes)   9.5 GB
    attention and head                                  (80 * 151 M + 1.05 B) in nf4             7.4 GB
    embedding                                           1.05 B in bfloat16                       2.1 GB
    the draft, together                                                                         19.0 GB
    KV-cache of 4,000 tokens (0.33 MB each)                                                      1.3 GB
    an MLP passing by (3 projections, while its neurons are chosen)                              1.4 GB

At 25 GB/s from CPU memory a pass takes 5.6 s, which is what every token of the dense model costs. A draft step reads
the 19 GB at the GPU's 1 TB/s, 0.02 s. So a cycle of `kernel_size` 32 takes 6.3 s, and gives AAL tokens: with an AAL of
20, 0.31 s each. `density`, `kernel_size` and `draft_confidence` trade the one against the other.
"""

import argparse
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sirius
from hf_sirius.model.accelerate_hooks import streaming_hook
from hf_sirius.study.problems import problem_prompt
from hf_sirius.study.timing import generator
from hf_sirius.study.widening import widen
from hf_sirius.weights.memory import PeakMemory
from hf_sirius.weights.offload import offload_to_folder


def load(args, device: torch.device, folder: str):
    """Returns the offloaded model and its tokenizer."""
    if args.model:
        resident = device.index if device.type == "cuda" else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype="auto", device_map="auto", offload_folder=folder,
            max_memory={"cpu": args.cpu_memory, resident: args.resident},
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model = AutoModelForCausalLM.from_pretrained(hf_sirius.reasoner_path(), dtype=torch.float32)
        model = widen(model, args.hidden_factor, args.neuron_factor)
        offload_to_folder(model, folder, str(device))
        tokenizer = AutoTokenizer.from_pretrained(hf_sirius.reasoner_path())
    return model, tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="id on the hub, or path")
    question = hf_sirius.reasoner_problems("long")[0]["question"]
    parser.add_argument("--prompt", default=problem_prompt(question), help="text to continue")
    parser.add_argument("--resident", default="1GiB", help="of --model: what accelerate keeps where it is computed")
    parser.add_argument("--cpu_memory", default="0GiB", help="of --model: what accelerate keeps in CPU memory")
    parser.add_argument("--folder", help="an empty directory for the weights on disk (default: a temporary one)")
    parser.add_argument("--hidden_factor", type=int, default=9)
    parser.add_argument("--neuron_factor", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--kernel_size", type=int, help="tokens per cycle (default: 32)")
    parser.add_argument("--draft_dtype", default="bfloat16")
    parser.add_argument("--draft_memory", help="most bytes of the draft's own weights, such as 600MiB")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    args = parser.parse_args()

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="hf_sirius_offload_") as temporary:
        model, tokenizer = load(args, device, args.folder or temporary)
        inputs = tokenizer(args.prompt, return_tensors="pt").to(device)
        streamed = [module for module in model.modules() if streaming_hook(module) is not None]
        num_bytes = sum(p.numel() * p.element_size() for m in streamed for p in m.parameters(recurse=False))
        if not streamed:
            parser.error(
                f"the whole model fits into --resident {args.resident}: lower that, or there is no need for it"
            )
        print(f"{num_bytes / 2**30:.2f} GiB of weights are streamed for each forward of the model")
        sparse = hf_sirius.make_sparse(
            model, method="griffin", density=args.density, kernel_size=args.kernel_size, threshold=1.0,
            draft_dtype=args.draft_dtype, draft_scope="all", draft_memory=args.draft_memory,
        )  # fmt: skip
        outputs, rates, memory = {}, {}, PeakMemory(device)
        for name, generate in {"dense": generator(model), "Sirius": generator(model, sparse)}.items():
            memory.restart()
            start = time.perf_counter()
            outputs[name] = generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
            seconds, growth = time.perf_counter() - start, memory.growth()
            rates[name] = (outputs[name].shape[1] - inputs["input_ids"].shape[1]) / seconds
            peak = (
                "unknown" if growth is None else f"{growth / 2**30:.2f} GiB ({growth / num_bytes:.0%} of these weights)"
            )
            print(f"{name + ':':8} {rates[name]:6.2f} tokens/s, peak memory of the generation {peak}")
        print(f"the same output: {torch.equal(outputs['dense'], outputs['Sirius'])}")
        print(f"{rates['Sirius'] / rates['dense']:.1f} times as fast, prefill and selection included")
        print(sparse.stats)


if __name__ == "__main__":
    main()

"""Makes the README's table: accuracy of the embedded reasoner when dense, sparse alone and corrected.

    python examples/reasoner/evaluate.py --num_problems 300
    python examples/reasoner/evaluate.py --quantization 8bit --densities 0.5
    python examples/reasoner/evaluate.py --methods griffin --densities 0.5 --draft_dtype nf4 --draft_scope all
    python examples/reasoner/evaluate.py --methods griffin --densities 0.3 --tree_widths 1 2 4 8

The table is Markdown on standard output; progress goes to standard error. ms per token is the mean over whole
generations, prefill included; it depends on the machine.
"""

import argparse
import logging

from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import hf_sirius
from hf_sirius.evaluation import evaluate, generator


logger = logging.getLogger("evaluate")
QUANTIZATIONS = {
    "none": None,
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_problems", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=["griffin", "cats"])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.3, 0.1])
    parser.add_argument("--kernel_size", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.1)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the full model")
    parser.add_argument("--draft_dtype", help="for griffin")
    parser.add_argument("--draft_scope", default="mlp", help="for griffin")
    parser.add_argument("--tree_widths", nargs="+", type=int, default=[1])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    tokenizer = AutoTokenizer.from_pretrained(hf_sirius.reasoner_path())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # each 8-bit product tells that it casts
    model = AutoModelForCausalLM.from_pretrained(
        hf_sirius.reasoner_path(), quantization_config=QUANTIZATIONS[args.quantization]
    ).eval()
    problems = hf_sirius.reasoner_problems()[: args.num_problems]

    dense = evaluate(model.generate, tokenizer, problems)
    logger.info("dense %s", dense)
    settings = f"kernel_size {args.kernel_size}, threshold {args.threshold}"
    print(f"{len(problems)} unseen problems of 6 to 10 steps, {settings}.")
    print(f"Dense: accuracy {dense.accuracy:.3f}, {dense.ms_per_token:.1f} ms per token.\n")
    print("| method, density | tree width | sparse alone | Sirius | AAL | nodes per cycle "
          "| draft density | effective density | ms per token |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for method in args.methods:
        for density in args.densities:
            fields = {"method": method, "density": density}
            fields |= {"kernel_size": args.kernel_size, "threshold": args.threshold}
            if method == "griffin":
                fields |= {"draft_dtype": args.draft_dtype, "draft_scope": args.draft_scope}
            with hf_sirius.make_sparse(model, **fields) as sparse:
                alone = evaluate(generator(model, sparse, alone=True), tokenizer, problems)
            for tree_width in args.tree_widths:
                with hf_sirius.make_sparse(model, **fields, tree_width=tree_width) as sparse:
                    corrected = evaluate(generator(model, sparse), tokenizer, problems)
                    stats = sparse.stats.total
                logger.info("%s alone %s corrected %s %s", fields, alone, corrected, stats)
                print(
                    f"| {method} {density} | {tree_width} | {alone.accuracy:.3f} | {corrected.accuracy:.3f} "
                    f"| {stats.aal:.2f} | {stats.num_nodes_verified / stats.num_cycles:.1f} "
                    f"| {stats.draft_density:.3f} | {stats.effective_density:.3f} | {corrected.ms_per_token:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

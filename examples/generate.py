"""Sirius in stock `generate`: the dense model, its sparse twin alone, and the two together, on one prompt.

python examples/generate.py
python examples/generate.py --model meta-llama/Llama-3.1-8B-Instruct --prompt "..." --method griffin --density 0.5
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sirius
from hf_sirius.study.problems import problem_prompt


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=hf_sirius.reasoner_path())
    parser.add_argument("--prompt", default=problem_prompt(hf_sirius.reasoner_problems()[0]["question"]))
    parser.add_argument("--method", default="griffin")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    def text(output):
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    print(args.prompt)
    print("dense:       ", text(model.generate(**inputs, **options)))
    with hf_sirius.make_sparse(model, method=args.method, density=args.density) as sparse:
        print("sparse alone:", text(sparse.generate(**inputs, **options)))
        print("Sirius:      ", text(model.generate(**inputs, **options, assistant_model=sparse)))
        print(sparse.stats)


if __name__ == "__main__":
    main()

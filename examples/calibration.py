"""Thresholds for `cats` or `teal` from a corpus: calibrate once, save, and load with the config.

    python examples/calibration.py --output_dir runs/calibrated
    python examples/calibration.py --method teal --budget greedy --density 0.5 --output_dir runs/calibrated
    python examples/calibration.py --model meta-llama/Llama-3.1-8B --dataset wikitext2 --output_dir runs/calibrated

`--dataset` takes the corpora of `optimum.gptq.data` (wikitext2, c4, ...), which needs `pip install
hf_sirius[calibration]` and the hub; without it the embedded reasoner's problems are the corpus.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sirius
from hf_sirius.study.problems import problem_prompt


def corpus(args, tokenizer):
    """Yields the texts (or token ids) to calibrate on."""
    if args.dataset is None:
        for problem in hf_sirius.reasoner_problems()[400:]:
            yield f"{problem_prompt(problem['question'])} {problem['answer']}"
    else:
        from optimum.gptq.data import get_dataset

        yield from get_dataset(args.dataset, tokenizer, nsamples=128, seqlen=512)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=hf_sirius.reasoner_path())
    parser.add_argument("--dataset")
    parser.add_argument("--method", choices=("cats", "teal"), default="cats")
    parser.add_argument("--weighting", choices=("magnitude", "column"), default="magnitude")
    parser.add_argument("--budget", choices=("uniform", "greedy"), default="uniform")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--max_tokens", type=int, default=10_000)
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    fields = {"method": args.method, "weighting": args.weighting, "budget": args.budget}
    texts = corpus(args, tokenizer)
    calibration = hf_sirius.calibrate(model, tokenizer, texts, max_tokens=args.max_tokens, **fields)
    hf_sirius.SiriusConfig(density=args.density, calibration=calibration, **fields).save_pretrained(args.output_dir)

    config = hf_sirius.SiriusConfig.from_pretrained(args.output_dir)
    prompt = problem_prompt(hf_sirius.reasoner_problems()[0]["question"])
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with hf_sirius.make_sparse(model, config) as sparse:
        output = model.generate(**inputs, max_new_tokens=200, do_sample=False, assistant_model=sparse)
        print(tokenizer.decode(output[0], skip_special_tokens=True))
        print(sparse.stats)


if __name__ == "__main__":
    main()

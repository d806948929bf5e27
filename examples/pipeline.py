"""Sirius in a stock text-generation pipeline.

python examples/pipeline.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import hf_sirius
from hf_sirius.study.problems import problem_prompt


def main():
    tokenizer = AutoTokenizer.from_pretrained(hf_sirius.reasoner_path())
    model = AutoModelForCausalLM.from_pretrained(hf_sirius.reasoner_path())
    sparse = hf_sirius.make_sparse(model, method="griffin", density=0.5)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, assistant_model=sparse)
    prompts = [problem_prompt(problem["question"]) for problem in hf_sirius.reasoner_problems()[:3]]
    for prompt, (result,) in zip(
        prompts, pipe(prompts, max_new_tokens=200, do_sample=False, return_full_text=False), strict=True
    ):
        print(prompt, result["generated_text"], "\n")
    print(sparse.stats.total)


if __name__ == "__main__":
    main()

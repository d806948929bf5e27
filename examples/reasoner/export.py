"""Puts a trained reasoner into the package: weights, tokenizer and model card under hf_sirius/reasoner/model/.

python examples/reasoner/export.py runs/reasoner
"""

import argparse
from pathlib import Path

import torch
from train import build_model, build_tokenizer
from transformers import GenerationConfig


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# The embedded reasoner of hf_sirius

A Llama of {num_parameters:,} parameters (hidden size {hidden_size}, {num_layers} layers, {num_neurons} neurons in
each MLP) that solves arithmetic word problems of up to 36 steps with a chain of thought. It exists so that
contextual sparsity and its correction can be run, measured and tested with no hub access; it knows nothing but
these problems.

- **Made by** `examples/reasoner/train.py`: random initialisation, AdamW on generated problems (1 to 4 equations for 900
  steps, then 4 to 10), batches of 40, float32, loss on the answers alone, on two CPU cores; {num_steps:,} steps in the
  last run. The weights that ship took 3,000 steps without dropout (the schedule laid out for 4,000, from step 1,750 on
  for 3,400), then 250 with a dropout of 0.15 on the MLPs' neurons (`--num_steps 3500 --learning_rate 5e-3`) and 350
  with one of 0.3 (`--num_steps 3650`), and 1,500 on problems of 4 to 36 equations, from those weights and with a new
  optimizer (the third command in train.py). Without the dropout GRIFFIN at density 0.5 had an AAL of 13.5 of 16, and
  18% accuracy alone.
- **Data**: `examples/reasoner/problems.py`. Training and test problems differ by a hash of the question, whatever
  the seeds.
- **Prompt**: `Question: ...\\nAnswer:`, as in lm-evaluation-harness' GSM8K task; the answer ends in `#### 42`.
- **Tokenizer**: words, single digits and marks, with or without the blank before them; lossless on such problems.
- **Accuracy**: see the table in the README of hf_sirius, made by `hf-sirius sweep`.
- **Licence**: Apache-2.0.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="what train.py wrote to")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parents[2] / "hf_sirius" / "reasoner" / "model"
    )
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    state = torch.load(args.run_dir / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    card = CARD.format(
        num_parameters=model.num_parameters(),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_neurons=config.intermediate_size,
        num_steps=state["step"],
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Trains a tiny hybrid on the reasoner's shorter problems: a Bamba, of whose four layers two have attention and two a
recurrent state (Mamba-2).

    python examples/reasoner/hybrid.py --output_dir runs/hybrid
    hf-sirius sweep --model runs/hybrid/model --task runs/hybrid/test.jsonl --num_items 40 --methods griffin cats \
        --densities 0.5 0.3 --thresholds 0.1 0.5 --kernel_sizes 8 --max_new_tokens 48 --no_plots

It writes the model, and problems that it has not seen. It checkpoints every `--save_every` steps and goes on from the
last checkpoint when started again.
"""

import itertools
import json
import logging

import torch
from problems import problems
from train import batches, build_tokenizer, go_on, parser_of, training
from transformers import BambaConfig, BambaForCausalLM


logger = logging.getLogger("hybrid")


def build_model(tokenizer) -> BambaForCausalLM:
    config = BambaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=4,
        attn_layer_indices=[1, 3], num_attention_heads=4, num_key_value_heads=4, mamba_n_heads=3, mamba_d_head=64,
        mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=32, mamba_expand=2, max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return BambaForCausalLM(config)


def main():
    parser = parser_of(
        __doc__, num_steps=1000, max_equations=2, batch_size=16, learning_rate=3e-3, warmup_steps=60,
    )  # fmt: skip
    parser.add_argument("--num_problems", type=int, default=200, help="that are written for the evaluation")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    logger.info("%d parameters", model.num_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    first_step = go_on(model, optimizer, args.output_dir)
    samples = batches(tokenizer, args.batch_size, args.seed + 1000 + first_step, 1, args.max_equations)
    for _ in training(model, optimizer, samples, args, first_step):
        pass

    model.eval().save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")
    asked = itertools.islice(problems("test", args.seed, 1, args.max_equations), args.num_problems)
    lines = (json.dumps({"question": p["question"], "answer": p["answer"]}) for p in asked)
    (args.output_dir / "test.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Trains a tiny hybrid on the reasoner's shorter problems: a Bamba, of whose four layers two have attention and two a
recurrent state (Mamba-2).

    python examples/reasoner/hybrid.py --output_dir runs/hybrid
    hf-sirius sweep --model runs/hybrid/model --task runs/hybrid/test.jsonl --num_items 40 --methods griffin cats \
        --densities 0.5 0.3 --thresholds 0.1 0.5 --kernel_sizes 8 --max_new_tokens 48 --no_plots

It writes the model, and problems that it has not seen. It checkpoints every `--save_every` steps and goes on from the
last checkpoint when started again.
"""

import argparse
import itertools
import json
import logging
from pathlib import Path

import torch
from problems import problems
from train import batches, build_tokenizer, learning_rate, save
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1000)
    parser.add_argument("--max_equations", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--warmup_steps", type=int, default=60)
    parser.add_argument("--save_every", type=int, default=50)
    parser.add_argument("--num_problems", type=int, default=200, help="that are written for the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output_dir / "checkpoint.pt"

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    logger.info("%d parameters", model.num_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    source = batches(tokenizer, args.batch_size, args.seed + 1000 + first_step, 1, args.max_equations)
    losses = []
    for step in range(first_step, args.num_steps):
        input_ids, labels = next(source)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[targets != -100]), targets[targets != -100])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % args.save_every == 0 or step + 1 == args.num_steps:
            logger.info("step %d loss %.4f", step + 1, sum(losses) / len(losses))
            losses = []
            save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)

    model.eval().save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")
    asked = itertools.islice(problems("test", args.seed, 1, args.max_equations), args.num_problems)
    lines = (json.dumps({"question": p["question"], "answer": p["answer"]}) for p in asked)
    (args.output_dir / "test.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

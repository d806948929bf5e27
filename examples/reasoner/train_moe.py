"""Trains a small mixture of experts on the reasoner's problems: a Mixtral, upcycled from the reasoner that ships.

    python examples/reasoner/train_moe.py --output_dir runs/moe
    hf-sirius sweep --model runs/moe/model --methods experts griffin cats teal --densities 0.5 --kernel_sizes 16

Each block has 8 experts, of which a token is given 4. An expert begins as a quarter of the neurons of the reasoner's
MLP, so that any four that differ are that MLP; the routers begin at random. It takes a few minutes on a CPU. It
checkpoints every `--save_every` steps and goes on from the last checkpoint when started again.
"""

import logging
from pathlib import Path

import torch
from train import accuracy, batches, build_tokenizer, go_on, parser_of, training
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM


logger = logging.getLogger("train_moe")
NUM_EXPERTS, NUM_EXPERTS_PER_TOKEN = 8, 4
REASONER = Path(__file__).parents[2] / "hf_sirius" / "reasoner" / "model"


def upcycled(dense: LlamaForCausalLM) -> MixtralForCausalLM:
    """Returns a mixture of experts with the weights of a Llama, its MLPs' neurons dealt out to the experts."""
    own = dense.config
    num_neurons = own.intermediate_size // NUM_EXPERTS_PER_TOKEN
    config = MixtralConfig(
        vocab_size=own.vocab_size, hidden_size=own.hidden_size, intermediate_size=num_neurons,
        num_hidden_layers=own.num_hidden_layers, num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads, max_position_embeddings=own.max_position_embeddings,
        rms_norm_eps=own.rms_norm_eps, rope_parameters=own.rope_parameters, sliding_window=None,
        num_local_experts=NUM_EXPERTS, num_experts_per_tok=NUM_EXPERTS_PER_TOKEN, router_aux_loss_coef=0.01,
        tie_word_embeddings=False, initializer_range=0.02, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, dtype="float32",
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for layer, block in zip(dense.model.layers, model.model.layers, strict=True):
            experts = block.mlp.experts
            for i in range(NUM_EXPERTS):
                mine = slice(num_neurons * (i % NUM_EXPERTS_PER_TOKEN), num_neurons * (i % NUM_EXPERTS_PER_TOKEN + 1))
                experts.gate_up_proj[i] = torch.cat([layer.mlp.gate_proj.weight[mine], layer.mlp.up_proj.weight[mine]])
                # The weights of a token's experts add up to 1.
                experts.down_proj[i] = NUM_EXPERTS_PER_TOKEN * layer.mlp.down_proj.weight[:, mine]
    return model


def balanced_loss(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the loss of the answers, and that of experts that are chosen unevenly."""
    return model(input_ids=input_ids, labels=labels, use_cache=False, output_router_logits=True).loss


def main():
    args = parser_of(
        __doc__, num_steps=150, max_equations=10, batch_size=24, learning_rate=1e-3, warmup_steps=50,
        num_eval_problems=50,
    ).parse_args()  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = upcycled(AutoModelForCausalLM.from_pretrained(REASONER)).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    first_step = go_on(model, optimizer, args.output_dir)
    samples = batches(tokenizer, args.batch_size, args.seed + 9000 + first_step, 4, args.max_equations)
    for _ in training(model, optimizer, samples, args, first_step, balanced_loss):
        pass
    right = accuracy(model, tokenizer, args.num_eval_problems)
    logger.info("accuracy (%d problems of 6 to 10 steps) %.3f", args.num_eval_problems, right)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(args.output_dir / "model")
    tokenizer.save_pretrained(args.output_dir / "model")


if __name__ == "__main__":
    main()

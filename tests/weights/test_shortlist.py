"""A head whose likeliest tokens are scored by the model's own rows, and the others by a sketch."""

import weakref

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_model, make_prompt
from torch import nn

from hf_sirius import make_sparse
from hf_sirius.weights import shortlist
from hf_sirius.weights.shortlist import ShortlistHead, check_head, head_inputs, likeliest


VOCAB_SIZE, HIDDEN_SIZE = 9600, 256


def make_head(bias: bool = False, dtype=torch.float32, seed: int = 0):
    """Returns a head and inputs that lie near 32 directions, as hidden states do."""
    torch.manual_seed(seed)
    head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=bias, dtype=dtype)
    directions = torch.randn(32, HIDDEN_SIZE)
    inputs = torch.randn(600, 32) @ directions + 0.05 * torch.randn(600, HIDDEN_SIZE)
    return head, inputs.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_the_likeliest_tokens_have_the_heads_own_logits(bias, dtype):
    head, inputs = make_head(bias, dtype)
    stand_in = ShortlistHead(head, inputs[:512])
    found, right = stand_in(inputs[None, 512:]), head(inputs[None, 512:])
    assert found.dtype == dtype and found.shape == right.shape
    top = right.topk(10).indices
    torch.testing.assert_close(found.gather(-1, top), right.gather(-1, top), rtol=1e-2, atol=1e-2)
    assert (found.argmax(-1) == right.argmax(-1)).double().mean() >= (0.9 if dtype == torch.bfloat16 else 1.0)
    wrong = (found.double() - right.double()).norm() / right.double().norm()
    assert 1e-5 < wrong < 0.2, "the others are a sketch's, near the head's"


@torch.no_grad()
def test_the_directions_of_the_inputs_are_what_counts():
    head, inputs = make_head()
    others = torch.randn(512, HIDDEN_SIZE)
    right = head(inputs[512:])
    wrong = [(ShortlistHead(head, of)(inputs[512:]) - right).norm() for of in (inputs[:512], others)]
    assert wrong[0] < 0.5 * wrong[1]


@torch.no_grad()
def test_autocast_leaves_the_sketch_as_it_is():
    head, inputs = make_head()
    plain = ShortlistHead(head, inputs[:512])
    with torch.autocast("cpu", torch.bfloat16):
        made = ShortlistHead(head, inputs[:512])
    assert all(map(torch.equal, made.parameters(), plain.parameters()))


@torch.no_grad()
def test_hidden_states_go_to_the_device_of_the_head():
    class Elsewhere(torch.Tensor):
        """On another device, as far as one asks."""

        device = torch.device("meta")

        def to(self, where):
            sent.append(where)
            return self.as_subclass(torch.Tensor)

    sent: list[torch.device] = []
    head, inputs = make_head()
    stand_in = ShortlistHead(head, inputs[:512])
    right = stand_in(inputs[None, 512:])
    assert torch.equal(stand_in(inputs[None, 512:].as_subclass(Elsewhere)), right) and sent == [torch.device("cpu")]


@settings(deadline=None)
@given(
    vocab_size=st.sampled_from([1, 48, 63, 64, 65, 3071, 3072, 49152]),
    kind=st.sampled_from(["random", "equal", "nan"]),
    seed=st.integers(0, 2**31),
)
def test_about_a_fiftieth_is_likeliest(vocab_size, kind, seed):
    logits = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(seed))
    if kind == "equal":
        logits[:] = 1
    if kind == "nan":
        logits[:] = float("nan")
    rows = list(likeliest(logits))
    assert len(rows) == 2
    for row, token_ids in zip(logits, rows, strict=True):
        if kind == "random":
            assert row.argmax() in token_ids
            expected = min(vocab_size, max(64, vocab_size // 48))
            assert 0.5 * expected <= len(token_ids) <= max(1.6 * expected, 64)
        assert kind != "nan" or not len(token_ids)
        assert kind != "equal" or len(token_ids) == vocab_size


@pytest.mark.parametrize("bias", [False, True])
def test_the_bytes_are_told(bias):
    head, inputs = make_head(bias)
    made = ShortlistHead(head, inputs)
    assert shortlist.num_bytes(head) == sum(p.nbytes for p in made.parameters())
    assert shortlist.num_read(head) == (VOCAB_SIZE + HIDDEN_SIZE) * 64 + (VOCAB_SIZE // 48) * HIDDEN_SIZE


@torch.no_grad()
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_inputs_of_no_use_are_no_error(value):
    head, inputs = make_head()
    inputs[:] = value
    logits = ShortlistHead(head, inputs)(torch.randn(1, 2, HIDDEN_SIZE))
    assert logits.shape == (1, 2, VOCAB_SIZE) and logits.isfinite().all()


def test_a_twin_holds_a_sketch_in_place_of_the_head():
    model = build_model(vocab_size=4800, hidden_size=256, dtype=torch.float32)
    with (
        make_sparse(model, density=1.0, draft_dtype="int8") as full,
        make_sparse(model, density=1.0, draft_dtype="int8", draft_head="shortlist") as short,
        make_sparse(model, density=1.0, draft_dtype="int8", draft_head="shortlist", kernel_size=3) as other,
    ):
        casts = [twin._twin.kept.casts() for twin in (full, short, other)]
        assert casts[1] == casts[2], "a second twin adds nothing"
        held = [sum(p.nbytes for cast in each.values() for p in cast.parameters()) for each in casts]
        assert held[1] < held[0] - 0.6 * model.lm_head.weight.numel()
        for twin in (full, short):
            model.generate(make_prompt(), assistant_model=twin, max_new_tokens=4)
        saved = model.lm_head.weight.numel() - shortlist.num_read(model.lm_head)
        saved /= sum(parameter.numel() for parameter in model.parameters())
        assert full.stats.draft_density - short.stats.draft_density == pytest.approx(saved)


def test_a_head_that_changes_has_another_sketch():
    model = build_model(dtype=torch.float32)
    with make_sparse(model, density=1.0, draft_head="shortlist") as twin:
        before = twin._twin.kept.casts()[model.lm_head]
        assert twin._twin.kept.casts()[model.lm_head] is before
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        assert twin._twin.kept.casts()[model.lm_head] is not before


def test_the_weight_of_a_head_goes_when_the_model_is_cast():
    model = build_model(dtype=torch.float32)
    values = model.lm_head.weight.detach().numpy().copy()
    memory = weakref.ref(values)
    model.lm_head.weight = nn.Parameter(torch.from_numpy(values))
    del values
    with make_sparse(model, density=1.0, draft_head="shortlist", threshold=1.0, kernel_size=16) as twin:
        model.bfloat16()
        assert memory() is None
        output = model.generate(make_prompt(), assistant_model=twin, max_new_tokens=8)
        assert output.shape == (1, 19) and twin.stats.num_accepted


def test_inputs_are_those_of_the_models_head_and_no_users_numbers():
    model, seen = build_model(), []
    state = torch.random.get_rng_state()
    inputs = head_inputs(model)
    assert inputs.shape == (512, 32) and torch.equal(torch.random.get_rng_state(), state)
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model(torch.randint(48, (64, 8), generator=generator))
    hook.remove()
    assert torch.equal(seen[0].flatten(0, 1), inputs)


class OtherHead(nn.Linear):
    pass


def without_head(model):
    model.get_output_embeddings = lambda: None


def of_another_type(model):
    model.lm_head.__class__ = OtherHead


def quantized(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    "change, told",
    [
        (without_head, "has no head"),
        (of_another_type, r"has one of type .*OtherHead, which is no torch\.nn\.Linear"),
        (quantized, r"has one that a library has quantized \(a torch\.nn\..*Linear\)"),
        (cpu_offload, "has one that is offloaded"),
    ],
)
def test_a_head_whose_rows_cannot_be_read_has_no_shortlist(change, told):
    model = build_model()
    change(model)
    with pytest.raises(ValueError, match=f"but LlamaForCausalLM {told}: use draft_head='full'"):
        check_head(model)

"""Models whose weights accelerate streams: the output, what is read when, what stays resident, and what is left."""

import functools
import gc
import platform
import re
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from families import every_family, tiny_model
from tiny import build_model, make_prompt, slow_unless
from transformers import AutoModelForCausalLM, LogitsProcessor

from hf_sirius import calibrate, make_sparse
from hf_sirius.draft.draft import Draft
from hf_sirius.model.accelerate_hooks import is_offloaded, streaming_hook
from hf_sirius.settings.fields import DRAFT_DTYPES
from hf_sirius.weights import offload as offload_module
from hf_sirius.weights.memory import process_memory, trim_heap


FIELDS = {"method": "griffin", "density": 0.5, "threshold": 1.0, "kernel_size": 5}


def offload_to_disk(model, folder):
    return disk_offload(model, str(folder))


def offload_to_cpu(model, folder):
    return cpu_offload(model)


def offload_one_block(model, folder):
    """Layer 1 and the head on disk, all else in memory, as a device_map says it."""
    names = [name for name, module in model.named_modules() if not list(module.children()) or "layers" in name]
    device_map = {name: "cpu" for name in names if not re.search(r"layers\.\d+\.", name)}
    device_map |= {name: "disk" for name in device_map if "layers.1" in name or name == "lm_head"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


OFFLOADS = {"disk": offload_to_disk, "cpu": offload_to_cpu, "one block": offload_one_block}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    return lambda model: OFFLOADS[request.param](model, tmp_path / "offload")


def devices(model) -> dict[str, torch.device]:
    return {name: parameter.device for name, parameter in model.named_parameters()}


def hook_states(model) -> list[dict]:
    return [
        {name: value for name, value in vars(hook).items() if name != "tied_pointers_to_remove"}
        for module in model.modules()
        if (hook := streaming_hook(module)) is not None
    ]


def tensor_bytes(module: torch.nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Counter:
    """Counts how often accelerate loads each module."""

    def __init__(self, model):
        self.num_loads: dict[str, int] = {}
        for name, module in model.named_modules():
            if (hook := streaming_hook(module)) is not None:
                self._count(name, hook)

    def _count(self, name, hook):
        load = type(hook).pre_forward

        class Counting(type(hook)):
            def pre_forward(hook, module, *args, **kwargs):
                self.num_loads[name] = self.num_loads.get(name, 0) + hook.offload
                return load(hook, module, *args, **kwargs)

        hook.__class__ = Counting


# The output


OFFLOADED_DRAFTS = [{}, {"draft_dtype": "bfloat16", "draft_scope": "all"}, {"reselect_every": 2}, {"tree_width": 3}]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param(family, fields, marks=slow_unless(family == "llama" or (family == "gpt2" and not fields)))
        for family in ("llama", "phi3", "gpt2", "opt", "mistral", "gemma2")
        for fields in OFFLOADED_DRAFTS
    ],
    ids=str,
)
def test_an_offloaded_model_drafts_as_it_does_in_memory(family, fields, offload):
    prompt = make_prompt()
    model = build_model(family)
    dense = model.generate(prompt, max_new_tokens=24)
    with make_sparse(model, **FIELDS, **fields) as sparse:
        assert torch.equal(model.generate(prompt, assistant_model=sparse, max_new_tokens=24), dense)
        cycles, draft_density = sparse.stats.cycles, sparse.stats.draft_density
        alone = sparse.generate(prompt, max_new_tokens=24)
    offload(model)
    before = devices(model), hook_states(model)
    with make_sparse(model, **FIELDS, **fields) as sparse:
        assert sparse._twin.is_offloaded
        assert torch.equal(model.generate(prompt, assistant_model=sparse, max_new_tokens=24), dense)
        assert sparse.stats.cycles == cycles and sparse.stats.draft_density == draft_density
        assert (devices(model), hook_states(model)) == before
        assert torch.equal(sparse.generate(prompt, max_new_tokens=24), alone)
    assert (devices(model), hook_states(model)) == before
    assert torch.equal(model.generate(prompt, max_new_tokens=24), dense)


@pytest.mark.parametrize("family", every_family())
def test_every_family(family):
    model, prompt = cpu_offload(tiny_model(family)), make_prompt(9)
    dense = model.generate(prompt, max_new_tokens=12)
    with make_sparse(model, **FIELDS) as sparse:
        assert torch.equal(model.generate(prompt, assistant_model=sparse, max_new_tokens=12), dense)
        assert sparse.stats.num_drafted


def test_a_device_map_of_from_pretrained(tmp_path):
    model, prompt = build_model(), make_prompt()
    dense = model.generate(prompt, max_new_tokens=20)
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    device_map |= {"lm_head": "disk", "model.rotary_emb": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert is_offloaded(loaded)
    with make_sparse(loaded, **FIELDS) as sparse:
        assert torch.equal(loaded.generate(prompt, assistant_model=sparse, max_new_tokens=20), dense)
        assert sparse.stats.num_accepted


@pytest.mark.parametrize("draft_dtype", [None, *DRAFT_DTYPES])
def test_sampling_and_dtypes(draft_dtype, offload):
    model = offload(build_model())
    with make_sparse(model, method="griffin", density=0.5, draft_dtype=draft_dtype) as sparse:
        output = model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20, do_sample=True)
        assert output.shape == (1, 31) and sparse.stats.num_drafted


def test_the_default_period_is_longer(tmp_path):
    model = build_model()
    assert make_sparse(model, method="griffin").sirius_config.kernel_size == 16
    assert make_sparse(model, method="griffin", kernel_size=7).sirius_config.kernel_size == 7
    offload_to_disk(model, tmp_path)
    assert make_sparse(model, method="griffin").sirius_config.kernel_size == 32
    assert make_sparse(model, method="griffin", kernel_size=7).sirius_config.kernel_size == 7


# What is read


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_drafts_read_nothing(family, tmp_path):
    model = offload_to_disk(build_model(family), tmp_path)
    with make_sparse(model, **FIELDS) as sparse:
        counter = Counter(model)
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=24)
        num_forwards = 1 + sparse.stats.num_cycles
        embedding = next(name for name in counter.num_loads if "embed_tokens" in name or name.endswith("wte"))
        assert counter.num_loads.pop(embedding) == 1, "loaded once, and kept for the call"
        assert set(counter.num_loads.values()) == {num_forwards}


def test_a_small_budget_streams_the_rest(tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    dense = model.generate(make_prompt(), max_new_tokens=20)
    with pytest.raises(ValueError, match="draft_memory=1 is too small for any draft") as error:
        make_sparse(model, **FIELDS, draft_memory=1)
    needed = int(re.search(r"need (\d+) bytes", str(error.value))[1])
    with pytest.raises(ValueError, match=f"need {needed} bytes"):
        make_sparse(model, **FIELDS, draft_memory=needed - 1)
    num_resident = []
    for budget in (needed, needed + 10_000, needed + 30_000, None):
        with make_sparse(model, **FIELDS, draft_memory=budget) as sparse:
            assert torch.equal(model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20), dense)
            num_resident.append(len(sparse._twin.resident))
    assert num_resident[0] == 0 and num_resident == sorted(set(num_resident)), "more with each larger budget"


@pytest.mark.parametrize("draft_scope", ["mlp", "all"])
@pytest.mark.parametrize("draft_dtype", DRAFT_DTYPES)
@pytest.mark.parametrize("kind", ["in memory", "on disk"])
def test_what_a_draft_holds_is_what_the_budget_counts(kind, draft_dtype, draft_scope, tmp_path):
    from test_formats import held_bytes

    from hf_sirius.weights.linear import DraftLinear

    model = build_model("opt", dtype=torch.float32, intermediate_size=96)
    if kind == "on disk":
        offload_to_disk(model, tmp_path)
    fields = {**FIELDS, "draft_dtype": draft_dtype, "draft_scope": draft_scope}
    with make_sparse(model, **fields) as sparse, sparse.new_call() as call:
        with call.draft.observing(None):
            model(make_prompt())
        call.draft.select()
        held = set(call.draft.held.values())
        num_bytes = sum(held_bytes(part) if isinstance(part, DraftLinear) else tensor_bytes(part) for part in held)
        if kind == "on disk":
            num_bytes += tensor_bytes(model.get_input_embeddings())
    with make_sparse(model, **fields, draft_memory=num_bytes) as exact:
        assert exact._twin.resident == sparse._twin.resident
    if kind == "in memory":
        with pytest.raises(ValueError, match=f"need {num_bytes} bytes"):
            make_sparse(model, **fields, draft_memory=num_bytes - 1)
    else:
        with make_sparse(model, **fields, draft_memory=num_bytes - 1) as smaller:
            assert len(smaller._twin.resident) == len(sparse._twin.resident) - 1


@pytest.mark.parametrize("draft_scope", ["mlp", "all"])
def test_tied_weights(draft_scope, offload):
    model = build_model(tie_word_embeddings=True)
    fields = {**FIELDS, "draft_dtype": "bfloat16", "draft_scope": draft_scope}
    densities, outputs = [], []
    for prepare in (lambda model: model, offload):
        prepare(model)
        with make_sparse(model, **fields) as sparse:
            outputs.append(model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20))
            densities.append(sparse.stats.draft_density)
    assert torch.equal(*outputs) and densities[0] == pytest.approx(densities[1])


def test_the_loaded_embedding_is_not_taken_for_another_weight(tmp_path):
    """Accelerate finds tied weights by address, and the address of what it read from disk is soon another one's."""
    model = build_model(tie_word_embeddings=True)
    device_map = {"model": "disk", "lm_head": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    shared = [hook.tied_params_map for module in model.modules() if (hook := streaming_hook(module)) is not None]
    assert any(tied is not None for tied in shared)
    with make_sparse(model, **FIELDS) as sparse, sparse.new_call():
        assert not model.get_input_embeddings().weight.is_meta
        assert not any(devices for tied in shared for devices in (tied or {}).values())


def test_no_copy_is_made_of_what_is_kept_as_it_is():
    model = build_model(dtype=torch.bfloat16)
    fields = {**FIELDS, "density": 1.0}
    for more in ({}, {"draft_dtype": "bfloat16", "draft_scope": "all"}):
        with make_sparse(model, **fields, **more, draft_memory=1) as sparse, sparse.new_call() as call:
            with call.draft.observing(None):
                model(make_prompt())
            call.draft.select()
            assert not call.draft.held


def test_a_forward_of_a_modules_own_is_drafted_with():
    model = build_model()
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x).roll(7, -1), norm)
    dense = model.generate(make_prompt(), max_new_tokens=20)
    cpu_offload(model)
    with make_sparse(model, **{**FIELDS, "density": 1.0}) as sparse:
        assert torch.equal(model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20), dense)
        assert sparse.stats.acceptance_rate == 1


@pytest.mark.parametrize("path", ["model.norm", "model.layers.1", "model.layers.1.mlp.up_proj"])
def test_a_forward_that_cannot_be_copied_is_refused(path):
    model = build_model()
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    cpu_offload(model)
    if path == "model.layers.1":  # accelerate has no hook for it: it has no weights of its own
        add_hook_to_module(module, ModelHook())
    with pytest.raises(ValueError, match=r"has a forward of its own .*after make_sparse"):
        make_sparse(model, **FIELDS)


# What is left


def test_copies_are_freed_with_the_call(offload):
    model, held = offload(build_model()), []

    class Note(LogitsProcessor):
        def __call__(self, input_ids, scores):
            from hf_sirius.decode.call import Call

            for module in Call.current().draft.held.values():
                held.extend(weakref.ref(parameter) for parameter in module.parameters())
            return scores

    gc.collect()
    gc.disable()  # at once, and not when the collector finds them
    with make_sparse(model, **FIELDS) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12, logits_processor=[Note()])
        gc.enable()
        resident = {id(parameter) for parameter in model.parameters()}
        assert held and all(ref() is None or id(ref()) in resident for ref in held)


def file_under(tensor: torch.Tensor) -> str | None:
    """Returns the file whose pages a tensor is (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5) if line.count("/") else (line.split()[0], None)
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= tensor.data_ptr() < end:
            return name
    return None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc")
def test_free_memory_goes_back_to_the_system():
    blocks = [b"x" * 100_000 for _ in range(1000)]
    del blocks[::2]
    before = process_memory("VmRSS")
    trim_heap()
    assert process_memory("VmRSS") < before - 40_000_000


@pytest.mark.parametrize("fields", [FIELDS, {"density": 1.0, "threshold": 1.0, "kernel_size": 4}])
def test_memory_goes_back_while_weights_are_streamed_for_drafts_and_at_no_other_time(offload, fields, monkeypatch):
    trims = []
    monkeypatch.setattr(offload_module, "trim_heap", lambda: trims.append(None))
    model = build_model()
    with make_sparse(model, **fields) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12)
    assert not trims
    offload(model)
    with make_sparse(model, **fields) as sparse:
        streamed = [part for site in sparse._twin.sites for part in site.parts if streaming_hook(part) is not None]
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12)
        # Before each projection of an MLP, in the prefill and in each verification.
        assert sparse.stats.num_steps and len(trims) == (1 + sparse.stats.num_cycles) * len(streamed) > 0
        trims.clear()
        model.generate(make_prompt(), max_new_tokens=12)
        assert not trims


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="not Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_disk_are_not_copied_out_of_their_files(dtype, tmp_path):
    """Each is in memory once while it is used, and what is written to it does not reach the file."""
    model = offload_to_disk(build_model().to(dtype), tmp_path)
    expected = model(make_prompt()).logits
    loader = streaming_hook(model.lm_head).weights_map.dataset
    files = []

    def note(module, *_):
        files.append(file_under(module.weight))
        assert module.weight.dtype == dtype
        module.weight.data.mul_(1.0)

    model.lm_head._old_forward = types.MethodType(
        lambda self, *args: (note(self), type(self).forward(self, *args))[1], model.lm_head
    )
    with make_sparse(model, **FIELDS) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12)
    assert set(files) == {str(tmp_path / "lm_head.weight.dat")}
    assert type(loader.state_dict) is dict
    files.clear()
    assert torch.equal(model(make_prompt()).logits, expected) and files != [str(tmp_path / "lm_head.weight.dat")]


def test_the_prefill_keeps_one_mlp_at_a_time(tmp_path, monkeypatch):
    """A whole gate and up projection wait for the choice of neurons, and no longer."""
    model = offload_to_disk(build_model(num_hidden_layers=4), tmp_path)
    waiting, num_waiting = weakref.WeakSet(), []
    copy_of = offload_module.bare_copy

    def noting(module):
        loaded = copy_of(module)
        if getattr(module, "out_features", None) == 64:
            waiting.add(loaded)
            num_waiting.append(len(waiting))
        return loaded

    monkeypatch.setattr(offload_module, "bare_copy", noting)
    with make_sparse(model, **FIELDS) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=4)
    assert num_waiting == [1, 2] * 4


def test_what_waits_is_narrowed_before_the_next_weight_comes(tmp_path, monkeypatch):
    model, loaded = offload_to_disk(build_model(dtype=torch.float32), tmp_path), []
    copy_of = offload_module.bare_copy

    def noting(module):
        if getattr(module, "out_features", None) == 64:
            loaded.append(copy_of(module))
            return loaded[-1]
        return copy_of(module)

    monkeypatch.setattr(offload_module, "bare_copy", noting)
    with make_sparse(model, **FIELDS, draft_dtype="bfloat16") as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=2)
    gates = loaded[::2]
    assert len(gates) == len(sparse._twin.sites) and all(gate.weight.dtype == torch.bfloat16 for gate in gates)


def test_what_is_held_is_not_taken_again(tmp_path, monkeypatch):
    model = offload_to_disk(build_model(), tmp_path)
    taken, hold = [], Draft._hold
    monkeypatch.setattr(Draft, "_hold", lambda self, module, loaded: (taken.append(module), hold(self, module, loaded)))
    with make_sparse(model, **FIELDS, reselect_every=1) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20)
        assert sparse.stats.num_cycles > 2 and sorted(map(id, taken)) == sorted(map(id, sparse._twin.resident))


class Interrupted(BaseException):
    """As Ctrl-C is: no `Exception`."""


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError, Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 2, 5], ids=["in the prefill", "after one layer", "in a verification"])
@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"])
def test_an_interrupted_pass_leaves_the_model_usable(part, after, error, offload):
    model = offload(build_model())
    dense = model.generate(make_prompt(), max_new_tokens=20)
    before = devices(model), hook_states(model)
    forwards = []
    streamed = model.get_submodule(part)

    def interrupt(self, hidden_states):
        forwards.extend([1] if self is streamed else [])
        if len(forwards) == after:
            raise error("in the middle of a streamed pass")
        return type(self).forward(self, hidden_states)

    with make_sparse(model, **FIELDS) as sparse:
        forward = streamed._old_forward
        streamed._old_forward = types.MethodType(interrupt, streamed)
        with pytest.raises(error, match="in the middle"):
            model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20)
        streamed._old_forward = forward
        assert (devices(model), hook_states(model)) == before
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert torch.equal(model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=20), dense)
    assert torch.equal(model.generate(make_prompt(), max_new_tokens=20), dense)


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_can_be_brought_back(tied):
    model = build_model(tie_word_embeddings=tied)
    dense, state = model(make_prompt()).logits, {k: v.clone() for k, v in model.state_dict().items()}
    cpu_offload(model)
    with make_sparse(model, **FIELDS) as sparse:
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12)
    remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(make_prompt()).logits, dense)


# What cannot be


def test_refuses_what_would_be_streamed_for_every_token(tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    with pytest.raises(ValueError, match=r"offloaded by accelerate.*'cats'.*Use method='griffin'"):
        make_sparse(model, method="cats")
    assert "generate" not in model.__dict__


def test_refuses_a_model_that_was_offloaded_after_the_twin_was_made(tmp_path):
    model = build_model()
    with make_sparse(model, **FIELDS) as sparse:
        offload_to_disk(model, tmp_path)
        with pytest.raises(ValueError, match=r"was offloaded after make_sparse.*call make_sparse again"):
            model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=4)


def test_calibrate_refuses_an_offloaded_model(tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    with pytest.raises(ValueError, match=r"offloaded by accelerate.*calibrate the model where it is loaded"):
        calibrate(model, None, [make_prompt()[0]])
    assert all(parameter.is_meta for parameter in model.parameters())


def test_refuses_blocks_loaded_as_a_whole():
    model = cpu_offload(build_model(), preload_module_classes=["LlamaMLP"])
    with pytest.raises(ValueError, match=r"LlamaMLP as a whole .*without preload_module_classes"):
        make_sparse(model, **FIELDS)


@pytest.mark.parametrize("when", ["before make_sparse", "before the call"])
def test_an_offload_folder_that_has_vanished(when, tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    file = tmp_path / "model.layers.1.mlp.up_proj.weight.dat"
    if when == "before make_sparse":
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"up_proj\.weight\.dat is gone.*offload the model anew"):
            make_sparse(model, **FIELDS)
        return
    with make_sparse(model, **FIELDS) as sparse:
        kept = file.read_bytes()
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"up_proj\.weight\.dat is gone"):
            model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=8)
        file.write_bytes(kept)
        model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=8)
        assert sparse.stats.num_drafted


def test_buffers_that_have_vanished(tmp_path):
    model = build_model("gpt2")
    model.transformer.h[1].register_buffer("extra", torch.ones(3))
    disk_offload(model, str(tmp_path), offload_buffers=True)
    (tmp_path / "transformer.h.1.extra.dat").unlink()
    with pytest.raises(FileNotFoundError, match=r"extra\.dat is gone"):
        make_sparse(model, **FIELDS)


@pytest.mark.parametrize("alone", [False, True])
def test_a_second_thread_is_told_to_wait(alone, offload):
    model, errors = offload(build_model()), []
    dense = model.generate(make_prompt(), max_new_tokens=12)
    with make_sparse(model, **FIELDS) as sparse:
        generate = sparse.generate if alone else functools.partial(model.generate, assistant_model=sparse)

        def other():
            with pytest.raises(RuntimeError, match="another thread generates with this LlamaForCausalLM") as error:
                generate(make_prompt(), max_new_tokens=12)
            errors.append(error)

        class InTheMiddle(LogitsProcessor):
            def __call__(self, input_ids, scores):
                if not errors:
                    thread = threading.Thread(target=other)
                    thread.start()
                    thread.join()
                return scores

        first = generate(make_prompt(), max_new_tokens=12, logits_processor=[InTheMiddle()])
        assert len(errors) == 1 and (alone or torch.equal(first, dense))
        # Of the call that ran, not of the one that was refused.
        assert sparse.stats.draft_density and (alone or sparse.stats.num_cycles)
        assert torch.equal(model.generate(make_prompt(), assistant_model=sparse, max_new_tokens=12), dense)


def test_what_a_budget_buys_is_logged(caplog, tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    with caplog.at_level("INFO", logger="hf_sirius"):
        make_sparse(model, **FIELDS).detach()
    assert re.search(r"a draft holds \d+\.\d MiB of weights and streams 0\.0 MiB per token", caplog.text)


def test_an_offload_folder_on_a_disk_that_was_full(tmp_path):
    model = offload_to_disk(build_model(), tmp_path)
    file = Path(tmp_path / "model.layers.1.mlp.up_proj.weight.dat")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"up_proj\.weight\.dat is cut short \(was the disk full\?\)"):
        make_sparse(model, **FIELDS)

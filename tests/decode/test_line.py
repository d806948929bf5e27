"""The line as people type it: `model.generate(..., assistant_model=make_sparse(model))`, and what it leaves behind.

Nothing here may depend on the garbage collector: it is off throughout.
"""

import copy
import functools
import gc
import itertools
import pickle
import random
import sys
import threading
import types
import weakref

import pytest
import torch
from accelerate import Accelerator, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from tiny import METHODS, build_model, build_tokenizer, make_prompt
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_sirius import make_sparse, reasoner_path, reasoner_problems
from hf_sirius.decode import bond
from hf_sirius.decode.call import Call
from hf_sirius.study.problems import problem_prompt


LOSSLESS = {"threshold": 1.0, "density": 0.3, "kernel_size": 5}
GREEDY = {"max_new_tokens": 20, "do_sample": False}
WAYS = {**METHODS, "tree": {"method": "griffin", "tree_width": 3}, "cast": {"method": "cats", "draft_dtype": "int8"},
        "cast whole": {"method": "griffin", "draft_dtype": "bfloat16", "draft_scope": "all"}}  # fmt: skip


def dispatch(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def prepare(model):
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def drafts(monkeypatch):
    """The counts of all calls, which see that drafts really happen."""
    all_stats, enter = [], Call.__enter__

    def noting(call):
        all_stats.append(call.stats)
        return enter(call)

    monkeypatch.setattr(Call, "__enter__", noting)
    return all_stats


def state_of(model) -> tuple:
    """Returns what must be after a call as it was before: classes, instance dicts and hooks of all modules."""
    return tuple(
        (name, type(module), {key: id(value) for key, value in vars(module).items()},
         list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    )  # fmt: skip


def check_line(model, prompt, drafts, before, **fields):
    expected = model.generate(**prompt, **GREEDY)
    for _ in range(2):  # the second one finds what the first one left
        output = model.generate(**prompt, **GREEDY, assistant_model=make_sparse(model, **LOSSLESS, **fields))
        assert torch.equal(output, expected)
        assert state_of(model) == before
    assert len(drafts) == 2 and all(stats.num_drafted > 0 for stats in drafts)


# What it gives


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_line_gives_the_dense_output_and_leaves_nothing(family, way, drafts):
    model = build_model(family)
    check_line(model, {"inputs": make_prompt()}, drafts, state_of(model), **WAYS[way])


def test_an_offloaded_model(tmp_path, drafts):
    model = disk_offload(build_model(), str(tmp_path))
    check_line(model, {"inputs": make_prompt()}, drafts, state_of(model), method="griffin")


@pytest.mark.parametrize("config", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8 bits", "4 bits"])
def test_a_quantized_model(config, drafts):
    model = AutoModelForCausalLM.from_pretrained(
        reasoner_path(), quantization_config=BitsAndBytesConfig(**config), dtype=torch.float32, device_map="cpu"
    )
    prompt = AutoTokenizer.from_pretrained(reasoner_path())(
        problem_prompt(reasoner_problems()[0]["question"]), return_tensors="pt"
    )
    model.generate(**prompt, **GREEDY)  # bitsandbytes' layers settle in their first forward
    check_line(model, prompt, drafts, state_of(model), method="griffin")


@pytest.mark.parametrize("how", ["of the adapter", "of the model"])
def test_a_model_with_an_adapter(how, drafts):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = build_model()
    if how == "of the model":
        model.add_adapter(config)
        user = model
    else:
        user = get_peft_model(model, config)
    before, expected = state_of(model), user.generate(inputs=make_prompt(), **GREEDY)
    assert not torch.equal(expected, build_model().generate(make_prompt(), **GREEDY))
    output = user.generate(inputs=make_prompt(), assistant_model=make_sparse(model, **LOSSLESS), **GREEDY)
    assert torch.equal(output, expected) and drafts[0].num_drafted > 0
    assert state_of(model) == before


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_in_a_pipeline(do_sample, drafts):
    model, options = build_model(), {"max_new_tokens": 20, "do_sample": do_sample}
    before = state_of(model)

    def write(**assistant):
        torch.manual_seed(0)
        pipe = pipeline("text-generation", model=model, tokenizer=build_tokenizer(), **assistant)
        return pipe("w3 w4 w5 w6", **options)

    expected = write()
    output = write(assistant_model=make_sparse(model, method="griffin", **LOSSLESS))
    assert drafts[0].num_drafted > 0 and type(model) is before[0][1]
    assert do_sample or output == expected


def test_with_a_streamer_in_a_thread(drafts):
    model, tokenizer = build_model(), build_tokenizer()
    before = state_of(model)
    expected = model.generate(make_prompt(), **GREEDY)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)

    def work():
        model.generate(make_prompt(), streamer=streamer, assistant_model=make_sparse(model, **LOSSLESS), **GREEDY)

    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0, 11:]) and drafts[0].num_drafted > 0
    assert state_of(model) == before


@pytest.mark.parametrize("look_up", [lambda model: model.generate, lambda model: type(model).generate.__get__(model)])
def test_with_a_generate_that_was_fetched_beforehand(look_up, drafts):
    model = build_model()
    before, generate = state_of(model), look_up(model)
    expected = generate(make_prompt(), **GREEDY)
    output = generate(make_prompt(), assistant_model=make_sparse(model, **LOSSLESS), **GREEDY)
    assert torch.equal(output, expected) and drafts[0].num_drafted > 0 and state_of(model) == before


@pytest.mark.parametrize("is_method", [False, True], ids=["a function", "a method"])
def test_with_a_generate_that_was_wrapped_beforehand(is_method, drafts):
    model = build_model()
    expected = model.generate(make_prompt(), **GREEDY)
    calls = []

    def mine(self, *args, **kwargs):
        calls.append(None)
        return type(model).generate(self, *args, **kwargs)

    model.generate = (
        types.MethodType(mine, model) if is_method else lambda *args, **kwargs: mine(model, *args, **kwargs)
    )
    before = state_of(model)
    output = model.generate(make_prompt(), assistant_model=make_sparse(model, **LOSSLESS), **GREEDY)
    assert torch.equal(output, expected) and drafts[0].num_drafted > 0 and len(calls) == 1
    assert state_of(model) == before
    twin = make_sparse(model, **LOSSLESS)
    twin.generate(make_prompt(), max_new_tokens=3)
    assert len(calls) == 1, "it is the dense model's"
    del twin
    assert state_of(model) == before


def test_sampling_draws_as_a_twin_that_was_made_before():
    model = build_model()

    def sample(twin):
        torch.manual_seed(3)
        return model.generate(make_prompt(), assistant_model=twin, max_new_tokens=20, do_sample=True)

    with make_sparse(model, density=0.3) as twin:
        expected = sample(twin)
    assert torch.equal(sample(make_sparse(model, density=0.3)), expected)


# What it leaves


class Fails(LogitsProcessor):
    def __init__(self, length: int, error: type[BaseException] = RuntimeError):
        self.length, self.error = length, error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            raise self.error("stop here")
        return scores


class FailsAsCriterion(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("stop here")


FAILURES = {
    "in the prefill": {"logits_processor": [Fails(11)]},
    "in a draft": {"logits_processor": [Fails(13)]},
    "interrupted": {"logits_processor": [Fails(13, KeyboardInterrupt)]},
    "in a criterion": {"stopping_criteria": [FailsAsCriterion()]},
    "refused": {"guidance_scale": 2.0},
    "misspelt": {"max_new_token": 3},
    "too short": {"max_length": 3, "max_new_tokens": None},
    "stop strings without a tokenizer": {"stop_strings": "w3"},
    "a cold temperature": {"do_sample": True, "temperature": -1.0},
    "bad words": {"bad_words_ids": []},
    "a batch": {"inputs": make_prompt().repeat(2, 1)},
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("way", ["griffin", "cats-threshold", "tree", "cast whole"])
def test_after_an_exception_that_somebody_keeps(kind, way):
    model = build_model()
    before, options = state_of(model), {"inputs": make_prompt(), **GREEDY, **FAILURES[kind]}
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)) as kept:
        model.generate(**options, assistant_model=make_sparse(model, **WAYS[way]))
    assert kept.value.__traceback__ is not None
    assert state_of(model) == before
    expected = model.generate(make_prompt(), **GREEDY)
    output = model.generate(make_prompt(), **GREEDY, assistant_model=make_sparse(model, **LOSSLESS, **WAYS[way]))
    assert torch.equal(output, expected) and state_of(model) == before


@pytest.mark.parametrize("kind", FAILURES)
def test_a_twin_that_the_user_holds_goes_on_after_an_exception_that_somebody_keeps(kind, drafts):
    model = build_model()
    expected = model.generate(make_prompt(), **GREEDY)
    twin = make_sparse(model, **LOSSLESS)
    with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)) as kept:
        model.generate(**{"inputs": make_prompt(), **GREEDY, **FAILURES[kind]}, assistant_model=twin)
    assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)
    assert kept.value is not None and twin.stats.num_drafted > 0


@pytest.mark.parametrize("way", WAYS)
def test_the_twin_and_the_model_are_freed_at_once(way):
    model = build_model()
    twin = make_sparse(model, **WAYS[way])
    model.generate(make_prompt(), assistant_model=twin, return_dict_in_generate=True, output_scores=True, **GREEDY)
    gone = [weakref.ref(twin), weakref.ref(twin._twin.module)]
    casts = [weakref.ref(cast.linear.weight) for cast in twin._twin.kept.casts().values()]
    del twin
    assert all(ref() is None for ref in gone) and all(ref() is not None for ref in casts), "kept for the next twin"
    gone += [*casts, weakref.ref(model), weakref.ref(model.model.layers[0].mlp)]
    del model
    assert all(ref() is None for ref in gone)


def reach_by_a_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: model.config and None)


def reach_by_the_twin(model):
    model.generate = functools.partial(model.generate, assistant_model=make_sparse(model))


def reach_by_an_attribute(model):
    model.model.trainer = types.SimpleNamespace(model=model)


@pytest.mark.parametrize("reach", [reach_by_a_hook, reach_by_the_twin, reach_by_an_attribute, dispatch, prepare])
def test_a_model_that_leads_back_to_itself_is_found_by_the_collector(reach):
    model = build_model()
    reach(model)
    model.generate(make_prompt(), assistant_model=make_sparse(model, **WAYS["cast whole"]), **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_offloaded_twin_is_freed_at_once(tmp_path):
    """Accelerate's own hooks make a cycle of the model, which the collector has to find; the twin's must not."""
    model = disk_offload(build_model(), str(tmp_path))
    before = state_of(model)
    twin = make_sparse(model, method="griffin", **LOSSLESS)
    model.generate(make_prompt(), assistant_model=twin, **GREEDY)
    gone = [weakref.ref(twin), weakref.ref(twin._twin.module)]
    twin.detach()
    del twin
    assert all(ref() is None for ref in gone) and state_of(model) == before


def test_scores_of_a_tree_are_freed_with_the_call():
    model, scores = build_model(), []

    class Noting(LogitsProcessor):
        def __call__(self, input_ids, values):
            scores.append(weakref.ref(values))
            return values

    with make_sparse(model, method="griffin", tree_width=3) as twin:
        output = model.generate(
            make_prompt(), assistant_model=twin, output_scores=True, return_dict_in_generate=True,
            logits_processor=[Noting()], **GREEDY,
        )  # fmt: skip
        assert len(output.scores) == 20
        del output
        assert scores and all(ref() is None for ref in scores)


# What is found again


def casts_of(twin) -> set:
    return set(twin._twin.kept.casts().values())


@pytest.mark.parametrize("way", ["cast", "cast whole"])
def test_the_next_twin_finds_the_casts(way):
    model = build_model()
    first = casts_of(make_sparse(model, **WAYS[way]))
    assert first and casts_of(make_sparse(model, **WAYS[way])) == first
    assert casts_of(make_sparse(model, threshold=0.5, **WAYS[way])) == first, "which do not depend on the threshold"
    make_sparse(model, **WAYS[way]).detach()
    assert not casts_of(make_sparse(model, **WAYS[way])) & first


def test_a_second_twin_needs_no_second_trial(monkeypatch):
    model, fields = build_model(), {"method": "griffin", "tree_width": 3, "draft_dtype": "bfloat16"}
    make_sparse(model, **fields)
    monkeypatch.setattr("hf_sirius.draft.tree_reading._read", None)
    monkeypatch.setattr("hf_sirius.weights.formats.plain_linear", None)
    make_sparse(model, **{**fields, "method": "cats", "draft_dtype": None})
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="cannot read a tree"):
        make_sparse(model, **fields, draft_scope="mlp")


def test_twins_share_no_hooks():
    model, ran = build_model(), []
    twins = [make_sparse(model, method="griffin") for _ in range(2)]
    twins[0].model.layers[0].register_forward_hook(lambda *_: ran.append(None))
    twins[1](make_prompt())
    make_sparse(model, method="griffin")._twin(model, input_ids=make_prompt())
    assert not ran
    twins[0]._twin(model, input_ids=make_prompt())
    assert ran


CHANGES = {
    "a layer replaced": lambda model: setattr(model.model.layers[1], "mlp", copy.deepcopy(model.model.layers[1].mlp)),
    "a hook": lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
    "a forward": lambda model: setattr(
        model.model, "forward", types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), model.model)
    ),
    "a dtype": lambda model: model.float(),
    "an adapter": lambda model: model.add_adapter(LoraConfig(target_modules=["q_proj"])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_twin_is_of_the_model_as_it_is(change):
    model = build_model()
    make_sparse(model, **LOSSLESS)
    CHANGES[change](model)
    twin = make_sparse(model, **LOSSLESS)
    assert torch.equal(twin(make_prompt()).logits, model(make_prompt()).logits)
    expected = model.generate(make_prompt(), **GREEDY)
    assert torch.equal(
        model.generate(make_prompt(), assistant_model=make_sparse(model, **LOSSLESS), **GREEDY), expected
    )


def test_weights_that_change_make_casts_anew():
    model = build_model()
    fields = WAYS["cast whole"]
    first = casts_of(make_sparse(model, **fields))
    gone = [weakref.ref(cast.linear.weight) for cast in first]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert not casts_of(make_sparse(model, **fields)) & first
    del first
    assert gone and all(ref() is None for ref in gone)


def test_one_set_is_kept():
    model = build_model()
    casts = [weakref.ref(cast.linear.weight) for cast in casts_of(make_sparse(model, **WAYS["cast whole"]))]
    assert all(ref() is not None for ref in casts)
    make_sparse(model, **METHODS["griffin"])
    assert all(ref() is None for ref in casts)


# While a twin lives


@pytest.fixture
def model():
    return build_model(dtype=torch.float32)


@pytest.fixture
def twin(model):
    return make_sparse(model, **LOSSLESS)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_of_the_stock_class(model, twin, copied):
    expected = model.generate(make_prompt(), **GREEDY)
    clone = copied(model)
    assert type(clone) is type(build_model()) and type(clone) is not type(model)
    assert torch.equal(clone.generate(make_prompt(), **GREEDY), expected)
    output = clone.generate(make_prompt(), assistant_model=make_sparse(clone, **LOSSLESS), **GREEDY)
    assert torch.equal(output, expected) and type(clone) is type(build_model())
    assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)


def test_saved_files_name_the_stock_class(model, twin, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded) is type(build_model())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"] and type(again) is type(build_model())
    assert torch.equal(again(make_prompt()).logits, model(make_prompt()).logits)


def test_its_class_looks_like_the_stock_one(model, twin):
    own, stock = type(model), type(build_model())
    assert issubclass(own, stock) and (own.__name__, own.__module__, own.__qualname__, own.__doc__, str(own)) == (
        stock.__name__, stock.__module__, stock.__qualname__, stock.__doc__, str(stock),
    )  # fmt: skip
    for made in (own(model.config), own._from_config(model.config)):
        assert type(made) is stock
    assert repr(model) == repr(build_model(dtype=torch.float32))


def test_a_trainer_trains(model, twin, tmp_path):
    data = [{"input_ids": make_prompt()[0], "labels": make_prompt()[0]}] * 4
    before = model.lm_head.weight.clone()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_steps=2)
    Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.lm_head.weight, before)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert type(saved) is type(build_model())
    model.eval()
    expected = model.generate(make_prompt(), **GREEDY)
    assert torch.equal(model.generate(make_prompt(), assistant_model=twin, **GREEDY), expected)


def test_pipelines_take_both(model, twin):
    for each in (model, twin):
        assert pipeline("text-generation", model=each, tokenizer=build_tokenizer())("w3 w4", max_new_tokens=3)


def test_a_class_that_somebody_lays_over_ours_stays():
    model = build_model()
    stock = type(model)
    first = make_sparse(model, **LOSSLESS)
    ours = type(model)
    theirs = type("Theirs", (ours,), {})
    model.__class__ = theirs
    expected = model.generate(make_prompt(), **GREEDY)
    second = make_sparse(model, **LOSSLESS)
    assert torch.equal(model.generate(make_prompt(), assistant_model=second, **GREEDY), expected)
    del first, second
    assert type(model) is theirs
    model.__class__ = ours  # as they take it off again
    make_sparse(model, **LOSSLESS)
    assert type(model) is stock


@pytest.mark.slow
def test_an_extra_compile_happens_at_most_once():
    model, graphs = build_model(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)

    def generate(**assistant):
        return model.generate(make_prompt(), max_new_tokens=6, do_sample=False, **assistant)

    expected = generate()
    for _ in range(3):
        generate()
    num_stock = len(graphs)
    twin = make_sparse(model, **LOSSLESS)
    assert torch.equal(generate(), expected)
    num_laid = len(graphs)
    assert num_laid - num_stock <= num_stock
    del twin
    for _ in range(2):
        generate()
        twin = make_sparse(model, **LOSSLESS)
        generate()
        del twin
    assert len(graphs) == num_laid


# Many at once


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_twins_die_in_any_order(order, drafts):
    model = build_model()
    before, expected = state_of(model), model.generate(make_prompt(), **GREEDY)
    twins = {i: make_sparse(model, **fields, **LOSSLESS) for i, fields in zip(order, METHODS.values(), strict=False)}
    for i in order:
        del twins[i]
        outputs = [model.generate(make_prompt(), assistant_model=twins[j], **GREEDY) for j in twins]
        assert all(torch.equal(output, expected) for output in outputs)
    assert state_of(model) == before and all(stats.num_drafted for stats in drafts)


@pytest.fixture
def tiny_interval():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_make_and_drop_twins_of_one_model(tiny_interval):
    model = build_model()
    before = state_of(model)
    errors, barrier = [], threading.Barrier(6)

    def work(seed):
        chooses = random.Random(seed)
        barrier.wait()
        try:
            for _ in range(40):
                twin = make_sparse(model, density=chooses.choice([0.2, 0.4]), **chooses.choice(list(METHODS.values())))
                assert bond._is_bound(twin, model)
                if chooses.random() < 0.3:
                    twin.detach()
                    assert not bond._is_bound(twin, model)
                del twin
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and state_of(model) == before and model not in bond._bonds


@pytest.mark.parametrize("who", ["this thread", "another"])
def test_the_end_of_a_twin_waits_for_nobody(who):
    """The garbage collector may end one anywhere, also within a block that holds the lock."""
    model = build_model()
    stock, twin = type(model), make_sparse(model, **LOSSLESS)
    gone, inside, go_on = weakref.ref(twin), threading.Event(), threading.Event()

    def hold():
        with bond.lock:
            inside.set()
            go_on.wait()

    if who == "another":
        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        del twin
        assert gone() is None and type(model) is not stock
        go_on.set()
        thread.join()
    else:
        with bond.lock:
            del twin
            assert gone() is None and type(model) is not stock
    assert type(model) is stock


def test_threads_use_the_line(tiny_interval, drafts):
    model = build_model()
    before = state_of(model)
    prompts = [make_prompt(9 + i, seed=i) for i in range(4)]
    expected = [model.generate(prompt, **GREEDY) for prompt in prompts]
    outputs = [[] for _ in prompts]

    def work(i):
        for fields in METHODS.values():
            twin = make_sparse(model, **fields, **LOSSLESS)
            outputs[i].append(model.generate(prompts[i], assistant_model=twin, **GREEDY))
            outputs[i].append(model.generate(prompts[i], assistant_model=make_sparse(model, **LOSSLESS), **GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[i]) for i in range(4) for output in outputs[i])
    assert [len(of_one) for of_one in outputs] == [2 * len(METHODS)] * 4 and len(drafts) == 8 * len(METHODS)
    assert all(stats.num_drafted for stats in drafts) and state_of(model) == before


def test_the_total_counts_the_calls_of_all_threads(tiny_interval):
    with make_sparse(build_model(), **LOSSLESS) as twin:
        total = twin.stats.total

        def work():
            for _ in range(2000):
                total.add_counts({"num_drafted": 1})

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert total.num_drafted == 8000

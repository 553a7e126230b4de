"""Training that scales out: ranks, ZeRO-1, micro-batches and half precision change no result, and
what is not finite changes no weight. That several processes sample and learn what one does is also
in test_resume.py, with three; tests/scaling.py measures it over more updates.
"""

import json
import math
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import grpo
import train
from data.tokenizer import Tokenizer
from grpo import GRPOConfig, update_policy
from lab.run import policy, sampling
from lab.run.checkpoint import load_llama, store_by_input
from lab.run.policy import fill_up, gather_state, make_optimizer, scatter_state
from lab.run.ranks import Ranks
from tests import scaling, tiny
from tests.commands import ROOT, run_ranks
from tests.scaling import apart
from train import parse_args

ALONE = Ranks(0, 1, torch.device("cpu"))
PROMPTS = tiny.ids(6, 3, 3, 6, 6, 1, 1, 4, 4)
COMPLETIONS = tiny.ids(5, 4, 9, 2, 6, 1, 7, 3, 5)
ADVANTAGES = [1.0, -0.5, 0.3, -0.8, 0.6, 0.2, -1.2, 0.4]
SPARSE = [0.0, 0.0, 0.0, 0.0, 0.6, 0.0, -1.2, 0.4]  # of two ranks, the first has nothing to compute
ROLLOUTS = [
    SimpleNamespace(prompt=prompt, completion=completion, trace=SimpleNamespace(reasoning=[7] * n))
    for n, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
]


# ----------------------------------------------------------------------------------- the optimiser


def stepped(model, optimizer, ranks, updates: int, advantages=ADVANTAGES) -> list[torch.Tensor]:
    """Updates of the eight rollouts above; returns the gradients that each step saw."""
    trained, gradients, step = model, [], optimizer.step
    if ranks.world_size > 1:
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def watched():
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        step()

    optimizer.step = watched
    for _ in range(updates):
        batch = fill_up(ranks.part(ROLLOUTS), torch.tensor(advantages), ranks)
        size = {"total": 8, "world_size": ranks.world_size}
        update_policy(trained, optimizer, **batch, config=GRPOConfig(), **size)
    optimizer.step = step
    return gradients


def begun(ranks, zero, tensors=None, weights=None):
    """A model and its optimiser, from a state where one is given."""
    model = tiny.llama()
    if weights:
        model.load_state_dict(weights)
    optimizer = make_optimizer(model, 1e-3, ranks, zero)
    if tensors is not None:
        scatter_state(optimizer, model, ranks, tensors if ranks.rank == 0 else {})
    return model, optimizer


def work(folder) -> None:
    """What each of two processes does: leaves what it saw in files named by rank."""
    ranks = Ranks.start("cpu")
    found = {}
    for name, zero in (("adamw", False), ("zero", True)):
        model, optimizer = begun(ranks, zero)
        first = stepped(model, optimizer, ranks, 1)
        half = {key: weight.clone() for key, weight in model.state_dict().items()}
        found[f"{name} half state"] = tensors = gather_state(optimizer, model, ranks)
        rest = stepped(model, optimizer, ranks, 2)
        found[f"{name} gradients"] = {"all": torch.stack(first + rest)}
        found[f"{name} half"], found[f"{name} weights"] = half, model.state_dict()
        found[f"{name} state"] = gather_state(optimizer, model, ranks)
        # Back from the gathered state, bit for bit.
        model, optimizer = begun(ranks, zero, tensors, half)
        found[f"{name} again half state"] = gather_state(optimizer, model, ranks)
        stepped(model, optimizer, ranks, 2)
        found[f"{name} again"] = model.state_dict()
        found[f"{name} again state"] = gather_state(optimizer, model, ranks)
    model, optimizer = begun(ranks, False)
    found["sparse gradients"] = {"all": torch.stack(stepped(model, optimizer, ranks, 2, SPARSE))}
    found["sparse weights"] = model.state_dict()
    # On from a single process.
    alone = [load_file(folder / f"alone {part}.safetensors") for part in ("state", "weights")]
    model, optimizer = begun(ranks, True, *alone)
    stepped(model, optimizer, ranks, 2)
    found["from alone"] = model.state_dict()
    found["size"] = {"moments": torch.tensor(len(optimizer.optim.state))}
    for name, tensors in found.items():
        save_file(tensors, folder / f"{name} {ranks.rank}.safetensors")
    ranks.stop()


def contiguous(model):
    return {name: weight.contiguous() for name, weight in model.state_dict().items()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """name, rank -> what work() left, and where."""
    folder = tmp_path_factory.mktemp("two")
    model, optimizer = begun(ALONE, True)
    stepped(model, optimizer, ALONE, 1)
    save_file(contiguous(model), folder / "alone weights.safetensors")
    save_file(gather_state(optimizer, model, ALONE), folder / "alone state.safetensors")
    run_ranks(2, work, folder, folder=folder)
    return lambda name, rank=0: load_file(folder / f"{name} {rank}.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one) > 0
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_gradients_and_weights_are_equal_across_ranks(two_ranks):
    for name in ("adamw", "zero"):
        for part in ("gradients", "weights"):
            assert_equal(two_ranks(f"{name} {part}", 0), two_ranks(f"{name} {part}", 1))
    model, optimizer = begun(ALONE, False)
    expected = torch.stack(stepped(model, optimizer, ALONE, 3))
    found = two_ranks("adamw gradients")["all"]
    assert found.shape == expected.shape == (6, expected.shape[1])  # two passes an update
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-4)  # later: Adam's noise
    assert apart(two_ranks("adamw weights"), contiguous(model)) < 1e-6


def test_rows_without_an_advantage_are_not_computed_on_any_rank(two_ranks):
    """The same as one process that computes all eight; no rank waits for one that has none."""
    model, optimizer = begun(ALONE, False)
    advantages, gradients, step = torch.tensor(SPARSE), [], optimizer.step
    optimizer.step = lambda: [
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()])),
        step(),
    ]
    for _ in range(2):
        update_policy(model, optimizer, PROMPTS, COMPLETIONS, advantages, GRPOConfig())
    found = two_ranks("sparse gradients")["all"]
    torch.testing.assert_close(found[:2], torch.stack(gradients)[:2], atol=1e-5, rtol=1e-4)
    assert_equal(two_ranks("sparse weights"), two_ranks("sparse weights", 1))
    assert apart(two_ranks("sparse weights"), contiguous(model)) < 1e-6
    assert apart(two_ranks("sparse weights"), contiguous(tiny.llama())) > 1e-3


def test_what_each_rank_computes():
    rows = [(r.prompt, r.completion) for r in ROLLOUTS]
    for size, advantages, expected in (
        (1, SPARSE, [[4, 6, 7]]),
        (2, SPARSE, [[None] * 3, [4, 6, 7]]),
        (3, SPARSE, [[None] * 2, [4, None], [6, 7]]),  # three, three and two rollouts
        (2, ADVANTAGES, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, [0.0] * 8, [[], []]),
    ):
        for rank, numbers in enumerate(expected):
            ranks = Ranks(rank, size, torch.device("cpu"))
            batch = fill_up(ranks.part(ROLLOUTS), torch.tensor(advantages), ranks, True)
            given = list(zip(batch["prompts"], batch["completions"], strict=True))
            assert given == [([0], []) if n is None else rows[n] for n in numbers]
            paid = [0.0 if n is None else advantages[n] for n in numbers]
            assert batch["advantages"].tolist() == pytest.approx(paid)
            assert batch["blind"] == [n or 0 for n in numbers]  # rollout n reasons for n tokens


def test_zero_is_adamw_bit_for_bit(two_ranks):
    for part in ("half", "half state", "gradients", "weights", "state"):
        assert_equal(two_ranks(f"zero {part}"), two_ranks(f"adamw {part}"))
    names = [f"{name}.{key}" for name, _ in tiny.llama().named_parameters()
             for key in ("step", "exp_avg", "exp_avg_sq")]  # fmt: skip
    assert sorted(two_ranks("zero state")) == sorted(names)
    assert two_ranks("zero state")["norm.weight.step"] == 6
    held = [two_ranks("size", rank)["moments"].item() for rank in (0, 1)]
    assert sum(held) == len(names) / 3 and min(held) > 0  # each rank has a part of them


def test_a_gathered_state_goes_on_bit_for_bit(two_ranks):
    for name in ("adamw", "zero"):
        assert_equal(two_ranks(f"{name} again half state"), two_ranks(f"{name} half state"))
        assert_equal(two_ranks(f"{name} again"), two_ranks(f"{name} weights"))
        assert_equal(two_ranks(f"{name} again state"), two_ranks(f"{name} state"))


def test_two_ranks_go_on_as_one_and_back(two_ranks):
    model, optimizer = begun(ALONE, True)
    stepped(model, optimizer, ALONE, 3)
    expected = contiguous(model)
    assert apart(two_ranks("from alone"), expected) < 1e-6
    model, optimizer = begun(ALONE, True, two_ranks("zero half state"), two_ranks("zero half"))
    stepped(model, optimizer, ALONE, 2)
    assert apart(contiguous(model), expected) < 1e-6
    # Without the moments the same two updates end elsewhere.
    model, optimizer = begun(ALONE, True, None, two_ranks("zero half"))
    stepped(model, optimizer, ALONE, 2)
    assert apart(contiguous(model), expected) > 1e-4


def test_a_state_comes_back_whatever_the_layout_of_the_weights():
    """load_llama lays matrices out by column on a CPU (store_by_input)."""
    expected, optimizer = begun(ALONE, False)
    store_by_input(expected)
    assert gather_state(optimizer, expected, ALONE) == {}  # before the first step
    stepped(expected, optimizer, ALONE, 1)
    tensors = gather_state(optimizer, expected, ALONE)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    model = tiny.llama()
    store_by_input(model)
    model.load_state_dict(contiguous(expected))
    other = make_optimizer(model, 1e-3, ALONE, False)
    scatter_state(other, model, ALONE, tensors)
    assert_equal(gather_state(other, model, ALONE), tensors)
    for one, its in ((expected, optimizer), (model, other)):
        stepped(one, its, ALONE, 2)
    assert_equal(contiguous(model), contiguous(expected))


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_state_that_does_not_fit_is_refused(change):
    model, optimizer = begun(ALONE, False)
    stepped(model, optimizer, ALONE, 1)
    tensors = gather_state(optimizer, model, ALONE)
    name = "layers.1.mlp.up_proj.weight.exp_avg"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].T
    with pytest.raises(ValueError, match=name):
        begun(ALONE, False, tensors)


# ------------------------------------------------------------------------------- whole runs, guards


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """trained(*flags, name=, resume=) -> the folder of a small run in this process."""
    monkeypatch.chdir(ROOT)
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    small = (
        "--steps 3 --questions 2 --rollouts 4 --micro-batch 2 --mask-steps 1 --eval-problems 1 "
        "--eval-samples 1 --eval-every 0 --max-new-tokens 80 --device cpu "
        "--saliency attribution"
    )

    def run(*flags, name="run", resume=False):
        flags = [*small.split(), *map(str, flags), "--out", str(tmp_path / name)]
        train.train(parse_args(flags), resume)
        return tmp_path / name

    run.path = tmp_path / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where others are at work
    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def scripted(monkeypatch):
    """Rollouts written here in place of sampled ones; the weights that each update began with.

    script.update: the number of the update that is under way; script.victim: its second question.
    """

    class Script:
        update, victim, weights = 0, None, []

    script, tokenizer = Script(), Tokenizer.from_directory(ROOT / "data/micro")
    script.weights = []
    said = [
        [*tokenizer.encode(f"{n} + {n} = {2 * n}.\n##### {n}"), tokenizer.eos_ids[0]]
        for n in range(2, 6)
    ]
    sample_groups, sample = train.sample_groups, train.sample

    def watched(model, tokenizer, questions, step, run):
        script.update = step + 1
        text = run.config.prompting.message(questions[1])
        script.victim, script.prompt = questions[1].id, tokenizer.encode_prompt(text)
        script.weights.append([weight.detach().clone() for weight in model.parameters()])
        return sample_groups(model, tokenizer, questions, step, run)

    def scripted_sample(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "generate", lambda m, prompts, *_: said * (len(prompts) // 4))
            return sample(*arguments)

    monkeypatch.setattr(train, "sample_groups", watched)
    monkeypatch.setattr(train, "sample", scripted_sample)  # of rollouts; evaluations sample
    return script


def break_mask(script, monkeypatch, when):
    """The masks of a question are nan."""
    learn = train.learn_masks

    def broken(model, parts, *rest):
        masks = learn(model, parts, *rest)
        for row, (prompt, *_) in enumerate(parts):
            if when(script.update) and prompt == script.prompt:
                masks.H[row] = math.nan
                masks.attribution[row] = math.nan
        return masks

    monkeypatch.setattr(train, "learn_masks", broken)


def break_reward(script, monkeypatch, when):
    """The first of a question's saliency rewards is infinite."""
    saliency, learn = train.rollout_saliency, train.learn_masks

    def remembering(model, parts, *rest):
        script.rows = [prompt == script.prompt for prompt, *_ in parts]
        return learn(model, parts, *rest)

    def broken(*arguments, **keywords):
        rewards = saliency(*arguments, **keywords)
        if when(script.update):
            rewards[script.rows.index(True)] = math.inf
        return rewards

    monkeypatch.setattr(train, "learn_masks", remembering)
    monkeypatch.setattr(train, "rollout_saliency", broken)


def break_loss(script, monkeypatch, when):
    """The log-probabilities of a question's rollouts are nan."""
    score = grpo.score_tokens

    def broken(model, prompts, *rest):
        logprobs, entropies, mask = score(model, prompts, *rest)
        hit = torch.tensor([prompt == script.prompt for prompt in prompts])
        return (
            logprobs + torch.where(hit & when(script.update), math.nan, 0.0)[:, None],
            entropies,
            mask,
        )

    monkeypatch.setattr(grpo, "score_tokens", broken)


def break_gradient(script, monkeypatch, when):
    """The loss is finite, the gradient of one weight is not."""
    make = policy.make_optimizer

    def hooked(model, *rest):
        def broken(gradient):
            return gradient * math.inf if when(script.update) else gradient

        model.norm.weight.register_hook(broken)
        return make(model, *rest)

    monkeypatch.setattr(policy, "make_optimizer", hooked)


def break_second_pass(script, monkeypatch, when):
    """The same, once the update has taken its first step."""
    make, stepped = policy.make_optimizer, []

    def watched(model, *rest):
        optimizer = make(model, *rest)
        step = optimizer.step

        def remembering():
            step()
            stepped.append(script.update)

        optimizer.step = remembering
        return optimizer

    monkeypatch.setattr(policy, "make_optimizer", watched)
    break_gradient(script, monkeypatch, lambda update: update in stepped and when(update))


BREAKS = {
    "mask": break_mask, "reward": break_reward, "loss": break_loss, "gradient": break_gradient,
    "second pass": break_second_pass,
}  # fmt: skip


def metrics(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "outcome" in line]


@pytest.mark.parametrize("kind", BREAKS)
def test_an_update_with_a_number_that_is_not_finite_is_skipped(
    kind, trained, scripted, monkeypatch, capsys
):
    victims = []

    def when(update):
        if update == 2:
            victims.append(scripted.victim)
        return update == 2

    BREAKS[kind](scripted, monkeypatch, when)
    folder = trained("--save-every", 1)
    lines, (first, second, third) = metrics(folder), scripted.weights
    assert [line["skipped"] for line in lines] == [0, 1, 0]
    # A second pass that breaks does not undo the first, and the line says so.
    moved, passes = ("", 0) if kind != "second pass" else (" after 1 of 2 passes", 1)
    assert [line["passes"] for line in lines] == [2, passes, 2]
    named = {victims[0]}
    if kind in ("gradient", "second pass"):  # nothing tells whose it is: all that the update asked
        samples = (folder / "samples.jsonl").read_text().splitlines()
        named = {s["id"] for s in map(json.loads, samples) if s["step"] == 2}
        assert len(named) == 2
    assert [set(line["skipped_questions"]) for line in lines] == [set(), named, set()]
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True)) == (not moved)
    last = load_llama(folder / "checkpoint")
    for before, after in ((first, second), (third, list(last.parameters()))):
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update ")]
    note = f"SKIPPED{moved}, not finite: {' '.join(sorted(named))}"
    assert [note in line for line in said] == [False, True, False]
    state = json.loads((folder / "checkpoints/step-00000002/state.json").read_text())
    assert state["notes"]["skipped_in_a_row"] == 1
    for line in [*lines, *map(json.loads, (folder / "samples.jsonl").read_text().splitlines())]:
        numbers = [value for value in line.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))  # nan and inf are no JSON


def test_ten_in_a_row_end_the_run_with_a_sentence_and_a_checkpoint(trained, scripted, monkeypatch):
    break_mask(scripted, monkeypatch, lambda update: update >= 2 and update != 4)
    with pytest.raises(ValueError) as refusal:
        trained("--steps", 30, "--save-every", 100)
    text = str(refusal.value)
    assert text.startswith("10 updates in a row met numbers that are not finite (the last on")
    assert scripted.victim in text and f"--resume {trained.path}" in text
    lines = metrics(trained.path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0, *[1] * 10]
    (saved,) = (trained.path / "checkpoints").iterdir()
    assert saved.name == "step-00000014"
    # The weights are as the last good update left them.
    assert json.loads((saved / "state.json").read_text())["notes"]["skipped_in_a_row"] == 10
    kept = load_llama(saved)
    pairs = zip(kept.parameters(), scripted.weights[-1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    # Whoever resumes it gets ten more chances; torchrun, which starts it again by itself, none.
    for restart_count, more, message in ((1, 0, text), (0, 10, "10 updates in a row")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart_count))
        with pytest.raises(ValueError) as refusal:
            trained("--steps", 30, "--save-every", 100, resume=True)
        assert str(refusal.value).startswith(message)
        assert [line["skipped"] for line in metrics(trained.path)[14:]] == [1] * more


@pytest.mark.parametrize(
    ("save_every", "eval_every", "done"), [(1, 0, 2), (100, 0, 12), (100, 2, 2)]
)
def test_weights_that_are_not_finite_are_not_saved(
    save_every, eval_every, done, trained, scripted, monkeypatch
):
    """Neither in a checkpoint nor, where an evaluation comes first, in best/."""
    update_policy = train.update_policy

    def broken(model, *arguments, **keywords):
        result = update_policy(model, *arguments, **keywords)
        if scripted.update == 2:
            with torch.no_grad():
                model.norm.weight[3] = math.nan
        return result

    monkeypatch.setattr(train, "update_policy", broken)
    with pytest.raises(ValueError, match="the weights are no longer finite and are not saved"):
        trained("--steps", 30, "--save-every", save_every, "--eval-every", eval_every)
    assert len(metrics(trained.path)) == done
    folders = list((trained.path / "checkpoints").glob("*")) + list(trained.path.glob("best"))
    assert [path.name for path in folders] == (["step-00000001"] if save_every == 1 else [])
    assert not (trained.path / "checkpoint").exists()


def test_micro_batches_change_neither_rollouts_nor_weights(trained):
    # Not a learned mask: AdamW's first step takes the sign of gradients that are noise.
    flags = ("--steps", 2, "--saliency", "mediation")
    folders = [trained(*flags, "--micro-batch", n, name=str(n)) for n in (1, 8)]
    one, other = ((folder / "samples.jsonl").read_text().splitlines() for folder in folders)
    assert len(one) == len(other) == 16
    for a, b in zip(map(json.loads, one), map(json.loads, other), strict=True):
        assert a["text"] == b["text"] and a["advantage"] == pytest.approx(b["advantage"], abs=1e-5)
    one, other = (load_file(folder / "checkpoint/model.safetensors") for folder in folders)
    assert apart(one, other) <= 1e-6
    assert apart(one, load_file(ROOT / "data/micro/model.safetensors")) > 1e-4


def test_half_precision_samples_from_a_copy_and_trains_float32_weights(trained, monkeypatch):
    seen, sample_groups, update = [], train.sample_groups, train.update_policy

    def collecting(model, *rest):
        seen.append({weight.dtype for weight in model.parameters()})
        sampler.append(model)
        return sample_groups(model, *rest)

    def updating(model, *arguments, **keywords):
        assert keywords["autocast"] == torch.bfloat16
        for copied, weight in zip(sampler[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(copied, weight.bfloat16()) and not copied.requires_grad
        return update(model, *arguments, **keywords)

    sampler = []
    monkeypatch.setattr(train, "sample_groups", collecting)
    monkeypatch.setattr(train, "update_policy", updating)
    folder = trained("--precision", "bfloat16", "--steps", 1, "--rollouts", 2)
    assert seen == [{torch.bfloat16}]
    after = load_file(folder / "checkpoint/model.safetensors")
    before = load_file(ROOT / "data/micro/model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert apart(after, before) > 1e-4
    # Steps below bfloat16's resolution are kept.
    assert any(not torch.equal(w, w.bfloat16().float()) for w in after.values())
    assert [line["skipped"] for line in metrics(folder)] == [0]


@pytest.mark.parametrize(("rate", "status"), [(16.9, 1), (17.1, 0)])
def test_the_script_fails_where_two_processes_are_too_slow(rate, status, monkeypatch, capsys):
    """The median of the rounds counts, not the best."""
    rates = iter([10.0, rate, 10.0, 30.0, 10.0, 10.0])

    def run(processes, out, *flags):
        out.mkdir()
        line = json.dumps({"outcome": 0.0, "rollouts_per_second": next(rates)})
        (out / "metrics.jsonl").write_text(f"{line}\n" * 4)

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(sys, "argv", ["scaling", "--only", "speed"])
    with pytest.raises(SystemExit) as end:
        scaling.main()
    assert end.value.code == status and "wanted: 1.7" in capsys.readouterr().out

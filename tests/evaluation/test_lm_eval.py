"""lm-eval on a compressed cache: its own numbers when nothing is lost, decode-style when it is."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from commvq_core import CommVQCache
from commvq_core.errors import InputError
from commvq_core.evaluation.lm_eval_model import CommVQLM
from commvq_core.evaluation.lm_eval_run import HarnessOptions, check_tasks
from commvq_core.models import LoadedModel
from tests.cache.families import identity_codecs
from tests.cli.helpers import refusal, succeed_json

LONG = "the rain in spain stays mainly in the plain, they say, but not today. " * 3 + "And so on."
PAIRS = [
    (LONG, " yes"),
    (LONG, " no it does not"),
    ("A short one:", " a long answer " * 8),
    ("", "nothing before it"),
    (LONG * 3, " far too long"),
]
MOST = 200  # tokens of context, less than the last pair's


def requests(kind: Any, arguments: list[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index)
        for index, given in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> HFLM:
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=MOST, batch_size=2)


def lossless(loaded: LoadedModel, window: int, **options: Any) -> CommVQLM:
    """Codes that lose nothing."""

    def open_cache(strict: bool) -> CommVQCache:
        codecs = identity_codecs(loaded.model)
        return CommVQCache(loaded.model, codecs, window=window, sinks=2, strict=strict)

    return CommVQLM(
        loaded.model,
        tokenizer=loaded.tokenizer,
        max_length=MOST,
        open_cache=open_cache,
        **options,
    )


def lossy(loaded: LoadedModel, artifact: Path, **options: Any) -> CommVQLM:
    return CommVQLM(
        loaded.model, str(artifact), tokenizer=loaded.tokenizer, window=16, sinks=2, **options
    )


@pytest.mark.parametrize("window", [8, 4096])
def test_log_likelihoods_are_those_of_hf_when_nothing_is_lost(
    loaded: LoadedModel, plain: HFLM, window: int
) -> None:
    asked = requests("loglikelihood", PAIRS)
    want, got = plain.loglikelihood(asked), lossless(loaded, window).loglikelihood(asked)
    for (value, greedy), (own, own_greedy) in zip(want, got, strict=True):
        assert own == pytest.approx(value, rel=1e-4)
        assert own_greedy == greedy


@pytest.mark.parametrize("window", [8, 4096])
def test_rolling_log_likelihoods_are_those_of_hf_when_nothing_is_lost(
    loaded: LoadedModel, plain: HFLM, window: int
) -> None:
    asked = requests("loglikelihood_rolling", [(LONG * 3,), ("short",)])
    want = plain.loglikelihood_rolling(asked)
    assert lossless(loaded, window).loglikelihood_rolling(asked) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("window", [8, 4096])
def test_answers_are_those_of_hf_when_nothing_is_lost(
    loaded: LoadedModel, plain: HFLM, window: int, batch_size: int
) -> None:
    until = {"until": ["zz"], "max_gen_toks": 12}
    asked = requests("generate_until", [(LONG, until), ("A short one:", until), ("x", until)])
    want = plain.generate_until(asked)
    assert any(want)
    assert lossless(loaded, window, batch_size=batch_size).generate_until(asked) == want


def test_stop_words_end_an_answer(loaded: LoadedModel, plain: HFLM) -> None:
    whole = plain.generate_until(requests("generate_until", [(LONG, {"max_gen_toks": 12})]))[0]
    stop = whole[3]
    asked = requests("generate_until", [(LONG, {"until": [stop], "max_gen_toks": 12})])
    assert lossless(loaded, 8).generate_until(asked) == [whole[: whole.index(stop)]]


def test_a_continuation_sees_the_context_as_codes(loaded: LoadedModel, tiny_artifact: Path) -> None:
    """Against one token at a time, as generate() would feed them."""
    model = loaded.model
    context = loaded.tokenizer(LONG)["input_ids"]
    whole = loaded.tokenizer(LONG + " no it does not")["input_ids"]
    assert whole[: len(context)] == context
    with CommVQCache.from_pretrained(tiny_artifact, model, window=16, sinks=2) as cache:
        with torch.no_grad():
            model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache)
            cache.strict = True
            total = 0.0
            for token, following in zip(
                whole[len(context) - 1 :], whole[len(context) :], strict=False
            ):
                logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
                total += float(logits[0, 0].log_softmax(-1)[following])
    asked = requests("loglikelihood", PAIRS[:2])
    got = lossy(loaded, tiny_artifact).loglikelihood(asked)
    assert got[1][0] == pytest.approx(total, rel=1e-4)
    exact = lossless(loaded, 8).loglikelihood(asked)
    assert abs(got[1][0] - exact[1][0]) > 1e-2


def test_a_context_is_cached_once_for_all_its_continuations(
    loaded: LoadedModel, tiny_artifact: Path
) -> None:
    opened = []
    model = lossy(loaded, tiny_artifact)
    open_cache: Callable[[bool], Any] = model._open_cache

    @contextlib.contextmanager
    def counting(strict: bool) -> Iterator[Any]:
        opened.append(strict)
        with open_cache(strict) as cache:
            yield cache

    model._open_cache = counting
    together = model.loglikelihood(requests("loglikelihood", PAIRS[:2]))
    assert opened == [False]
    alone = [model.loglikelihood(requests("loglikelihood", [pair]))[0] for pair in PAIRS[:2]]
    assert together == [(pytest.approx(value), greedy) for value, greedy in alone]


def test_the_class_is_registered_and_takes_its_arguments_as_text(
    tiny_model_dir: Path, tiny_artifact: Path
) -> None:
    assert get_model("commvq") is CommVQLM
    model = CommVQLM.create_from_arg_string(
        f"pretrained={tiny_model_dir},codebook={tiny_artifact},window=16,sinks=2,device=cpu",
        {"batch_size": 1, "max_batch_size": None, "device": None},  # None: left out
    )
    asked = requests("loglikelihood", PAIRS[:1])
    assert model.loglikelihood(asked)[0][0] < 0
    if not torch.cuda.is_available():  # what lm-eval's command line asks for by default
        CommVQLM(str(tiny_model_dir), str(tiny_artifact), device="cuda:0")
    with pytest.raises(InputError, match="no codebook"):
        CommVQLM(str(tiny_model_dir))


# The command, on a task of a local file.


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": LONG + word, "choices": [" yes", " no", " it may be"], "gold": index % 3}
        for index, word in enumerate(("Is it?", "Was it?", "Will it be?", "Or not?"))
    ]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "documents.jsonl").write_text(lines)
    source = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'documents.jsonl'}\ntest_split: test\n"
        'doc_to_text: "{{text}}"\nmetadata:\n  version: 1\n'
    )
    (folder / "choice.yaml").write_text(
        source + "task: local_choice\noutput_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    (folder / "answer.yaml").write_text(
        source
        + 'task: local_answer\noutput_type: generate_until\ndoc_to_target: "{{choices[0]}}"\n'
        "generation_kwargs:\n  until: []\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval lists every package of the environment in its results, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def command(tiny_model_dir: Path, tiny_artifact: Path, task_folder: Path, tmp_path: Path) -> Any:
    names = "local_choice,local_answer"
    arguments: tuple[object, ...] = ("lm-eval", tiny_model_dir, "--codebook", tiny_artifact)
    arguments += ("--include-path", task_folder, "--window", 16, "--quiet")
    return *arguments, "--tasks", names, "--out", tmp_path / "out.json"


def test_the_command_gives_lm_evals_numbers_for_every_cache(
    command: Any, loaded: LoadedModel, task_folder: Path, tmp_path: Path
) -> None:
    result = succeed_json(*command, "--limit", 3)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    baseline, coded = result["results"]
    assert (baseline["codec"], coded["bits_per_element"]) == ("fp16", 0.5)
    assert result["settings"]["examples"] == {"local_choice": 3, "local_answer": 3}
    assert [e["prompt"] for e in baseline["examples"]] == [e["prompt"] for e in coded["examples"]]
    plain = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer),
        tasks=["local_choice", "local_answer"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        limit=3,
    )
    assert plain is not None
    for name, metric in (("local_choice", "acc"), ("local_answer", "exact_match")):
        assert baseline["metrics"][name][metric] == plain["results"][name][f"{metric},none"]
    scores = [example["prediction"] for example in baseline["examples"][:3]]
    own = [example["prediction"] for example in coded["examples"][:3]]
    for sample, found, lost in zip(plain["samples"]["local_choice"], scores, own, strict=True):
        want = [value for value, _ in sample["filtered_resps"]]
        # fp16 keys and values, not the model's float32.
        assert [value for value, _ in found] == pytest.approx(want, rel=1e-2)
        assert [value for value, _ in lost] != pytest.approx(want, rel=1e-3)


def test_a_stopped_run_goes_on_with_the_answers_it_has(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = succeed_json(*command)
    (tmp_path / "out.json").unlink()
    score = CommVQLM._score
    left = [5]

    def stopping(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("pulled the plug")
        return score(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CommVQLM, "_score", stopping)
        with pytest.raises(AssertionError, match="pulled the plug"):
            succeed_json(*command)
    assert "begun and not finished" in refusal(*command)
    scored = []

    def counting(self: Any, cache: Any, tail: Any, continuations: Any) -> Any:
        scored.append(len(continuations))
        return score(self, cache, tail, continuations)

    monkeypatch.setattr(CommVQLM, "_score", counting)
    resumed = succeed_json(*command, "--resume")
    assert [entry["metrics"] for entry in resumed["results"]] == [
        entry["metrics"] for entry in whole["results"]
    ]
    assert [entry["examples"] for entry in resumed["results"]] == [
        entry["examples"] for entry in whole["results"]
    ]
    assert 0 < sum(scored) < 24
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_what_lm_eval_does_not_know_is_refused(
    command: Any, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not a folder" in refusal(*command, "--include-path", "/nowhere")
    broken = task_folder.parent / "broken"
    broken.mkdir(exist_ok=True)
    text = (task_folder / "choice.yaml").read_text().replace("documents.jsonl", "gone.jsonl")
    (broken / "broken.yaml").write_text(text.replace("local_choice", "broken"))
    own_only = functools.partial(TaskManager, include_defaults=False)
    with monkeypatch.context() as patch:
        # Without the thousands of tasks that lm-eval brings, which take long to list.
        patch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, **_: own_only(include_path=include_path),
        )
        assert "no task nonsense" in refusal(*command, "--tasks", "nonsense")
        line = refusal(*command, "--tasks", "broken", "--include-path", broken)
        assert "task broken can't be loaded" in line
    monkeypatch.setattr("commvq_core.evaluation.lm_eval_run.find_spec", lambda name: None)
    with pytest.raises(InputError, match="commvq\\[lm-eval\\]"):
        check_tasks(HarnessOptions(("local_choice",)))

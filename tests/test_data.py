"""Formats, templates, masks, truncation, sources and bad input of the data layer; all data is made here."""

from __future__ import annotations

import csv
import gzip
import json
import random

import pytest
import torch
from chats import CHATML, FORGETFUL, INST, USER_ONLY, assistant, make_tokenizer, supervised, tokens, user
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.data import load_examples, load_preferences, load_prompts, pad, shuffled_batches, split_holdout
from fastrl.data.bad_records import BadRecord, Unusable
from fastrl.data.formats import conversations, prompts
from fastrl.data.pairs import comparison
from fastrl.data.questions import parse_transcript
from fastrl.data.sources import read_records
from fastrl.data.templates import choose_template, encode_prompt, end_token_id, render_prompt


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer(CHATML)


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes records as JSONL and returns the file."""

    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


# --- instruction data: the same conversation from every format


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("Capital of France?"), assistant("Paris")]},
        {"prompt": "Capital of France?", "completion": "Paris"},
        {"prompt": [user("Capital of France?")], "completion": [assistant("Paris")]},
        {"instruction": "Capital of France?", "output": "Paris"},
        {"instruction": "Capital of France?", "input": "", "output": "Paris"},
        {"instruction": "Capital of France?", "input": None, "output": "Paris", "messages": None},
        {"id": 1, "instruction": "Capital of France?", "instances": [{"input": "", "output": "Paris"}]},
    ],
    ids=["messages", "strings", "prompt-messages", "instruction", "empty-input", "null-fields", "seed-task"],
)
def test_instruction_formats_give_the_same_example(record, write, chat):
    (example,), report = load_examples(write(record), chat, max_length=100)
    expected = "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    assert chat.decode(example.input_ids) == expected
    assert chat.decode(supervised(example)) == "Paris<|im_end|>"
    assert (report.kept, report.dropped, report.truncated) == (1, 0, 0)


def test_instances_of_a_seed_task_are_examples_of_their_own(write, plain):
    instances = [{"input": "2", "output": "4"}, {"input": "3", "output": "9"}]
    examples, _ = load_examples(write({"instruction": "Square it.", "instances": instances}), plain, max_length=300)
    assert [plain.decode(supervised(example)) for example in examples] == ["4<eos>", "9<eos>"]
    assert "### Input:\n3\n\n### Response:\n9" in plain.decode(examples[1].input_ids)


def test_alpaca_template_is_used_without_a_chat_template(write, plain):
    (example,), _ = load_examples(write({"prompt": "Capital of France?", "completion": "Paris"}), plain, max_length=200)
    assert plain.decode(example.input_ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nCapital of France?\n\n### Response:\nParis<eos>"
    )
    assert choose_template(plain) == "alpaca"


def test_alpaca_puts_the_system_message_first(plain):
    text = render_prompt(plain, [{"role": "system", "content": "Be brief."}, user("Hi")])
    assert text == "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"


def test_bos_is_written_once_if_the_tokenizer_adds_it(write):
    """One bos in front with Alpaca; none where the chat template writes none, as apply_chat_template does."""
    tokenizer = make_tokenizer(bos="<bos>")
    (example,), _ = load_examples(write({"prompt": "Hi", "completion": "Ho"}), tokenizer, max_length=200)
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = CHATML
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, [user("Hi")])


# --- masks


def test_supervised_tokens_are_exactly_the_responses(write, chat):
    """pitfall 17: count exact, first response token and end token supervised, nothing of the prompt."""
    messages = [
        {"role": "system", "content": "Be kind."},
        user("Capital of France?"),
        assistant("It is Paris."),
        user("And what is it?"),
        assistant("The capital."),
    ]
    (example,), _ = load_examples(write({"messages": messages}), chat, max_length=200)
    end = chat.convert_tokens_to_ids("<|im_end|>")
    first, second = tokens(chat, "It is Paris."), tokens(chat, "The capital.")
    assert supervised(example) == [*first, end, *second, end]
    prompt = encode_prompt(chat, messages[:2])
    assert example.loss_mask[: len(prompt)] == [False] * len(prompt)
    assert example.loss_mask[len(prompt)] is True
    assert example.loss_mask[len(prompt) + len(first)] is True and example.input_ids[len(prompt) + len(first)] == end
    rendered = chat.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert example.input_ids == rendered[: len(example.input_ids)]
    assert chat.decode(rendered[len(example.input_ids) :]) == "\n"


def test_multi_turn_alpaca_supervises_every_answer(write, plain):
    """pitfall 17, without a chat template."""
    messages = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    (example,), _ = load_examples(write({"messages": messages}), plain, max_length=300)
    assert plain.decode(supervised(example)) == "1<eos>2<eos>"
    assert plain.decode(example.input_ids).endswith("1<eos>\n\n### Instruction:\nTwo?\n\n### Response:\n2<eos>")


def test_template_without_generation_prompt_and_with_spaces(write):
    """A template in Llama 2's shape: eos once per turn, although the template writes it too."""
    tokenizer = make_tokenizer(INST)
    messages = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    (example,), _ = load_examples(write({"messages": messages}), tokenizer, max_length=300)
    assert tokenizer.decode(supervised(example)) == " 1 <eos> 2 <eos>"
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.input_ids.count(tokenizer.eos_token_id) == 2


def test_trailing_user_turn_is_no_target(write, chat):
    (example,), _ = load_examples(write({"messages": [user("Hi"), assistant("Ho"), user("Hm")]}), chat, max_length=99)
    assert chat.decode(example.input_ids).endswith("Ho<|im_end|>")


def test_answers_that_the_template_rewrites_later_on_are_context(write):
    messages = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    tokenizer = make_tokenizer(FORGETFUL)
    (example,), report = load_examples(write({"messages": messages}), tokenizer, max_length=300)
    assert example.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(supervised(example)) == "2<|im_end|>"
    assert "1 earlier answers are no targets" in str(report)
    messages[3]["train"] = False
    with pytest.raises(ValueError, match="the template writes no answer as it was given"):
        load_examples(write({"messages": messages}), tokenizer, max_length=300)


def test_conversation_that_the_template_refuses_is_an_error(write):
    path = write({"messages": [{"role": "system", "content": "s"}, user("u"), assistant("a")]})
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the chat template refuses .*roles: system, user.*no system"):
        load_examples(path, make_tokenizer(USER_ONLY), max_length=300)


def test_prompts_preferences_and_examples_share_their_tokens(write, chat, plain):
    """SFT input == prompt ids + response ids of a preference == what a rollout continues."""
    for tokenizer in (chat, plain):
        sft = write({"prompt": "Capital of France?", "completion": "It is Paris."}, name="sft.jsonl")
        pair = {"prompt": "Capital of France?", "chosen": "It is Paris.", "rejected": "Paris"}
        pairs = write(pair, name="pairs.jsonl")
        (example,), _ = load_examples(sft, tokenizer, max_length=200)
        (preference,), _ = load_preferences(pairs, tokenizer, max_length=200)
        (prompt,), _ = load_prompts(pairs, tokenizer, max_prompt_length=200)
        assert prompt.input_ids == preference.prompt_ids
        assert example.input_ids == preference.prompt_ids + preference.responses[0]
        assert preference.responses[0][-1] == end_token_id(tokenizer)


def test_encoded_chat_prompt_equals_transformers(chat):
    messages = [user("Capital of France?"), assistant("Paris"), user("Sure?")]
    expected = chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encode_prompt(chat, messages) == expected


def test_end_token_is_the_end_of_turn_else_eos(chat, plain):
    assert chat.convert_ids_to_tokens(end_token_id(chat)) == "<|im_end|>"
    assert chat.convert_ids_to_tokens(end_token_id(chat, "alpaca")) == "<eos>"
    assert plain.convert_ids_to_tokens(end_token_id(plain)) == "<eos>"


# --- preferences

HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Capital?\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": HH + " Paris", "rejected": HH + " Pizza"},
        {"prompt": HH, "chosen": " Paris", "rejected": " Pizza"},
        {
            "prompt": [user("Hi"), assistant("Hello"), user("Capital?")],
            "chosen": [assistant("Paris")],
            "rejected": [assistant("Pizza")],
        },
        {
            "prompt": "Capital?",
            "chosen": [user("Hi"), assistant("Hello"), user("Capital?"), assistant("Paris")],
            "rejected": [user("Hi"), assistant("Hello"), user("Capital?"), assistant("Pizza")],
        },
        {
            "prompt": [user("Hi"), assistant("Hello"), user("Capital?")],
            "responses": ["Paris", "Pizza"],
            "ranks": [1, 2],
        },
        {"prompt": HH, "responses": ["Paris", "Pizza"], "scores": [0.5, -3]},
    ],
    ids=["transcripts", "transcript-prompt", "messages", "whole-conversations", "ranks", "scores"],
)
def test_preference_formats_give_the_same_preference(record, write, chat):
    (item,), report = load_preferences(write(record), chat, max_length=200)
    assert chat.decode(item.prompt_ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [chat.decode(response) for response in item.responses] == ["Paris<|im_end|>", "Pizza<|im_end|>"]
    assert (item.ranks, item.margin, item.criterion) == ([0, 1], 0.0, None)
    assert report.kept == 1


def test_shared_beginning_of_the_answers_is_not_prompt(write, chat):
    """Both answers start with "Paris i": the prompt still ends at the last "\\n\\nAssistant:"."""
    record = {"chosen": HH + " Paris is", "rejected": HH + " Paris in"}
    (item,), _ = load_preferences(write(record), chat, max_length=200)
    assert chat.decode(item.responses[0]) == "Paris is<|im_end|>"


def test_ranks_ties_margin_and_criterion(write, chat):
    record = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [2.5, 7, 2.5, 0], "criterion": "honest"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}
    (kwise, pairwise), _ = load_preferences(write(record, pair), chat, max_length=100)
    assert (kwise.ranks, kwise.criterion) == ([1, 0, 1, 2], "honest")
    assert pairwise.margin == 2.0


def test_score_zero_is_a_score(write, chat):
    """pitfall 43: 0.0 is valid, not missing."""
    record = {"prompt": "p", "responses": ["a", "b"], "scores": [0.0, -1.0]}
    (item,), _ = load_preferences(write(record), chat, max_length=100)
    assert item.ranks == [0, 1]


def test_records_that_teach_nothing_are_dropped_and_counted(write, chat):
    path = write(
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]},
        {"chosen": HH + " x\n\nHuman: y\n\nAssistant: z", "rejected": HH + " w"},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        {"prompt": "p", "chosen": "a", "rejected": "a<|im_end|>"},
    )
    items, report = load_preferences(path, chat, max_length=100)
    assert (report.kept, report.dropped) == (len(items), 4) == (1, 4)
    assert report.reasons["sides differ before their last turn"] == 2
    assert "\n" not in str(report) and f"1 kept, 4 dropped (all responses tie: 1, first {path}:2" in str(report)


def test_transcript_turns_of_one_speaker_are_joined():
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:"
    assert parse_transcript(text) == [user("a\n\nb"), assistant("c")]


# --- prompts


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": [user("Hi")]}, "Hi"),
        ({"messages": [user("Hi"), assistant("Ho")]}, "Hi"),
        ({"instruction": "Say", "input": "Hi", "output": "Hi"}, "Say\n\nHi"),
        ({"instruction": "Say", "instances": [{"input": "Hi", "output": "Hi"}]}, "Say\n\nHi"),
        ({"chosen": HH + " a", "rejected": HH + " b"}, "User: Hi\n\nAssistant: Hello\n\nUser: Capital?"),
        ({"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, 1]}, "Hi"),
    ],
    ids=["string", "messages", "conversation", "instruction", "seed-task", "transcripts", "k-wise"],
)
def test_prompt_sources(record, text, write, chat):
    (prompt,), _ = load_prompts(write(record), chat, max_prompt_length=100)
    assert prompt.text == text
    decoded = chat.decode(prompt.input_ids)
    assert decoded.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.rpartition(": ")[2] in decoded


# --- too long, empty


def test_long_responses_are_cut_and_long_prompts_dropped(write, chat):
    """Prompt longer than the context: by policy, not by crash."""
    short, long = {"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi " * 50, "completion": "Ho"}
    path = write(short, long, {"prompt": "Hi", "completion": "Ho " * 50})
    examples, report = load_examples(path, chat, max_length=40)
    assert (report.kept, report.dropped, report.truncated) == (2, 1, 1)
    assert report.reasons == {"prompt does not fit max_length 40": 1}
    cut = examples[1]
    assert len(cut.input_ids) == len(cut.loss_mask) == 40
    assert cut.loss_mask[-1] and cut.input_ids[-1] != end_token_id(chat)
    items, report = load_prompts(path, chat, max_prompt_length=40)
    assert (len(items), report.dropped) == (2, 1)


def test_prompt_length_limits_are_inclusive(write, chat):
    path = write({"prompt": "Hi", "completion": "Ho"})
    (prompt,), _ = load_prompts(path, chat, max_prompt_length=1000)
    length = len(prompt.input_ids)
    assert load_prompts(path, chat, max_prompt_length=length)[1].kept == 1
    with pytest.raises(ValueError, match="longer than max_prompt_length"):
        load_prompts(path, chat, max_prompt_length=length - 1)
    assert load_examples(path, chat, max_length=length + 1)[1].truncated == 1
    with pytest.raises(ValueError, match="does not fit max_length"):
        load_examples(path, chat, max_length=length)


def test_preferences_too_long(write, chat):
    path = write(
        {"prompt": "Hi", "chosen": "a", "rejected": "b " * 60},
        {"prompt": "Hi " * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "chosen": "c " * 60, "rejected": "c " * 61},
    )
    (item,), report = load_preferences(path, chat, max_length=40)
    assert (report.kept, report.dropped, report.truncated) == (1, 2, 1)
    assert len(item.prompt_ids) + len(item.responses[1]) == 40
    assert item.responses[0][-1] == end_token_id(chat) != item.responses[1][-1]


def test_empty_answers_and_prompts_are_dropped(write, chat):
    path = write({"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": " "}, {"messages": [user("x")]})
    assert load_examples(path, chat, max_length=50)[1].reasons == {"empty response": 1, "no response": 1}
    path = write({"prompt": "Hi"}, {"prompt": "  "}, {"messages": [assistant("x")]})
    assert load_prompts(path, chat, max_prompt_length=50)[1].reasons == {"empty prompt": 2}


def test_empty_response_of_a_pair_is_its_end_token(write, chat):
    (item,), _ = load_preferences(write({"prompt": "p", "chosen": "a", "rejected": ""}), chat, max_length=50)
    assert item.responses[1] == [end_token_id(chat)]


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["no-bytes", "blank-lines"])
def test_empty_file_is_an_error(content, tmp_path, chat):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    for load, limit in ((load_examples, "max_length"), (load_prompts, "max_prompt_length")):
        with pytest.raises(ValueError, match=r"empty data set: .*empty\.jsonl: 0 kept"):
            load(path, chat, **{limit: 10})


# --- bad input


def test_missing_file(chat):
    with pytest.raises(FileNotFoundError, match=r"data file not found: nowhere/no\.jsonl"):
        load_examples("nowhere/no.jsonl", chat, max_length=10)


def test_broken_line_names_file_and_line(tmp_path, chat):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl:3: broken JSON: .* one JSON object per line"):
        load_examples(path, chat, max_length=100)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"left": "a", "right": "b"},
            "no known instruction format: keys found: left, right; expected messag",
        ),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, got int 3"),
        ({"prompt": 5, "completion": "b"}, "'prompt' must be .*, got int 5"),
        ({"instruction": ["a"], "output": "b"}, r"'instruction' must be a string, got list \['a'\]"),
        ({"instruction": "a", "output": None}, "no known instruction format: keys found: instruction"),
        ({"instruction": "a", "instances": {"output": "b"}}, "'instances' must be a list of objects"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": ["hi"]}, r"'messages\[0\]' must be an object with 'role' and .*, got str 'hi'"),
        ({"messages": [{"role": "critic", "content": "x"}]}, r"'messages\[0\].role' must be one of system, "),
        ({"messages": [{"role": "user", "content": 1}]}, r"'messages\[0\].content' must be a string or .*, got int 1"),
    ],
)
def test_bad_instruction_records_name_file_line_and_field(record, message, write, chat):
    path = write({"prompt": "a", "completion": "b"}, record)
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: {message}"):
        load_examples(path, chat, max_length=100, max_bad_records=0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are identical"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, "'chosen' and 'rejected' are identical"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "same length, at least 2; got 2 and 1"),
        ({"prompt": "p", "responses": ["a"], "ranks": [0]}, "same length, at least 2; got 1 and 1"),
        ({"prompt": "p", "responses": ["a", "a"], "ranks": [0, 1]}, "identical responses with different ranks: 'a'"),
        ({"prompt": "p", "responses": ["a", 2], "ranks": [0, 1]}, "'responses' must be a list of strings"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0, "1"]}, "'ranks' must be a finite number, got str '1'"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [0, float("nan")]}, "'scores' must be a finite number"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": 3}, "'scores' must be a list of numbers, got int 3"),
        ({"responses": ["a", "b"], "ranks": [0, 1]}, "no known preference format: keys found: ranks, responses"),
        ({"prompt": "p", "chosen": "a", "rejected": 4}, "must both be strings or both be message lists, got str and"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "'margin' must be a finite number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "criterion": 1}, "'criterion' must be a string, got int 1"),
        ({"chosen": "a", "rejected": "b"}, "no 'prompt', and 'chosen' and 'rejected' are no transcripts"),
        (
            {"chosen": [user("a")], "rejected": [user("b")]},
            "the last message of 'chosen' and of 'rejected' must be the",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "missing 'prompt'; keys found: chosen, rejected"),
        ({"text": "a"}, "no known preference format: keys found: text; expected prompt [+] chosen [+] rejected"),
    ],
)
def test_bad_preference_records_name_file_line_and_field(record, message, write, chat):
    path = write({"prompt": "p", "chosen": "a", "rejected": "b"}, record)
    with pytest.raises(ValueError, match=rf"data\.jsonl:2.*{message}"):
        load_preferences(path, chat, max_length=100, max_bad_records=0)


def test_bad_prompt_record(write, chat):
    with pytest.raises(ValueError, match=r"data\.jsonl:1: no known prompt format: keys found: text; expected prompt"):
        load_prompts(write({"text": "a"}), chat, max_prompt_length=100)
    with pytest.raises(ValueError, match=r"data\.jsonl:1: the last message of 'prompt' must not be the assistant's"):
        load_prompts(write({"prompt": [user("a"), assistant("b")]}), chat, max_prompt_length=100)


def test_tokenizer_without_eos(write):
    path = write({"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="the tokenizer has no eos token"):
        load_examples(path, make_tokenizer(eos=None), max_length=100)
    (example,), _ = load_examples(path, make_tokenizer(CHATML, eos=None), max_length=100)
    assert example.input_ids[-1] == make_tokenizer().convert_tokens_to_ids("<|im_end|>")


def test_unknown_template(write, plain):
    path = write({"prompt": "a", "completion": "b"})
    with pytest.raises(ValueError, match="template must be one of auto, chat, alpaca, none, got 'alpca'"):
        load_examples(path, plain, max_length=100, template="alpca")
    with pytest.raises(ValueError, match="the tokenizer has no chat template; use 'alpaca'"):
        load_examples(path, plain, max_length=100, template="chat")


# --- sources

RECORDS = [
    {"prompt": 'a, "b"', "responses": ["x\ny", "z"], "ranks": [1, 0]},
    {"prompt": "ü", "responses": ["1", "2"], "ranks": [0, 1]},
]


def written(kind, folder):
    """RECORDS in a file of the given kind."""
    path = folder / f"data.{kind}"
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    if kind == "jsonl":
        path.write_text("\ufeff" + lines.replace("\n{", "\r\n\r\n{"), encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RECORDS[0])
            writer.writeheader()
            writer.writerows({k: v if k == "prompt" else json.dumps(v) for k, v in r.items()} for r in RECORDS)
    else:
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(RECORDS)
        if kind == "parquet":
            data.to_parquet(path)
        elif kind == "arrow":
            data.save_to_disk(path)
        else:
            datasets.DatasetDict({"train": data, "other": data.select([1])}).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "arrow", "splits"])
def test_every_source_reads_the_same_records(kind, tmp_path):
    path = written(kind, tmp_path)
    assert [record for _, record in read_records(path)] == RECORDS
    if kind == "splits":
        assert [record for _, record in read_records(f"{path}:other")] == RECORDS[1:]
        with pytest.raises(ValueError, match=r"no split 'missing', found \['other', 'train'\]"):
            list(read_records(f"{path}:missing"))


def test_hub_id_is_loaded_with_its_split(monkeypatch, chat):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("owner/name", chat, max_length=50)[1].kept == 1
    assert load_examples("owner/name:test", chat, max_length=50)[1].kept == 1
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


def test_unreachable_hub_id_says_so(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="'owner/name' is no local path, and loading it from the hub failed.*no route"):
        list(read_records("owner/name"))


def test_local_path_wins_over_hub_id(tmp_path, monkeypatch, write):
    write({"prompt": "a"}, name="owner:name.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [where for where, _ in read_records("owner:name.jsonl")] == ["owner:name.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "unknown kind of data file; expected .jsonl"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl\[0\]: expected a JSON object, got \"x\""),
        ("a.jsonl", b"3\n", r"a\.jsonl:1: expected a JSON object, got 3"),
        ("a.json", b'[{"a": 1},\n oops]', r"a\.json:2: broken JSON array"),
        ("a.jsonl", b"\xff\xfe\n", "not readable as jsonl text"),
        ("a.jsonl.gz", b"no gzip", "not readable as jsonl text: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
            "not readable as jsonl text: Compressed file ended",
        ),
        ("a.csv", b"prompt,completion\nx,y\nx\n", r"a\.csv:3: expected 2 columns as in the header, got 1"),
        ("a.csv", b"prompt,completion\nx,y,z\n", r"a\.csv:2: expected 2 columns as in the header, got 3"),
        ("a.csv", b"prompt,responses,ranks\nx,y,z\n", r"a\.csv:2: column 'responses' must be JSON"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_records(tmp_path / name))


def test_folder_that_is_no_dataset(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="no data file there; expected .jsonl, .*Dataset.save_to_disk"):
        list(read_records(tmp_path))
    with pytest.raises(ValueError, match="a file has no splits, got ':test'"):
        (tmp_path / "a.jsonl").write_text("{}\n")
        list(read_records(f"{tmp_path}/a.jsonl:test"))


# --- splits, batches, padding


def test_split_holdout_is_a_fixed_partition():
    items = list("abcdefghij")
    train, held_out = split_holdout(items, 0.3, seed=1)
    assert sorted(train + held_out) == items and len(held_out) == 3
    assert (train, held_out) == split_holdout(items, 0.3, seed=1) != split_holdout(items, 0.3, seed=2)
    assert split_holdout(items, 0, seed=1) == (items, [])
    assert [len(part) for part in split_holdout(items[:2], 0.01, seed=1)] == [1, 1]
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        split_holdout(items, 1, seed=1)
    with pytest.raises(ValueError, match="need at least 2"):
        split_holdout(items[:1], 0.5, seed=1)


def test_shuffled_batches_are_fixed_by_seed_and_epoch():
    def batches(**keys):
        return list(shuffled_batches(10, 4, **keys))

    assert [len(batch) for batch in batches(seed=0, epoch=0)] == [4, 4, 2]
    assert sorted(sum(batches(seed=0, epoch=0), [])) == list(range(10))
    assert batches(seed=0, epoch=0) == batches(seed=0, epoch=0)
    assert batches(seed=0, epoch=0) != batches(seed=0, epoch=1) != batches(seed=1, epoch=0)
    state = random.getstate()
    batches(seed=0, epoch=0)
    assert random.getstate() == state
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(shuffled_batches(10, 0, seed=0, epoch=0))


def test_pad_masks_by_length_not_by_value():
    """pitfall 18: a real token that equals the pad token is kept."""
    left, mask = pad([[7, 0], [5], []], 0, side="left")
    assert left.tolist() == [[7, 0], [0, 5], [0, 0]] and left.dtype == torch.int64
    assert mask.tolist() == [[True, True], [False, True], [False, False]]
    right, mask = pad([[7, 0], [5], []], 9, side="right")
    assert right.tolist() == [[7, 0], [5, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    assert pad([], 0, side="left")[0].shape == (0, 0)
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'both'"):
        pad([[1]], 0, side="both")


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), st.sampled_from(["left", "right"]))
def test_padding_can_be_undone(sequences, side):
    tokens, mask = pad(sequences, 3, side=side)
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == sequences


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["prompt", "completion", "messages", "chosen", "rejected", "responses", "ranks", "instruction"]
        ),
        st.one_of(
            st.text(max_size=3), st.integers(), st.lists(st.one_of(st.text(max_size=3), st.integers()), max_size=3)
        ),
    )
)
def test_any_record_is_read_or_refused_with_a_reason(record):
    """Whatever the values are, a record is used, skipped or refused by a BadRecord; nothing else escapes."""

    for read in (conversations, comparison, prompts):
        try:
            read(record)
        except Unusable as error:
            assert str(error)
        except BadRecord as error:
            assert str(error) and error.reason

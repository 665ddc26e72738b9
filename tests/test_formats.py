"""Formats that people have, marks on turns, repeated prompts, bad records, columns and several sources."""

from __future__ import annotations

import csv
import json

import pytest
from chats import CHATML, USER_ONLY, assistant, make_tokenizer, supervised, user

from fastrl.data import load_examples, load_preferences, load_prompts
from fastrl.data.bad_records import BadRecord
from fastrl.data.columns import read_columns
from fastrl.data.formats import conversations, prompts
from fastrl.data.pairs import comparison
from fastrl.data.sources import read_records

QA = {"prompt": "q", "completion": "a"}


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer(CHATML)


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]


# --- the same conversation, whoever wrote it down


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": sharegpt(("human", "q"), ("gpt", "a"))},
        {"conversations": [user("q"), assistant("a")], "id": "x"},
        {"conversation": sharegpt(("user", "q"), ("chatgpt", "a"))},
        {"messages": json.dumps([user("q"), assistant("a")])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, assistant("a")]},
        {"messages": [{**user("q"), "tool_calls": None, "weight": None}, assistant("a")]},
        {"prompt": json.dumps([user("q")]), "completion": json.dumps([assistant("a")])},
        {"prompt": [user("q")], "completion": [user("q"), assistant("a")]},
        {"instruction": "q", "context": "", "response": "a", "category": "qa"},
        {"instruction": "q", "input": "", "output": "a", "text": "Below is ..."},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a", "type": "x"},
        {"problem": "q", "solution": "a"},
        {"input": "q", "output": "a"},
        {"inputs": "q", "targets": "a"},
        {"instruction": "q", "output": "a", "system": "", "history": []},
    ],
)
def test_formats_of_other_projects_give_the_same_example(record, write, chat):
    (example,), _ = load_examples(write(record), chat, max_length=100)
    assert chat.decode(example.input_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert chat.decode(supervised(example)) == "a<|im_end|>"
    (prompt,), _ = load_prompts(write(record), chat, max_prompt_length=100)
    assert example.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_context_system_and_history_are_kept(write, chat):
    dolly = {"instruction": "q", "context": "beside", "response": "a"}
    (example,), _ = load_examples(write(dolly), chat, max_length=100)
    assert "user\nq\n\nbeside<|im_end|>" in chat.decode(example.input_ids)
    record = {"system_prompt": "s", "history": [["q0", "a0"]], "question": "q", "response": "a"}
    (example,), _ = load_examples(write(record), chat, max_length=200)
    roles = "<|im_start|>{}\n{}<|im_end|>\n"
    turns = (("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a"))
    assert chat.decode(example.input_ids) + "\n" == "".join(roles.format(*turn) for turn in turns)
    assert chat.decode(supervised(example)) == "a<|im_end|>"


def test_turns_of_tools_in_sharegpt():
    turns = sharegpt(("system", "s"), ("human", "q"), ("function_call", "{}"), ("observation", "o"), ("gpt", "a"))
    ((messages, _),) = conversations({"conversations": turns})
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_an_ambiguous_column_is_refused_and_a_mapping_decides(write, chat):
    record = {"question": "q", "answer": "a", "response": "b"}
    with pytest.raises(ValueError, match=r"several columns could be the completion: response, answer; name one with"):
        load_examples(write(record), chat, max_length=100)
    for columns in ("prompt=question, completion=answer", {"prompt": "question", "completion": "answer"}):
        (example,), _ = load_examples(write(record), chat, max_length=100, columns=columns)
        assert chat.decode(supervised(example)) == "a<|im_end|>"


def test_columns_decide_over_what_would_be_detected(write, chat):
    record = {"messages": [user("x"), assistant("y")], "frage": "q", "gut": "a", "schlecht": "b", "margin": 2}
    columns = "prompt=frage,chosen=gut,rejected=schlecht"
    (item,), _ = load_preferences(write(record), chat, max_length=100, columns=columns)
    assert (chat.decode(item.responses[0]), item.margin) == ("a<|im_end|>", 2.0)
    (prompt,), _ = load_prompts(write(record), chat, max_prompt_length=100, columns="prompt=frage")
    assert prompt.text == "q"
    with pytest.raises(ValueError, match="columns: no column 'fragen', or it is null; columns with a value: messages"):
        load_prompts(write(record), chat, max_prompt_length=100, columns="prompt=fragen")


@pytest.mark.parametrize(
    ("columns", "message"),
    [("promt=q", "'promt' is none of fastrl's names; did you mean 'prompt'"), ("prompt", "expected NAME=COLUMN")],
)
def test_bad_column_mappings(columns, message):
    with pytest.raises(ValueError, match=message):
        read_columns(columns)


# --- what a record says of its turns


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"training": False}, {"loss": 0}])
def test_turns_that_are_marked_so_are_no_targets(mark, write, chat):
    messages = [user("q"), {**assistant("bad"), **mark}, user("r"), {**assistant("good"), **dict.fromkeys(mark, 1)}]
    (example,), _ = load_examples(write({"messages": messages}), chat, max_length=200)
    assert chat.decode(supervised(example)) == "good<|im_end|>"
    assert "bad" in chat.decode(example.input_ids)
    everything = write({"messages": messages[:2]}, QA)
    assert load_examples(everything, chat, max_length=200)[1].reasons == {"no turn is a target": 1}


def test_history_of_a_completion_is_no_target_unless_asked(write, chat):
    prompt = [user("q"), assistant("a"), user("r")]
    (example,), _ = load_examples(write({"prompt": prompt, "completion": "b"}), chat, max_length=200)
    assert chat.decode(supervised(example)) == "b<|im_end|>"
    prompt[1]["train"] = True
    (example,), _ = load_examples(write({"prompt": prompt, "completion": "b"}), chat, max_length=200)
    assert chat.decode(supervised(example)) == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**assistant("a"), "weight": 0.5}, "must be 0, 1, true or false, got 0.5"),
        ({**assistant("a"), "train_detail": [{"begin_offset": 0}]}, "marks parts of a turn"),
        ({**user("a"), "train": True}, "marks a turn of user as a target"),
        ({"role": "assistant", "content": None}, "'messages.1..content' is null or missing"),
        ({"role": "user", "content": [{"type": "image"}]}, "has a part of type 'image'; only text"),
        ({"role": "assistant", "content": {"a": 1}}, "must be a string or a list of text parts, got dict"),
    ],
)
def test_marks_and_contents_that_cannot_be_followed_are_refused(message, reason):
    with pytest.raises(BadRecord, match=reason):
        conversations({"messages": [user("q"), message, assistant("b")]})


def test_an_answer_with_a_label_is_no_instruction_and_no_pair():
    for read in (conversations, comparison):
        with pytest.raises(BadRecord, match=r"says of one answer whether it is good; .*pair the answers"):
            read({**QA, "label": False})
    assert prompts({**QA, "label": False})[0].messages == [user("q")]


@pytest.mark.parametrize("column", ["images", "chat_template_kwargs"])
def test_columns_that_would_change_what_is_trained_are_refused(column):
    for read, record in ((conversations, QA), (prompts, QA), (comparison, {"chosen": "a", "rejected": "b", **QA})):
        with pytest.raises(BadRecord, match=f"'{column}' is not supported"):
            read({**record, column: {"enable_thinking": False}})
        read({**record, column: []})


# --- prompts inside the sides of a pair

TRANSCRIPT = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "prompt", "answers"),
    [
        ({"prompt": "2+2 is?", "chosen": "2+2 is? 4.", "rejected": "2+2 is?\n5."}, "2+2 is?", "4.|5."),
        ({"prompt": TRANSCRIPT, "chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b"}, "hi", "a|b"),
        ({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi!"}, "Hi", "Hi you|Hi!"),
        ({"prompt": "the sky", "chosen": "the sky is", "rejected": "a cloud"}, "the sky", "the sky is|a cloud"),
        ({"prompt": "q", "chosen": "  code\n", "rejected": "\tcode"}, "q", "  code\n|\tcode"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "q", "a|b"),
        ({"messages": [user("q")], "chosen": "a", "rejected": "b"}, "q", "a|b"),
        ({"conversations": sharegpt(("human", "q")), "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, "q", "a|b"),
        ({"prompt": "q", "chosen": json.dumps([user("q"), assistant("a")]),
          "rejected": json.dumps([user("q"), assistant("b")]), "score_chosen": 8.0, "messages": None}, "q", "a|b"),
        ({"messages": [user("q"), assistant("a")], "chosen": [user("q"), assistant("a")],
          "rejected": [user("q"), assistant("b")]}, "q", "a|b"),
    ],
)  # fmt: skip
def test_prompts_are_taken_off_the_sides_that_repeat_them(record, prompt, answers):
    read = comparison({key: value for key, value in record.items() if value is not None})
    assert [message["content"] for message in read.messages] == [prompt]
    assert [message["content"] for message in read.responses] == answers.split("|")


def test_the_system_message_of_a_prompt_stays_before_whole_sides():
    system = {"role": "system", "content": "s"}
    sides = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert comparison({"prompt": [system, user("q")], **sides}).messages == [system, user("q")]


def test_answers_without_a_template_keep_the_space_after_a_repeated_prompt():
    pair = {"prompt": "The sky is", "chosen": "The sky is blue", "rejected": "The sky is red"}
    assert [m["content"] for m in comparison(pair, raw=True).responses] == [" blue", " red"]


# --- bad records

BAD = [
    {"messages": []},
    {"prompt": "q", "completion": None},
    {"messages": [assistant("Welcome!"), user("q"), assistant("a")]},
    {"messages": [user("cut \ud83d"), assistant("a")]},
    {"messages": [user("q"), {"role": "assistant"}]},
    {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]},
    {"messages": "no list"},
    {"prompt": "q", "completion": ""},
    {"unknown": 1},
]


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_record_is_dropped_and_shown_with_its_line(bad, write):
    path = write(QA, QA, bad, QA)
    examples, report = load_examples(path, make_tokenizer(USER_ONLY), max_length=100)
    assert (len(examples), report.kept, report.dropped) == (3, 3, 1)
    assert f"{path}:3" in str(report) and "\n" not in str(report)
    with pytest.raises(ValueError, match="expected at most 0 bad records of 4, got 1.*data.jsonl:3"):
        load_examples(path, make_tokenizer(USER_ONLY), max_length=100, max_bad_records=0)


@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_bad_pairs_and_prompts_are_dropped(load, write, chat):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    bad = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": "a", "rejected": None}]
    bad += [{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}, {"prompt": [], "chosen": "a", "rejected": "b"}]
    if load is load_prompts:
        bad = [*bad[2:], {"prompt": " "}, {"prompt": [assistant("a"), user("q")]}]
    limit = {"max_length": 99} if load is load_preferences else {"max_prompt_length": 99}
    items, report = load(write(good, *bad), chat, **limit)
    assert (len(items), report.dropped) == (1, len(bad))


def test_ten_bad_records_or_the_share_are_allowed_and_no_more(write, chat):
    bad = {"prompt": "q", "completion": ""}
    assert load_examples(write(QA, *[bad] * 10), chat, max_length=99)[1].dropped == 10
    with pytest.raises(
        ValueError, match="max_bad_records 0.01: expected at most 10 bad records of 12, got 11: .*empty"
    ):
        load_examples(write(QA, *[bad] * 11), chat, max_length=99)
    assert load_examples(write(QA, *[bad] * 11), chat, max_length=99, max_bad_records=0.95)[1].dropped == 11
    with pytest.raises(ValueError, match=r"max_bad_records: expected a share in \[0, 1\], got 2"):
        load_examples(write(QA), chat, max_length=99, max_bad_records=2)
    long = {"prompt": "q " * 99, "completion": "a"}  # nothing is wrong with these
    assert load_examples(write(QA, *[long] * 11), chat, max_length=99)[1].dropped == 11


def test_a_broken_file_stays_an_error_with_its_line(write, chat):
    with pytest.raises(ValueError, match=r"data\.jsonl:2: broken JSON"):
        load_examples(write(QA, '{"prompt": '), chat, max_length=99)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: JSON nested too deep"):
        load_examples(write(QA, '{"a":' + "[" * 100_000), chat, max_length=99)


# --- several sources


def test_lists_globs_and_folders_are_read_in_order(write, tmp_path, monkeypatch):
    for name in ("b", "a"):
        write({"prompt": name}, name=f"many/{name}.jsonl")
    write({"prompt": "c"}, name="c.json")
    write("no data", name="many/README.md")

    def read(source):
        return [record["prompt"] for _, record in read_records(source)]

    assert read(tmp_path / "many") == read(f"{tmp_path}/many/*.jsonl") == ["a", "b"]
    assert read([str(tmp_path / "c.json"), tmp_path / "many"]) == ["c", "a", "b"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/c.json") == ["c"]
    with pytest.raises(FileNotFoundError, match="no data file there"):
        read(f"{tmp_path}/many/*.csv")


def test_splits_in_a_folder_are_not_mixed(write, tmp_path):
    for name in ("train-00000", "train-00001", "test-00000"):
        write({"prompt": name}, name=f"data/{name}.jsonl")
    with pytest.raises(ValueError, match="this folder holds the splits test, train; name one: .*data:train"):
        list(read_records(tmp_path / "data"))
    assert len(list(read_records(f"{tmp_path}/data:train"))) == 2
    assert [r["prompt"] for _, r in read_records(f"{tmp_path}/data:test")] == ["test-00000"]


def test_long_csv_cells(tmp_path):
    with open(tmp_path / "long.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "messages"], ["x" * 200_000, json.dumps([user("q"), assistant("a")])]])
    ((_, record),) = read_records(tmp_path / "long.csv")
    assert len(record["prompt"]) == 200_000
    assert conversations(record)[0].messages[0] == user("q")


def test_records_of_the_recipes_data_as_their_publishers_have_them(write, chat):
    """UltraFeedback (binarized) is read by all three loops; TL;DR without a template."""
    pair = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    feedback = {
        "prompt": "q",
        "prompt_id": "0f",
        "messages": pair["chosen"],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }
    path = write(feedback | pair)
    (example,), _ = load_examples(path, chat, max_length=100)
    (item,), _ = load_preferences(path, chat, max_length=100)
    (prompt,), _ = load_prompts(path, chat, max_prompt_length=100)
    assert chat.decode(supervised(example)) == "a<|im_end|>" == chat.decode(item.responses[0])
    assert (chat.decode(item.responses[1]), item.margin, prompt.text) == ("b<|im_end|>", 0.0, "q")
    assert prompt.input_ids == item.prompt_ids == example.input_ids[: len(prompt.input_ids)]

    post = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    (item,), _ = load_preferences(
        write({"prompt": post, "chosen": " a", "rejected": " b"}), chat, max_length=100, template="none"
    )
    (prompt,), _ = load_prompts(
        write({"prompt": post, "completion": " a"}), chat, max_prompt_length=100, template="none"
    )
    assert chat.decode(prompt.input_ids) == chat.decode(item.prompt_ids) == post
    assert chat.decode(item.responses[0]).startswith(" a")

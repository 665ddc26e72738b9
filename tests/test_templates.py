"""What is trained is what the chat template says: shapes of real templates, written anew, on several tokenizers."""

from __future__ import annotations

import json

import pytest
from chats import CHATML, FORGETFUL, INST, assistant, make_tokenizer, supervised, user
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fastrl.data import load_examples, load_preferences, load_prompts
from fastrl.data.bad_records import BadRecord
from fastrl.data.rendering import render_asked, render_conversation, tokenize
from fastrl.data.templates import (
    check_same_template,
    choose_template,
    end_token_id,
    read_template,
    record_template,
    recorded_template,
    render_prompt,
)

ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
# An empty thought before the last answer, thoughts of earlier answers dropped.
THINKING = (
    "{% for m in messages %}{% set c = m['content'] %}{% set t = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + t + '\n</think>\n\n' }}{% endif %}"
    "{{ c + '<|im_end|>\n' }}{% endfor %}" + ASKS
)
OPENS_THOUGHT = THINKING.replace(ASKS, ASKS.replace("assistant\n", "assistant\n<think>\n"))
# No answer keeps its thought, and the prompt opens one all the same.
DROPS_THOUGHT = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    + ASKS.replace("assistant\n", "assistant\n<think>\n")
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)
HEADERS = (  # bos in the text, trimmed content, end of turn that is not eos
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '|\n\n' + (m['content'] | trim) }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant|\n\n' }}{% endif %}"
)
EOS_AT_END = (  # eos after the whole, but not after a prompt
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN_NAMES = (  # "USER: q ASSISTANT: a</s>"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}{{ '<call>' + c['function']['name'] + c['function']['arguments'] }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)
# As for TRL's assistant_only_loss: answers stand between markers, which write nothing.
MARKED = TOOLS.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] != 'assistant' %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% else %}{% generation %}{% if m['content'] %}{{ m['content'] }}{% endif %}",
).replace(
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKS,
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}" + ASKS,
)
SHAPES = {
    "chatml": CHATML,
    "no generation prompt": NO_GENERATION_PROMPT,
    "thinking": THINKING,
    "opens a thought": OPENS_THOUGHT,
    "drops thoughts": DROPS_THOUGHT,
    "inst": INST,
    "headers": HEADERS,
    "eos at the end": EOS_AT_END,
    "plain names": PLAIN_NAMES,
    "forgetful": FORGETFUL,
    "tools": TOOLS,
}


def sentencepiece_like(template: str) -> PreTrainedTokenizerFast:
    """Pieces that begin with the space before a word, and a space in front of every text: parts give other ids."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", *[f"<0x{i:02X}>" for i in range(256)]]
    core.train_from_iterator(
        ["What is it? It is Paris. USER: ASSISTANT: user assistant [INST] [/INST] q1 a1\n"] * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


def without_offsets(template: str) -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer(
        extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"], eos_token="<eos>", bos_token="<bos>"
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    "bytes": lambda template: make_tokenizer(template, bos="<bos>"),
    "sentencepiece": sentencepiece_like,
    "no offsets": without_offsets,
}


def load_one(tokenizer, messages, tmp_path, **options):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (example,), report = load_examples(path, tokenizer, max_length=1000, **options)
    return example, report


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("thought", ["", "<think>\nhm\n</think>\n\n"], ids=["plain", "thought"])
@pytest.mark.parametrize("turns", [1, 2])
def test_ids_are_those_of_the_whole_conversation(kind, shape, thought, turns, tmp_path):
    tokenizer = TOKENIZERS[kind](SHAPES[shape])
    messages = [m for i in range(turns) for m in (user(f"q{i} is"), assistant(f"{thought}It is\n  a{i}."))]
    example, _ = load_one(tokenizer, messages, tmp_path)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    count = len(example.input_ids)
    assert example.input_ids == whole[:count]
    assert count > 0.7 * len(whole) and tokenizer.decode(whole[count:]) in ("", "\n", "\n<eos>", "<eos>")
    targets = tokenizer.decode(supervised(example))
    assert targets.endswith(tokenizer.decode([end_token_id(tokenizer)])) and f"a{turns - 1}." in targets
    assert not any(f"q{i}" in targets for i in range(turns))


def test_a_template_without_an_end_gets_the_eos_token_once(tmp_path):
    tokenizer = make_tokenizer(ENDLESS)
    example, _ = load_one(tokenizer, [user("q"), assistant("a"), user("r"), assistant("b")], tmp_path)
    assert tokenizer.decode(example.input_ids) == "user: q\nassistant: a\nuser: r\nassistant: b<eos>"
    assert tokenizer.decode(supervised(example)) == " a b<eos>"


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ("thinking", "<think>\n\n</think>\n\na1<|im_end|>"),
        ("opens a thought", "\n</think>\n\na1<|im_end|>"),
        ("drops thoughts", "a1<|im_end|>"),
        ("no generation prompt", "a1<|im_end|>"),
        ("plain names", " a1<eos>"),
        ("headers", "a1<|im_end|>"),
        ("eos at the end", "a1<|im_end|>"),
    ],
)
def test_targets_are_what_follows_the_prompt(shape, targets, tmp_path):
    tokenizer = make_tokenizer(SHAPES[shape])
    example, report = load_one(tokenizer, [user("q1"), assistant("a1")], tmp_path)
    assert tokenizer.decode(supervised(example)) == targets
    prompt = tokenizer.decode(example.input_ids).removesuffix(targets)
    asked = render_prompt(tokenizer, [user("q1")])
    assert asked == prompt or (shape == "drops thoughts" and asked == prompt + "<think>\n")
    assert ("1 answers do not begin as the template's generation prompt does" in str(report)) == (asked != prompt)


def test_thoughts_of_the_answer_follow_a_prompt_that_opens_them(tmp_path):
    tokenizer = make_tokenizer(OPENS_THOUGHT)
    example, _ = load_one(tokenizer, [user("q1"), assistant("<think>\nhm\n</think>\n\na1")], tmp_path)
    assert tokenizer.decode(supervised(example)) == "hm\n</think>\n\na1<|im_end|>"


def test_content_in_parts_for_a_template_that_wants_parts(tmp_path):
    tokenizer = make_tokenizer(PARTS)
    parts = [{"role": "user", "content": [{"type": "text", "text": "q1"}]}, assistant("a1")]
    for messages in ([user("q1"), assistant("a1")], parts):
        example, _ = load_one(tokenizer, messages, tmp_path)
        assert (
            tokenizer.decode(example.input_ids) == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>"
        )
    tokenizer.chat_template = CHATML
    example, _ = load_one(tokenizer, parts, tmp_path)
    assert tokenizer.decode(supervised(example)) == "a1<|im_end|>"


def test_an_answer_that_brings_its_end_token_has_it_once(tmp_path):
    for template, end in ((CHATML, "<|im_end|>"), (None, "<eos>"), (ENDLESS, "<eos>")):
        tokenizer = make_tokenizer(template)
        example, _ = load_one(tokenizer, [user("q1"), assistant(f"a1{end}\n")], tmp_path)
        assert tokenizer.decode(supervised(example)).lstrip() == f"a1{end}"


def test_space_around_an_answer_is_kept_unless_the_template_trims_it(tmp_path):
    code = "\n    return 1\n\n"
    example, _ = load_one(make_tokenizer(CHATML), [user("q1"), assistant(code)], tmp_path)
    assert make_tokenizer().decode(supervised(example)) == f"{code}<|im_end|>"
    example, _ = load_one(make_tokenizer(), [user("q1"), assistant(code)], tmp_path)
    assert make_tokenizer().decode(supervised(example)) == f"{code}<eos>"
    example, _ = load_one(make_tokenizer(HEADERS), [user("q1"), assistant(code)], tmp_path)
    assert make_tokenizer().decode(supervised(example)) == "return 1<|im_end|>"


def test_a_token_across_prompt_and_answer_is_a_target():
    """ "assistant\\n" + "\\nx" has one token for both line breaks: the ids are the template's, and it is learned."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens("\n\n")
    template = read_template(tokenizer)
    rendered = render_conversation(template, [user("q"), assistant("\nx")])
    (tokens,) = tokenize(template, [rendered])
    assert tokens.input_ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    ((start, end),) = tokens.spans
    assert tokenizer.decode(tokens.input_ids[start:end]) == "\n\nx<|im_end|>"


def test_preferences_add_up_to_the_templates_ids(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "q1", "chosen": "\nIt is", "rejected": "It is not"}) + "\n")
    for shape, template in SHAPES.items():
        for kind, make in TOKENIZERS.items():
            tokenizer = make(template)
            (item,), _ = load_preferences(path, tokenizer, max_length=500)
            for text, response in zip(("\nIt is", "It is not"), item.responses, strict=True):
                whole = tokenizer.apply_chat_template([user("q1"), assistant(text)], return_dict=False)
                ids = item.prompt_ids + response
                assert ids == whole[: len(ids)], (shape, kind)
                assert response[-1] == end_token_id(tokenizer)


def test_bos_of_the_template_is_not_doubled(tmp_path):
    tokenizer = make_tokenizer(HEADERS, bos="<bos>")
    example, _ = load_one(tokenizer, [user("q1"), assistant("a1")], tmp_path)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


# --- nothing that a record says is lost


def test_turns_that_the_template_leaves_out_are_refused():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    template = read_template(make_tokenizer(silent))
    messages = [{"role": "system", "content": "Be kind."}, user("q"), assistant("a")]
    with pytest.raises(BadRecord, match="does not write 'Be kind.'"):
        render_conversation(template, messages)
    with pytest.raises(BadRecord, match="does not write 'Be kind.'"):
        render_asked(template, messages[:2])
    with pytest.raises(BadRecord, match="does not write the last answer's"):
        render_conversation(template, [user("q"), {**assistant("a"), "reasoning_content": "hm"}])


def test_developer_is_a_system_message_where_the_template_has_no_such_role():
    messages = [{"role": "developer", "content": "Be kind."}, user("q"), assistant("a")]
    assert "<|im_start|>system\nBe kind." in render_conversation(read_template(make_tokenizer(CHATML)), messages).text
    knows = "{# developer #}" + CHATML
    assert "<|im_start|>developer\nBe" in render_conversation(read_template(make_tokenizer(knows)), messages).text


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"at": "sea"}'}}
TOOL_TURNS = [
    user("weather?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    assistant("It is sunny."),
]


def test_tool_turns_are_passed_to_the_template(tmp_path):
    tokenizer = make_tokenizer(TOOLS)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for given in (tools, json.dumps(tools)):
        path = tmp_path / "tools.jsonl"
        path.write_text(json.dumps({"messages": TOOL_TURNS, "tools": given}) + "\n")
        (example,), _ = load_examples(path, tokenizer, max_length=500)
        whole = tokenizer.apply_chat_template(TOOL_TURNS, tools=tools, return_dict=False)
        assert example.input_ids == whole[: len(example.input_ids)]
        assert tokenizer.decode(supervised(example)) == ('<call>weather{"at": "sea"}<|im_end|>It is sunny.<|im_end|>')


@pytest.mark.parametrize("turns", [TOOL_TURNS, [{"role": "system", "content": "Be brief."}, *TOOL_TURNS, *TOOL_TURNS]])
def test_targets_are_those_that_generation_markers_name(turns, tmp_path):
    """In a template that has markers, of which nothing is read: transformers' own mask of the assistant's tokens."""
    example, _ = load_one(make_tokenizer(MARKED), turns, tmp_path)
    whole = make_tokenizer(MARKED).apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    count = len(example.input_ids)
    assert example.input_ids == whole["input_ids"][:count] and not any(whole["assistant_masks"][count:])
    assert example.loss_mask == [bool(kept) for kept in whole["assistant_masks"][:count]]
    assert sum(example.loss_mask) > 0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "forgetful"])
def test_every_answer_is_a_target_but_those_that_are_marked(shape, tmp_path):
    turns = [m for i in range(4) for m in (user(f"q{i}"), assistant(f"a{i}"))]
    turns[3]["weight"] = 0
    example, _ = load_one(make_tokenizer(SHAPES[shape], bos="<bos>"), turns, tmp_path)
    targets = make_tokenizer().decode(supervised(example))
    assert [answer for answer in ("a0", "a1", "a2", "a3") if answer in targets] == ["a0", "a2", "a3"]
    assert "q" not in targets and targets.count("a") == 3


def test_tool_turns_that_the_template_cannot_write_are_refused():
    for template in (CHATML, CHATML.replace("m['content']", "(m['content'] or '')")):
        with pytest.raises(BadRecord, match="does not write tool calls"):
            render_conversation(read_template(make_tokenizer(template)), TOOL_TURNS)
    old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    with pytest.raises(BadRecord, match="does not write 'function_call'"):
        render_conversation(read_template(make_tokenizer(TOOLS)), [user("q"), old])
    with pytest.raises(BadRecord, match="does not write a list of tools"):
        render_conversation(read_template(make_tokenizer(CHATML)), [user("q"), assistant("a")], [{"name": "x"}])
    with pytest.raises(BadRecord, match="'alpaca' cannot write turns of tools"):
        render_asked(read_template(make_tokenizer()), [user("q"), {"role": "tool", "content": "x"}])


def test_a_template_that_cannot_write_an_answer_is_an_error():
    with pytest.raises(ValueError, match="leaves out the question or the answer"):
        read_template(make_tokenizer("hello"))
    with pytest.raises(ValueError, match="cannot write a question and an answer"):
        read_template(make_tokenizer("{% for m in messages %}{{ 1 + m['content'] }}{% endfor %}"))


def test_a_prompt_that_changes_with_the_answer_is_refused_with_the_first_difference():
    changing = CHATML.replace("{% for", "{{ messages | length }}{% for", 1)
    with pytest.raises(BadRecord, match=r"writes the prompt differently once the answer is there: '1<\|im_start"):
        render_conversation(read_template(make_tokenizer(changing)), [user("q"), assistant("a")])


# --- no template


def test_raw_text_is_trained_on_as_it_is(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text(json.dumps({"text": " Once upon"}) + "\n")
    tokenizer = make_tokenizer(CHATML, bos="<bos>")
    (example,), _ = load_examples(path, tokenizer, max_length=100, template="none")
    assert tokenizer.decode(example.input_ids) == "<bos> Once upon<eos>"
    assert tokenizer.decode(supervised(example)) == " Once upon<eos>"
    (example,), _ = load_examples(path, make_tokenizer(), max_length=100, template="none")
    assert example.loss_mask == [False] + [True] * (len(example.loss_mask) - 1)
    with pytest.raises(ValueError, match="'text' is raw text: set template to none"):
        load_examples(path, tokenizer, max_length=100)


def test_prompt_and_answer_without_a_template_are_joined_as_they_are(tmp_path):
    path = tmp_path / "raw.jsonl"
    record = {"prompt": "The sky is", "completion": " blue.", "chosen": " blue.", "rejected": " green."}
    path.write_text(json.dumps(record) + "\n")
    tokenizer = make_tokenizer(CHATML)
    (example,), _ = load_examples(path, tokenizer, max_length=100, template="none")
    assert tokenizer.decode(example.input_ids) == "The sky is blue.<eos>"
    assert tokenizer.decode(supervised(example)) == " blue.<eos>"
    (item,), _ = load_preferences(path, tokenizer, max_length=100, template="none")
    assert item.prompt_ids + item.responses[0] == example.input_ids
    (prompt,), _ = load_prompts(path, tokenizer, max_prompt_length=100, template="none")
    assert prompt.input_ids == item.prompt_ids


# --- the template travels with the model


def test_the_template_is_recorded_in_the_saved_tokenizer(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    assert record_template(tokenizer, "alpaca") == "alpaca"
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "two")
    assert recorded_template(again) == recorded_template(tmp_path / "two") == choose_template(again) == "alpaca"
    assert render_prompt(again, [user("q")]).startswith("Below is an instruction")
    with pytest.raises(ValueError, match="template: expected 'alpaca', with which .*two was trained, got 'chat'"):
        choose_template(again, "chat")
    assert recorded_template(make_tokenizer(CHATML)) is recorded_template(tmp_path / "nowhere") is None


def test_two_models_with_different_templates_are_an_error(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    record_template(tokenizer, "chat")
    tokenizer.save_pretrained(tmp_path)
    check_same_template("chat", "policy", str(tmp_path))
    with pytest.raises(ValueError, match="got 'alpaca' for the policy policy and 'chat', with which the reward model"):
        check_same_template("alpaca", "policy", str(tmp_path))


def test_raw_text_may_be_followed_by_a_template_that_is_taught():
    tokenizer = make_tokenizer(CHATML)
    record_template(tokenizer, "none")
    assert choose_template(tokenizer) == "none"
    with pytest.raises(ValueError, match="expected 'none'"):
        record_template(tokenizer, "chat")
    assert record_template(tokenizer, "chat", teach=True) == choose_template(tokenizer) == "chat"

"""Templates: the one place where conversations become text and token ids."""

from collections.abc import Collection, Sequence
from typing import Any

from spin.data.formats import Message
from spin.runtime.errors import UserError, brief, explaining

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
ANCHOR = "\n"  # see encode_responses
SENTINEL = "Sentinel"  # the answer that end_of_turn looks for in a rendered conversation


def encode_prompts(
    tokenizer: Any, conversations: Sequence[list[Message]], template: str
) -> list[tuple[str, list[int]]]:
    """Return the text and the token ids (with one BOS if the tokenizer uses it) of each prompt.

    `template` is `chat` (the tokenizer's own), `paper`, or a text with `{prompt}` in it. Raises UserError: the tokenizer
    has no chat template, or its template refuses the messages.
    """
    texts = [render_prompt(tokenizer, messages, template) for messages in conversations]
    return list(zip(texts, _encode_sequences(tokenizer, texts, template), strict=True))


def encode_responses(
    tokenizer: Any, prompts: Sequence[tuple[str, list[int]]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """Return the token ids of each response that follows a prompt (text and ids of `encode_prompts`), without EOS.

    The sequence always starts with the prompt's ids. If the ids of prompt and response tokenised together do too, the
    rest is the response. Otherwise text merges at the boundary: the response is tokenised after a line feed, so that a
    sentencepiece tokenizer adds no blank before it, and the line feed's ids are removed.
    """
    texts = [text + response for (text, _), response in zip(prompts, responses, strict=True)]
    sequences = _encode_sequences(tokenizer, texts, template)
    encoded = []
    for (_, prefix), ids, response in zip(prompts, sequences, responses, strict=True):
        if ids[: len(prefix)] != prefix:
            prefix, ids = token_ids(tokenizer, [ANCHOR, ANCHOR + response])
        if ids[: len(prefix)] != prefix:
            prefix, ids = [], token_ids(tokenizer, [response])[0]
        encoded.append(ids[len(prefix) :])
    return encoded


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without the special tokens that the tokenizer adds."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _encode_sequences(tokenizer: Any, texts: list[str], template: str) -> list[list[int]]:
    """Return the ids of texts that start with a rendered prompt: one BOS if the tokenizer adds it, no EOS."""
    encoded = token_ids(tokenizer, texts)
    bos = tokenizer.bos_token_id
    # A chat template writes the BOS itself where the model expects it; a text template rarely does.
    if template != "chat" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        encoded = [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    return encoded


def render_prompt(tokenizer: Any, messages: list[Message], template: str) -> str:
    """Return a prompt's text up to the start of the answer. Raises UserError as `encode_prompts` does.

    A text template renders earlier turns as template, answer, EOS, and puts a system message before the first user
    message.
    """
    if template == "chat":
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    # A command line passes a line feed as the two characters \n.
    pattern = PAPER_TEMPLATE if template == "paper" else template.replace("\\n", "\n")
    system = text = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            # replace, not format: a template may hold other braces
            text += pattern.replace("{prompt}", system + message["content"])
            system = ""
        else:
            text += message["content"] + tokenizer.eos_token
    return text


def render_chat(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    """Return the conversation as the tokenizer's chat template renders it, on a fixed date if it prints one."""
    advice = "set data.template=paper or a text with {prompt} in it"
    if not tokenizer.chat_template:
        raise UserError(f"data.template=chat: the model's tokenizer has no chat template; {advice}")
    roles = brief(", ".join(message["role"] for message in messages))
    # A template is a program that comes with the model and may raise anything.
    with explaining(f"data.template=chat: the tokenizer's chat template refuses messages of {roles}", advice):
        source = tokenizer.get_chat_template()
        if "strftime_now" in source:
            source = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}" + source
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=source, **options)


def end_of_turn(tokenizer: Any, stop_ids: Collection[int], template: str) -> int:
    """Return the token that ends an answer. Raises UserError: the tokenizer has no EOS, or no chat template.

    With the chat template, this is the first of `stop_ids` after a rendered answer, as in the model's own training;
    with a text template, or if there is none, EOS.
    """
    if template == "chat":
        messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": SENTINEL}]
        after_answer = render_chat(tokenizer, messages).rpartition(SENTINEL)[2]
        for token in token_ids(tokenizer, [after_answer])[0]:
            if token in stop_ids:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token: set its eos_token, or use another model")
    return tokenizer.eos_token_id


def special_texts(tokenizer: Any) -> list[str]:
    """Return the texts that the tokenizer turns into special tokens wherever they stand, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {text for text in [*tokenizer.all_special_tokens, *added] if text.strip()}
    return sorted(texts, key=lambda text: (-len(text), text))

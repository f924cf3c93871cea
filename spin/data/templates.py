"""Render conversations as text and token ids, which only this module does."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from spin.data.messages import Exchange, Message
from spin.data.sandbox import TODAY, render_programs
from spin.runtime.errors import UserError, brief, explaining

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
ANCHOR = "\n"  # see encode_responses
SENTINEL = "Sentinel"  # a placeholder, to find its position in a rendered conversation
STAND_IN = {"role": "assistant", "content": SENTINEL}
QUESTION = {"role": "user", "content": "Question"}
NO_OPTIONS: Mapping[str, Any] = {}
SUBJECT = "data.template=chat: the tokenizer's chat template"  # in error messages


def encode_prompts(
    tokenizer: Any, conversations: Sequence[list[Message]], template: str, options: Mapping[str, Any] = NO_OPTIONS
) -> list[tuple[str, list[int]]]:
    """Return the text and the token ids (with one BOS, if used) of each prompt.

    `template` is `chat` (the tokenizer's own, with `options`), `paper`, or a text with `{prompt}`.
    Raises UserError if the tokenizer has no chat template, or its template refuses the messages.
    """
    if template == "chat":
        texts = list(map(ChatTemplate(tokenizer, options).prompt, conversations))
    else:
        texts = [render_text(tokenizer, messages, template) for messages in conversations]
    return list(zip(texts, _encode_sequences(tokenizer, texts, template), strict=True))


def encode_responses(
    tokenizer: Any, prompts: Sequence[tuple[str, list[int]]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """Return the token ids, without EOS, of responses to prompts from `encode_prompts`.

    If prompt and response tokenised together start with the prompt's ids, the remaining ids are the response's.
    Otherwise a token spans the boundary, and the response is tokenised after a line feed, whose ids are removed, since
    a SentencePiece tokenizer adds a blank at the start of a text.
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
    """Return the token ids of each text, without the special tokens that the tokenizer adds."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _encode_sequences(tokenizer: Any, texts: list[str], template: str) -> list[list[int]]:
    """Return the token ids of texts that start with a rendered prompt: one BOS if the tokenizer adds it, no EOS."""
    encoded = token_ids(tokenizer, texts)
    bos = tokenizer.bos_token_id
    # A chat template writes the BOS itself if the model expects one; a text template rarely does.
    if template != "chat" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        encoded = [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    return encoded


def render_text(tokenizer: Any, messages: list[Message], template: str) -> str:
    """Render a prompt with a text template. Each earlier turn is the filled template, the answer and EOS."""
    # On the command line a line feed is given as the two characters \n.
    pattern = PAPER_TEMPLATE if template == "paper" else template.replace("\\n", "\n")
    text = ""
    for message in without_system(messages):
        if message["role"] == "user":
            # Not str.format, since there may be other braces.
            text += pattern.replace("{prompt}", message["content"])
        else:
            text += message["content"] + tokenizer.eos_token
    return text


def without_system(messages: list[Message]) -> list[Message]:
    """Return the messages with each system text prepended to the next user message."""
    merged: list[Message] = []
    system = ""
    for message in messages:
        if message["role"] == "system":
            system += message["content"] + "\n\n"
        elif message["role"] == "user":
            merged.append({**message, "content": system + message["content"]})
            system = ""
        else:
            merged.append(message)
    return merged


def render_chat(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """Render a conversation with the tokenizer's chat template and a fixed date. Raises UserError."""
    [text] = render_chats(tokenizer, [(messages, options)])
    if isinstance(text, UserError):
        raise text
    return text


def render_chats(tokenizer: Any, requests: Sequence[tuple[Sequence[Message], dict[str, Any]]]) -> list[str | UserError]:
    """Render messages, with options for each request. Return for each the text, or the error if it is refused.

    Raises UserError if there is no chat template, or it takes too much time or memory.
    """
    advice = "set data.template=paper or a text with {prompt} in it"
    if not tokenizer.chat_template:
        raise UserError(f"data.template=chat: the model's tokenizer has no chat template; {advice}")
    with explaining(SUBJECT, advice):  # a template is a program that comes with the model
        programs = [
            (tokenizer.get_chat_template(tools=options.get("tools")), messages, tokenizer.special_tokens_map | options)
            for messages, options in requests
        ]
        rendered = render_programs(programs)
    texts: list[str | UserError] = []
    for (messages, _), (succeeded, text) in zip(requests, rendered, strict=True):
        roles = brief(", ".join(message["role"] for message in messages))
        texts.append(text if succeeded else UserError(f"{SUBJECT} refuses messages of {roles} ({text}); {advice}."))
    return texts


@dataclass(frozen=True)
class Split:
    """A rendered conversation, split where the generation of the answer starts."""

    prompt: str
    response: str  # up to the end token, exclusive


class ChatTemplate:
    """A tokenizer's chat template with `options`: where it places an answer, and which messages it supports.

    A prompt ends where the answer begins in the rendered conversation, so text before every answer, such as an empty
    thought, is part of the prompt. Blanks in between belong to the answer: most tokenizers join them to its first word.

    Raises UserError if there is no chat template, or it refuses a simple conversation or omits its answer.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] = NO_OPTIONS):
        self.tokenizer, self.options = tokenizer, dict(options)
        self.head, self.tail = self._around([QUESTION])
        if not self.head:
            raise UserError(f"{SUBJECT} leaves the answer out; set data.template")
        answer = {"role": "assistant", "content": "Answer"}
        with_system = [{"role": "system", "content": SENTINEL}, QUESTION, answer]
        with_thought = [QUESTION, answer | {"reasoning_content": SENTINEL}]
        self.takes_system, self.takes_thoughts = map(self._shows, (with_system, with_thought))
        source = str(tokenizer.chat_template)
        self.takes_tools = "tool_calls" in source and "tools" in source
        self.refusal = ""  # the error for the first messages that the template refuses

    def _shows(self, messages: list[Message]) -> bool:
        """Return whether the template renders SENTINEL in the messages; not if it refuses them or takes too long."""
        try:
            return SENTINEL in render_chat(self.tokenizer, messages, **self.options)
        except UserError:
            return False

    @cached_property
    def end(self) -> int | None:
        """The special or added token after an answer, or None if there is only plain text or nothing."""
        known = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        ids = token_ids(self.tokenizer, [self.tail])[0]
        named = [token for token in ids if token in known]  # some tokenizers have added tokens for runs of blanks
        return next((token for token in named if str(self.tokenizer.convert_ids_to_tokens(token)).strip()), None)

    def prompt(self, messages: list[Message]) -> str:
        """Return the text up to the answer. Raises UserError if the template refuses the messages."""
        return self._around(self.fit(messages))[0].rstrip(" \t")

    def splits(self, exchanges: Sequence[Exchange]) -> list[Split | str]:
        """Return the `Split` of each exchange, or the reason why there is none.

        An answer with a thought starts at the generation prompt, where other answers have the template's empty thought.
        """
        requests: list[tuple[Sequence[Message], dict[str, Any]]] = []
        for exchange in exchanges:
            messages = self.fit(exchange.messages)
            options = self.options | ({"tools": exchange.tools} if exchange.tools else {})
            requests.append((messages, options | {"add_generation_prompt": True}))
            requests += [([*messages, answer], options) for answer in (STAND_IN, exchange.answer)]
        texts = render_chats(self.tokenizer, requests)
        return [self._split(e, *texts[3 * i : 3 * i + 3]) for i, e in enumerate(exchanges)]

    def _split(self, exchange: Exchange, *texts: str | UserError) -> Split | str:
        """Split an exchange, whose `texts` end with the generation prompt, with `STAND_IN`, and with its answer."""
        for text in texts:
            if isinstance(text, UserError):
                self.refusal = self.refusal or str(text)
                return "refused by the template"
        opened, stand_in, whole = map(str, texts)
        head, _, tail = stand_in.rpartition(SENTINEL)
        if not head or not whole.endswith(tail):
            return "not rendered by the template"
        body = whole.removesuffix(tail)
        answer = body.removeprefix(commonprefix([opened, body]))  # noqa: RUF071
        keeps_thought = "</think>" not in exchange.answer["content"] or "</think>" in answer
        ending = tail.rstrip()
        if self.end is not None:
            ending = tail.partition(self.tokenizer.convert_ids_to_tokens(self.end))[0]
        for prompt in (head.rstrip(" \t"), opened.rstrip(" \t")):
            if body.startswith(prompt) and keeps_thought:
                return Split(prompt, body.removeprefix(prompt) + ending)
        return "thought that the template has no place for"

    def fit(self, messages: list[Message]) -> list[Message]:
        """Return the messages, merging system messages into user messages if the template supports none."""
        return messages if self.takes_system else without_system(messages)

    def notes(self, stop_ids: Collection[int]) -> Iterator[str]:
        """Yield notes for the user on the template."""
        opened = render_chat(self.tokenizer, [QUESTION], **self.options, add_generation_prompt=True)
        common = commonprefix([opened, self.head])  # noqa: RUF071  # of texts, not of paths
        prompt_end, inserted = opened.removeprefix(common), self.head.removeprefix(common)
        if not prompt_end:
            if inserted.strip():
                yield f"note: the chat template puts {inserted!r} before an answer; it is part of the prompt"
        else:
            remedy = "data.template to a text with {prompt} in it"
            if "enable_thinking" in str(self.tokenizer.chat_template):
                remedy = "data.template_options={enable_thinking: false}, or " + remedy
            yield (
                f"note: the chat template ends a prompt with {prompt_end!r}, where a whole conversation has "
                f"{repr(inserted) if inserted else 'nothing'} before an answer: prompts end as in the conversation here, "
                f"for human and generated answers. To change it, set {remedy}"
            )
        if "strftime_now" in str(self.tokenizer.chat_template):
            yield f"note: the chat template prints the date; it is {TODAY:%d %b %Y} here, so that a run can be repeated"
        if self.end is None and self.tail.strip():
            yield (
                f"note: the chat template ends answers with {self.tail.strip()!r}, which is no token of the tokenizer: "
                "it is learnt as text, and the tokenizer's end token follows"
            )
        if self.end is not None and self.end not in stop_ids:
            name = self.tokenizer.convert_ids_to_tokens(self.end)
            yield f"note: the chat template ends answers with {name}, so that generation stops there, too"

    def _around(self, messages: list[Message]) -> tuple[str, str]:
        """Return the rendered text before and after a plain answer to the messages."""
        text = render_chat(self.tokenizer, [*messages, STAND_IN], **self.options)
        head, _, tail = text.rpartition(SENTINEL)
        return head, tail


def encode_exchanges(
    tokenizer: Any, exchanges: Sequence[Exchange], template: str, chat: ChatTemplate | None
) -> list[tuple[list[int], list[int]] | str]:
    """Return the token ids of each prompt and its answer without the end token, or the reason why there are none."""
    splits: Sequence[Split | str]
    if chat:
        splits = chat.splits(exchanges)
    else:
        splits = [Split(render_text(tokenizer, e.messages, template), e.answer["content"]) for e in exchanges]
    rendered = [split for split in splits if isinstance(split, Split)]
    texts = [split.prompt for split in rendered]
    prompts = list(zip(texts, _encode_sequences(tokenizer, texts, template), strict=True))
    responses = encode_responses(tokenizer, prompts, [split.response for split in rendered], template)
    encoded = iter([(ids, response) for (_, ids), response in zip(prompts, responses, strict=True)])
    return [next(encoded) if isinstance(split, Split) else split for split in splits]


def end_of_turn(tokenizer: Any, chat: ChatTemplate | None) -> int:
    """Return the token that ends an answer: the special token after it in the chat template, if used, or EOS.

    Raises UserError if there is neither.
    """
    if chat and chat.end is not None:
        return chat.end
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token: set its eos_token, or use another model")
    return tokenizer.eos_token_id


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a hash of everything that determines the token ids of a text or conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
    settings = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template, added]
    return hashlib.sha256(json.dumps([content, settings], sort_keys=True, default=str).encode()).hexdigest()


def special_texts(tokenizer: Any) -> list[str]:
    """Return the texts that are tokenised as special tokens anywhere in a text, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {text for text in [*tokenizer.all_special_tokens, *added] if text.strip()}
    return sorted(texts, key=lambda text: (-len(text), text))

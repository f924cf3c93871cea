"""Templates: conversations to text and token ids."""

from collections.abc import Collection, Sequence
from typing import Any

from spin.data.formats import Message
from spin.runtime.errors import UserError, brief

PAPER_TEMPLATE = "### Instruction: {prompt}\n\n### Response: "
ANCHOR = "\n"  # see encode_responses
SENTINEL = "Sentinel"  # an answer that end_of_turn looks for in a rendered conversation


# ---------------------------------------------------------------------------------------- template and token ids


def encode_prompts(
    tokenizer: Any, conversations: Sequence[list[Message]], template: str
) -> list[tuple[str, list[int]]]:
    """Render and tokenise prompts: for each list of messages, which ends with the user's, its text and its token ids.

    The one place where a prompt becomes token ids. `template` is `chat` (the tokenizer's own), `paper`, or a text with
    `{prompt}` in it. Earlier turns of a text template are rendered as template, answer, end token; a system message
    goes before the first user message. A beginning-of-sequence token is there once, if the tokenizer uses one.

    Raises UserError: the tokenizer has no chat template, or its template refuses the messages.
    """
    texts = [render_prompt(tokenizer, messages, template) for messages in conversations]
    return list(zip(texts, _tokenise(tokenizer, texts, template), strict=True))


def render_prompt(tokenizer: Any, messages: list[Message], template: str) -> str:
    """The prompt's text, up to where the answer starts. Raises UserError as `encode` does."""
    if template == "chat":
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    pattern = PAPER_TEMPLATE if template == "paper" else template.replace("\\n", "\n")  # as a command line has it
    system = ""
    text = ""
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
    if not tokenizer.chat_template:
        raise UserError(
            "data.template=chat: the model's tokenizer has no chat template; set data.template=paper or a text with "
            "{prompt} in it"
        )
    try:
        # Some templates print today's date: then no two days would give the same prompts.
        pattern = tokenizer.get_chat_template()
        if "strftime_now" in pattern:
            pattern = "{% macro strftime_now(format) %}01 Jan 2026{% endmacro %}" + pattern
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=pattern, **options)
    except Exception as error:  # a template is a program of the model's maker: whatever it raises is about it
        roles = brief(", ".join(message["role"] for message in messages))
        raise UserError(
            f"data.template=chat: the tokenizer's chat template refuses messages of {roles} ({brief(error)}); "
            "set data.template=paper or a text with {prompt} in it"
        ) from error


def _tokenise(tokenizer: Any, texts: list[str], template: str) -> list[list[int]]:
    """Ids of whole texts that start with a rendered prompt: with one BOS if the tokenizer adds one, never an EOS."""
    found = token_ids(tokenizer, texts)
    bos = tokenizer.bos_token_id
    # A chat template's text contains the BOS where the model expects one. A text template's does not, as a rule.
    if template != "chat" and bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        found = [ids if ids[:1] == [bos] else [bos, *ids] for ids in found]
    return found


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def encode_responses(
    tokenizer: Any, prompts: Sequence[tuple[str, list[int]]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """Token ids of each response after its prompt (text and ids, from `encode`), without an end token.

    The ids of a prompt are a prefix of the sequence, always: a response is what follows them in the tokenised whole if
    they are a prefix of it. If text and prompt merge at the boundary, the response is tokenised after a line feed whose
    ids are then taken off, so that a sentencepiece tokenizer puts no blank of its own before it; else by itself.
    """
    wholes = _tokenise(
        tokenizer, [text + response for (text, _), response in zip(prompts, responses, strict=True)], template
    )
    found = []
    for (_, prompt_ids), whole, response in zip(prompts, wholes, responses, strict=True):
        if whole[: len(prompt_ids)] == prompt_ids:
            found.append(whole[len(prompt_ids) :])
            continue
        anchor, anchored = token_ids(tokenizer, [ANCHOR, ANCHOR + response])
        if anchored[: len(anchor)] == anchor:
            found.append(anchored[len(anchor) :])
        else:
            found.append(token_ids(tokenizer, [response])[0])
    return found


def end_of_turn(tokenizer: Any, stop_ids: Collection[int], template: str) -> int:
    """The token that ends an answer.

    For the chat template it is the first of `stop_ids` after a rendered assistant message, for it is the template that
    the model was trained with; where there is none, and for text templates, the tokenizer's end-of-sequence token.

    Raises UserError: there is no such token, or no chat template.
    """
    if template == "chat":
        messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": SENTINEL}]
        tail = render_chat(tokenizer, messages).rpartition(SENTINEL)[2]
        for token in token_ids(tokenizer, [tail])[0]:
            if token in stop_ids:
                return token
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token: set its eos_token, or take another model")
    return tokenizer.eos_token_id


def special_texts(tokenizer: Any) -> list[str]:
    """The texts that this tokenizer turns into control tokens wherever they stand, longest first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = {text for text in [*tokenizer.all_special_tokens, *added] if text.strip()}
    return sorted(found, key=lambda text: (-len(text), text))

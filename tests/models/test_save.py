"""Files that are saved with a policy's weights."""

import json
import shutil
import warnings

import pytest
import torch
import transformers

from spin.config.schema import GenerationConfig
from spin.data.examples import Example
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.models.load import load_tokenizer
from spin.models.save import write_stop_ids


@pytest.mark.parametrize(
    ("settings", "remaining"),
    [
        ({"eos_token_id": 1}, {}),
        ({"eos_token_id": [7, 1], "pad_token_id": 1}, {"pad_token_id": 1}),
        ({"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "_from_model_config": True}, {}),
        ({"eos_token_id": 1, "temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        (None, {}),
    ],
)
def test_generate_stops_where_decoding_does(tiny_folder, tmp_path, settings, remaining, recwarn, caplog):
    """`generate` stops at the template's end token, which the model's own generation_config does not contain."""
    folder = tmp_path / "policy"
    shutil.copytree(tiny_folder, folder)
    tokenizer = load_tokenizer(folder)
    greedy = GenerationConfig.from_defaults(temperature=0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in model.parameters():  # larger than the initial weights, so that tokens vary
            if weight.ndim > 1:
                weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    example = Example("0", "", tuple(tokenizer("Hello there")["input_ids"]), "", ())
    [unlimited] = generate_answers(model, AnswerRequest(tokenizer, [example], greedy, 12, {1}, 0))
    end = next(token for token in unlimited.ids[2:] if token not in unlimited.ids[:2])
    stops = {1, 7, end} if settings and isinstance(settings["eos_token_id"], list) else {1, end}
    [answer] = generate_answers(model, AnswerRequest(tokenizer, [example], greedy, 12, stops, 0))
    assert answer.ids[-1] == end and len(answer.ids) < 12

    path = folder / "generation_config.json"
    path.unlink() if settings is None else path.write_text(json.dumps(settings))
    write_stop_ids(folder, stops)
    written = json.loads(path.read_text())
    eos_ids = [] if settings is None else settings["eos_token_id"]
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    assert written.pop("eos_token_id") == eos_ids + sorted(stops - set(eos_ids)) and written == remaining
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reloaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert not [record for record in caplog.records if "generation flags" in record.getMessage()]
        ids = torch.tensor([example.prompt_ids])
        generated = reloaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tuple(generated[0, ids.shape[1] :].tolist()) == tuple(answer.ids)
